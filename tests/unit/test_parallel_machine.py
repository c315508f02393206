"""What the machine is found to be, from /proc and nvidia-smi, and from neither."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sft_dist.parallel import machine
from sft_dist.parallel.machine import Gpu, this_machine

SMI_LINES = (
    "0, GPU-aaaa1111, NVIDIA H100 80GB HBM3, 81559, 9.0",
    "1, GPU-bbbb2222, Tesla T4, 15360, 7.5",
    "2, GPU-cccc3333, Odd, [N/A], [N/A]",
)
H100, T4, ODD = Gpu("NVIDIA H100 80GB HBM3", 81559 / 1024, 9.0), Gpu("Tesla T4", 15.0, 7.5), Gpu("Odd", 0.0, 0.0)


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for nvidia-smi on the PATH that prints three GPUs."""
    command = tmp_path / "bin" / "nvidia-smi"
    command.parent.mkdir()
    lines = "\n".join(SMI_LINES)
    command.write_text(f"#!/bin/sh\ncat <<'END'\n{lines}\nEND\n", encoding="utf-8")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    return command


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, (H100, T4, ODD)),
        ("0", (H100,)),
        ("1,0", (T4, H100)),
        ("MIG-GPU-aaaa1111/1/0", (H100,)),
        ("GPU-bbbb2222", (T4,)),
        ("GPU-bbbb", (T4,)),
        (" 2 ", (ODD,)),
        ("", ()),
        ("-1", ()),
        ("NoDevFiles", ()),
        ("7", ()),
    ],
)
def test_visible_gpus(
    nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: tuple[Gpu, ...]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert this_machine().gpus == expected, "in the order in which CUDA counts them"


@pytest.mark.parametrize("script", ["exit 9", "echo 'NVIDIA-SMI has failed'"])
def test_a_broken_nvidia_smi_means_no_gpu(nvidia_smi: Path, script: str) -> None:
    nvidia_smi.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    assert this_machine().gpus == ()


def test_without_nvidia_smi_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert this_machine().gpus == ()


def processor(number: int, core: int, *, socket: int = 0, flags: str = "fpu avx2", name: str = "Test CPU") -> str:
    return (
        f"processor\t: {number}\nmodel name\t: {name}\nphysical id\t: {socket}\ncore id\t\t: {core}\nflags\t\t: {flags}"
    )


def with_cpuinfo(monkeypatch: pytest.MonkeyPatch, text: str, allowed: set[int]) -> None:
    real = Path.read_text

    def read_text(self: Path, *args: object, **kwargs: object) -> str:
        return text if str(self) == "/proc/cpuinfo" else real(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: allowed, raising=False)


def test_hyper_threads_of_a_core_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n\n".join(processor(n, n % 2, socket=n // 4) for n in range(8))
    with_cpuinfo(monkeypatch, text, set(range(8)))
    found = this_machine()
    assert (found.cpu, found.cores, found.cpu_bf16) == ("Test CPU", 4, False)


def test_only_the_cores_that_this_process_may_use_count(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cpuinfo(monkeypatch, "\n\n".join(processor(n, n) for n in range(8)), {2, 5})
    assert this_machine().cores == 2


@pytest.mark.parametrize("flag", machine.BF16_CPU_FLAGS)
def test_bfloat16_units_are_seen(monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    with_cpuinfo(monkeypatch, processor(0, 0, flags=f"fpu {flag} sse"), {0})
    assert this_machine().cpu_bf16
    with_cpuinfo(monkeypatch, processor(0, 0, flags=f"fpu {flag}_not sse"), {0})
    assert not this_machine().cpu_bf16


def test_processors_without_core_ids_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cpuinfo(monkeypatch, "\n\n".join(f"processor\t: {n}\nBogoMIPS\t: 50" for n in range(4)), {0, 1, 2})
    assert this_machine().cores == 3


def test_without_proc_the_affinity_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Path, *_: object, **__: object) -> str:
        raise FileNotFoundError(str(self))

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    found = this_machine()
    assert found.cores == 3
    assert found.cpu_bf16 is False


def test_this_machine_has_a_core_and_memory() -> None:
    found = this_machine()
    assert found.cores >= 1
    assert found.memory_gib > 0
