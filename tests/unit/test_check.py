"""`doctor`: what is said of packages, limits, folders, processes and surroundings, and what to do about it."""

from __future__ import annotations

import http.server
import json
import resource
import shutil
import stat
import sysconfig
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sft_dist.check import host, packages, processes, surroundings
from sft_dist.check.doctor import _safe, lines
from sft_dist.check.finding import Finding
from sft_dist.check.gpus import ecc_findings
from sft_dist.parallel.machine import Gpu, Machine

NO_GPU = Machine("a CPU", 4, False, 16.0, ())
H100 = Gpu("NVIDIA H100 80GB HBM3", 79.6, 9.0)
TWO = Machine("a CPU", 64, True, 512.0, (H100, H100))


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`programs(docker="echo 1")`: the only programs there are, and what each does."""

    def make(**scripts: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for name, script in scripts.items():
            path = folder / name
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(folder))

    make()
    return make


def levels(findings: Any) -> list[str]:
    return [finding.level for finding in findings]


@pytest.mark.parametrize(
    ("installed", "level"),
    [("4.7", None), ("5.2.9", None), ("5.3", "note"), ("6.0", "note"), ("4.6.9", "problem"), ("5.0.0rc1", None)],
)
def test_a_version_is_held_against_both_bounds(installed: str, level: str | None) -> None:
    from packaging.requirements import Requirement

    found = packages.judge(Requirement("datasets>=4.7,<5.3"), installed)
    assert (found.level if found else None) == level
    if found:
        assert found.said == f"datasets is {installed}, and sft-dist was tested with <5.3,>=4.7"
        assert "pip install 'datasets<5.3,>=4.7'" in str(found.fix)


def test_what_runs_need_is_told_from_what_extras_and_developers_do() -> None:
    wanted = {requirement.name: optional for requirement, optional in packages.wanted()}
    assert wanted["torch"] is False
    assert wanted["deepspeed"] is True
    assert wanted["wandb"] is True
    assert "ruff" not in wanted


def test_here_everything_that_runs_need_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(packages.look_at_packages())
    assert "problem" not in levels(found)
    assert "torch 2." in found[-1].said
    monkeypatch.setattr(packages, "requires", lambda name: ["torch>=2", "no-such-package>=1", 'nor-this; extra == "x"'])
    first, *rest = packages.look_at_packages()
    assert (first.level, first.said, first.fix) == (
        "problem",
        "no-such-package is not installed",
        "pip install 'no-such-package>=1'",
    )
    assert levels(rest) == ["ok"]


@pytest.mark.parametrize(("machine", "level"), [(NO_GPU, "note"), (TWO, "problem")], ids=["CPU", "two GPUs"])
def test_little_shared_memory(monkeypatch: pytest.MonkeyPatch, machine: Machine, level: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64 << 20, 0, 64 << 20))
    (found,) = [it for it in host.look_at_host(machine) if "/dev/shm" in it.said]
    assert found.level == level
    assert "64 MiB free" in found.said
    assert "--shm-size" in str(found.fix)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(8 << 30, 0, 8 << 30))
    assert not [it for it in host.look_at_host(machine) if "/dev/shm" in it.said]


def test_limits_that_keep_training_from_working(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mlx5_0").mkdir()
    monkeypatch.setattr(host, "INFINIBAND", tmp_path)
    limits = {resource.RLIMIT_NOFILE: (256, 4096), resource.RLIMIT_MEMLOCK: (65536, 65536)}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    said = {it.said: it.fix for it in host.look_at_host(NO_GPU) if it.level == "problem"}
    assert said["a process may have only 256 files open"] == "ulimit -n 1024"
    assert any("InfiniBand" in text and "64 KiB" in text for text in said)
    limits |= {resource.RLIMIT_NOFILE: (256, 256)}
    assert "ask the administrators" in [it.fix for it in host.look_at_host(NO_GPU)]
    monkeypatch.setattr(host, "INFINIBAND", tmp_path / "none")
    assert not any("InfiniBand" in it.said for it in host.look_at_host(NO_GPU))


def test_folders_are_tried_and_left_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_DIST_RUNS", str(tmp_path / "new" / "runs"))
    monkeypatch.setenv("SFT_DIST_CACHE", "/proc/cache")
    found = {it.said.partition(":")[0]: it for it in host.look_at_folders()}
    assert f"(to be made in {tmp_path})" in found["runs"].said
    assert list(tmp_path.iterdir()) == []
    assert found["cache"].level == "problem"
    assert found["cache"].fix == "name another by SFT_DIST_CACHE"


def test_a_temporary_folder_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python passes over it without a word; compilers do not."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    [found] = [it for it in host.look_at_folders() if "TMPDIR is" in it.said]
    assert (found.level, found.fix) == ("note", "make it, or unset TMPDIR")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert not [it for it in host.look_at_folders() if "TMPDIR is" in it.said]


def test_a_folder_in_memory_or_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_DIST_RUNS", str(tmp_path))
    monkeypatch.setattr(host, "file_system", lambda path: "tmpfs")
    runs = next(iter(host.look_at_folders()))
    assert (runs.level, "gone with the host" in runs.said) == ("note", True)
    monkeypatch.setattr(host, "file_system", lambda path: "nfs4")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(9 << 30, 8 << 30, 1 << 30))
    runs = next(iter(host.look_at_folders()))
    assert (runs.level, runs.said.endswith("1.0 GiB free on nfs4")) == ("note", True)


def test_the_file_system_is_that_of_the_nearest_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a b" / "inner").mkdir(parents=True)
    spaced = str(tmp_path / "a b").replace(" ", "\\040")
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/root / ext4 rw 0 0\nserver:/x {spaced} nfs4 rw 0 0\nbroken\n")
    monkeypatch.setattr(host, "MOUNTS", mounts)
    assert host.file_system(tmp_path) == "ext4"
    assert host.file_system(tmp_path / "a b" / "inner") == "nfs4"
    monkeypatch.setattr(host, "MOUNTS", tmp_path / "none")
    assert host.file_system(tmp_path) == ""


@pytest.mark.parametrize(("machine", "level"), [(NO_GPU, "note"), (TWO, "problem")], ids=["CPU", "GPUs"])
def test_a_machine_without_a_compiler(
    machine: Machine, level: str, programs: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    (found,) = host.look_at_compiler(machine)
    assert found.level == level
    assert found.said.startswith(f"no C compiler and no Python headers ({tmp_path}/Python.h): ")
    programs(cc="true")
    (tmp_path / "Python.h").touch()
    assert levels(host.look_at_compiler(machine)) == ["ok"]


@pytest.mark.parametrize("rows", [[["0", " 0"], ["1", " 0"]], [["0", " [N/A]"]], []])
def test_no_memory_errors(rows: list[list[str]]) -> None:
    assert not list(ecc_findings(rows))


def test_memory_errors_name_their_gpu() -> None:
    (found,) = ecc_findings([["0", " 0"], ["3", " 12"]])
    assert (found.level, found.said) == (
        "problem",
        "GPU 3 has had 12 memory errors that could not be corrected",
    )


def test_what_the_processes_said() -> None:
    def judged(gb_per_s: float, *, right: bool = True, machine: Machine | None = None) -> Finding:
        said = {"right": right, "backend": "nccl", "gb_per_s": gb_per_s, "mib": 256}
        return processes.judge("2 processes", 0, f"noise\n{json.dumps(said)}\n", "", machine)

    assert judged(0.5).level == "ok"
    assert judged(380, machine=TWO).said == "2 processes add up 256 MiB at 380 GB/s over nccl"
    slow = judged(20, machine=TWO)
    assert (slow.level, slow.said.endswith("of 369 that the planner assumes")) == ("note", True)
    wrong = judged(380, right=False)
    assert (wrong.level, "wrongly over nccl" in wrong.said) == ("problem", True)
    broken = processes.judge("2 processes", 1, "", "x\nRuntimeError: no interface\nChildFailedError: all\n", None)
    assert broken.said == "2 processes could not add up numbers: RuntimeError: no interface"
    assert "exit status 9" in processes.judge("2 processes", 9, "", "", None).said


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], str]]:
    """`answering(503)`: the address of a server that answers so."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    servers = []

    def start(status: int) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.send_response(status)
                self.end_headers()

            def log_message(self, *words: Any) -> None:
                pass

        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("status", "level"), [(200, "ok"), (404, "ok"), (503, "note")])
