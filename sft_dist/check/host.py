"""The host: shared memory, limits, folders and compiler, as training uses them."""

from __future__ import annotations

import os
import resource
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sft_dist.check.finding import Finding, Level
from sft_dist.parallel.machine import Machine
from sft_dist.rundir import cache_root, runs_root

GIB = 2**30
# NCCL takes some 10 MB for each pair of GPUs without NVLink, and the processes that load rows hand them over there.
SHM_GIB = 1.0
# A save and the caches of compilers; a model needs more, which `sft-dist plan` says.
ROOM_GIB = 5.0
OPEN_FILES = 1024
INFINIBAND = Path("/sys/class/infiniband")
MOUNTS = Path("/proc/mounts")
# File systems whose content is the host's memory.
MEMORY = ("tmpfs", "ramfs")


def look_at_host(machine: Machine) -> Iterator[Finding]:
    """Processors, shared memory and limits."""
    bf16 = "multiplies bfloat16 in hardware" if machine.cpu_bf16 else "has no bfloat16: a run on it computes in float32"
    yield Finding(
        "host", "ok", f"{machine.cores} cores ({machine.cpu}; {bf16}), {machine.memory_gib:.0f} GiB of memory"
    )
    yield from _shared_memory(len(machine.gpus))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        fix = f"ulimit -n {OPEN_FILES}" if hard == resource.RLIM_INFINITY or hard >= OPEN_FILES else None
        yield Finding("host", "problem", f"a process may have only {soft} files open", fix or "ask the administrators")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if locked != resource.RLIM_INFINITY and _names(INFINIBAND):
        yield Finding(
            "host",
            "problem",
            f"there is InfiniBand, and a process may lock only {locked // 1024} KiB of memory: NCCL cannot register its buffers",
            "ulimit -l unlimited; in jobs of SLURM: PropagateResourceLimitsExcept=MEMLOCK in slurm.conf",
        )


def _shared_memory(gpus: int) -> Iterator[Finding]:
    try:
        free = shutil.disk_usage("/dev/shm").free / GIB
    except OSError as error:
        yield Finding("host", "problem", f"there is no /dev/shm: {error.strerror}", "mount a tmpfs there")
        return
    if free < SHM_GIB:
        needed = "NCCL" if gpus > 1 else "processes that load rows"
        yield Finding(
            "host",
            "problem" if gpus > 1 else "note",
            f"/dev/shm has {free * 1024:.0f} MiB free, which {needed} may need more of",
            "docker run --ipc=host or --shm-size=8g; else remove what is left in it",
        )


def look_at_folders() -> Iterator[Finding]:
    """Where runs, models and temporary files go: each is written to, and nothing stays."""
    for name, folder, how in (
        ("runs", runs_root(), "run.dir=... or SFT_DIST_RUNS"),
        ("cache", cache_root(), "SFT_DIST_CACHE"),
        ("temporary files", Path(tempfile.gettempdir()), "TMPDIR"),
    ):
        yield _folder(name, folder.absolute(), how)
    asked = os.environ.get("TMPDIR")
    if asked and not Path(asked).is_dir():
        said = f"temporary files: TMPDIR is {asked}, which is no folder; Python goes elsewhere, compilers may fail"
        yield Finding("folders", "note", said, "make it, or unset TMPDIR")


def _folder(name: str, folder: Path, how: str) -> Finding:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    where = str(folder) if there == folder else f"{folder} (to be made in {there})"
    try:
        with tempfile.TemporaryDirectory(prefix=".sft-dist-doctor-", dir=there) as trial:
            first, second = Path(trial) / "a", Path(trial) / "b"
            with first.open("wb") as handle:
                handle.write(bytes(4096))
                handle.flush()
                os.fsync(handle.fileno())
            first.rename(second)
        free = shutil.disk_usage(there).free / GIB
    except OSError as error:
        return Finding(
            "folders", "problem", f"{name}: {where} cannot be written: {error.strerror}", f"name another by {how}"
        )
    kind = file_system(there)
    said = f"{name}: {where}, {free:,.1f} GiB free{f' on {kind}' if kind else ''}"
    if kind in MEMORY and name != "temporary files":
        return Finding("folders", "note", f"{said}: it is in memory, and gone with the host", f"name another by {how}")
    if free < ROOM_GIB:
        return Finding("folders", "note", said, f"make room, or name another by {how}")
    return Finding("folders", "ok", said)


def file_system(path: Path) -> str:
    """The type of the file system on which `path` lies, such as ext4, nfs4 or lustre; empty where it cannot be told."""
    found, longest = "", -1
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    resolved = path.resolve()
    for line in lines:
        fields = line.split()
        if len(fields) > 2:
            # Spaces stand there as \040.
            point = Path(fields[1].replace("\\040", " "))
            if (resolved == point or point in resolved.parents) and len(point.parts) >= longest:
                found, longest = fields[2], len(point.parts)
    return found


def look_at_compiler(machine: Machine) -> Iterator[Finding]:
    """A C compiler and Python's headers: Triton builds with them on a GPU, DeepSpeed its optimizer for offload."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    missing = [*([] if compiler else ["C compiler"]), *([] if header.is_file() else [f"Python headers ({header})"])]
    if not missing:
        yield Finding("compiler", "ok", f"{compiler}, Python's headers")
        return
    use = "Triton's kernels cannot be built" if machine.gpus else "DeepSpeed cannot build its CPU optimizer for offload"
    level: Level = "problem" if machine.gpus else "note"
    yield Finding("compiler", level, f"no {' and no '.join(missing)}: {use}", "apt-get install gcc g++ python3-dev")


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []
