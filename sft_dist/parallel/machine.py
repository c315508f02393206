"""What this machine computes with, found out without importing torch, so that a login node can answer."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

# The instruction sets with which a CPU multiplies bfloat16 in hardware, as /proc/cpuinfo names them. Without one of
# them torch emulates bfloat16 and is several times slower than float32 (docs/decisions.md).
BF16_CPU_FLAGS = ("avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Gpu:
    """One visible CUDA device."""

    name: str
    memory_gib: float
    compute_capability: float


@dataclass(frozen=True)
class Machine:
    """The processors that this process may use."""

    cpu: str
    cores: int
    """Physical cores in this process's affinity mask."""
    cpu_bf16: bool
    memory_gib: float
    gpus: tuple[Gpu, ...]


def this_machine() -> Machine:
    """Read /proc and nvidia-smi; what cannot be read counts as absent."""
    name, flags, cores = _cpu()
    return Machine(
        cpu=name,
        cores=cores,
        cpu_bf16=any(flag in flags for flag in BF16_CPU_FLAGS),
        memory_gib=_memory_gib(),
        gpus=_gpus(),
    )


def _cpu() -> tuple[str, set[str], int]:
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    try:
        blocks = Path("/proc/cpuinfo").read_text(encoding="utf-8").strip().split("\n\n")
    except OSError:
        return platform.processor() or platform.machine(), set(), max(1, len(allowed))
    name, flags = platform.machine(), set[str]()
    cores = set[tuple[str, str]]()
    for block in blocks:
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
        name = fields.get("model name", name)
        flags = set(fields.get("flags", "").split()) or flags
        if fields.get("processor", "").isdigit() and int(fields["processor"]) in allowed:
            # Hyper-threads of one core share its physical and core id; without ids every processor is a core.
            cores.add((fields.get("physical id", "0"), fields.get("core id", fields["processor"])))
    return name, flags, max(1, min(len(cores), _cpu_quota()))


def _cpu_quota() -> int:
    """Processors that the control group grants (a container's limit), as a whole number; many if there is no limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return 1 << 16


def _memory_gib() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError):
        return 0.0


def _gpus() -> tuple[Gpu, ...]:
    command = shutil.which("nvidia-smi")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if command is None or (visible is not None and visible.strip() in ("", "-1", "NoDevFiles")):
        return ()
    query = [command, "--query-gpu=index,uuid,name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines() if line.count(",") == 4]
    gpus = {
        index: (uuid, Gpu(name, _number(memory) / 1024, _number(capability)))
        for index, uuid, name, memory, capability in rows
    }
    if visible is None:
        return tuple(gpu for _, gpu in gpus.values())
    # In the variable's order, as CUDA counts them; a MIG slice is a GPU of its own, described by its card.
    return tuple(found for item in visible.split(",") if (found := _visible_gpu(item.strip(), gpus)) is not None)


def _visible_gpu(item: str, gpus: dict[str, tuple[str, Gpu]]) -> Gpu | None:
    if item in gpus:
        return gpus[item][1]
    if item.startswith("MIG-"):
        return next((gpu for _, gpu in gpus.values()), None)
    return next((gpu for uuid, gpu in gpus.values() if item and not item.isdigit() and uuid.startswith(item)), None)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # "[N/A]" on devices that do not report the value
        return 0.0