def test_the_hub_answers(
    status: int, level: str, answering: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", answering(status))
    assert surroundings.look_at_network().level == level


def test_a_proxy_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub was said to be silent, which nobody had asked."""
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    found = surroundings.look_at_network()
    assert (found.level, "by way of http_proxy (127.0.0.1:9)" in found.said) == ("note", True)
    assert str(found.fix).startswith("correct or unset http_proxy; or fetch")
    assert "secret" not in f"{found.said}{found.fix}"
    monkeypatch.setenv("no_proxy", "hub.invalid")
    assert "proxy" not in surroundings.look_at_network().said


def test_the_hub_does_not_answer(answering: Callable[[int], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    found = surroundings.look_at_network()
    assert (found.level, "refused" in found.said) == ("note", True)
    assert "HF_HUB_OFFLINE=1" in str(found.fix)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert surroundings.look_at_network().level == "ok"


def test_slurm_is_here_or_not(programs: Callable[..., None]) -> None:
    assert surroundings.look_at_slurm().said.startswith("none here")
    programs(sbatch="echo slurm 24.05.1", sinfo="echo 'gpu*\ncpu'", srun="echo --container-image")
    assert surroundings.look_at_slurm().said == "slurm 24.05.1, partitions: cpu, gpu*"
    assert [it.said for it in surroundings.look_at_runtimes()] == ["pyxis"]
    programs(sinfo="echo sinfo: error: munge >&2; exit 1")
    found = surroundings.look_at_slurm()
    assert (found.level, "does not answer: sinfo: error: munge" in found.said) == ("note", True)
    programs(sbatch="echo no conf >&2; exit 1")
    assert surroundings.look_at_slurm().said == "sbatch fails: no conf"


def test_runtimes_are_asked_whether_they_work(programs: Callable[..., None]) -> None:
    assert [it.said for it in surroundings.look_at_runtimes()] == ["no runtime here"]
    programs(docker="echo Cannot connect to the daemon >&2; exit 1", apptainer="echo apptainer version 1.3.4")
    said = {it.said: it.level for it in surroundings.look_at_runtimes()}
    assert said == {
        "docker is here and fails: Cannot connect to the daemon": "note",
        "apptainer version 1.3.4": "ok",
    }


def test_a_look_that_fails_is_a_finding_and_ends_nothing() -> None:
    def look() -> Iterator[Finding]:
        yield Finding("host", "ok", "fine")
        raise KeyError("odd")

    first, second = _safe("host", look)
    assert first.level == "ok"
    assert (second.level, second.said) == ("problem", "KeyError: 'odd'")


def test_a_finding_is_a_line_and_what_to_do_stands_below_it() -> None:
    assert lines(Finding("host", "ok", "fine", "not shown")) == "ok       host:        fine"
    above, below = lines(Finding("GPUs", "problem", "broken", "mend it")).splitlines()
    assert above.startswith("PROBLEM  GPUs:")
    assert below.strip() == "mend it"
    assert below.index("mend") == above.index("broken")
