"""The GPUs: torch sees what the driver sees, each computes what the CPU does, and as fast as its kind should."""

from __future__ import annotations

import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator, Sequence

from sft_dist.check.finding import Finding, Level
from sft_dist.parallel.hardware import gpu_model
from sft_dist.parallel.machine import Gpu, Machine

# Rows of the square matrices: large enough that their product reaches the speed that the planner assumes.
SIZE, REPEATS = 8192, 20
SMALL = 256
# Of the speed that the planner assumes; slower means that it is throttled, or that somebody else computes on it.
SLOW = 0.7
FREE = 0.9
ECC = "ecc.errors.uncorrected.volatile.total"


def look_at_gpus(machine: Machine) -> Iterator[Finding]:
    """One finding for each GPU, or what keeps torch from using them."""
    import torch

    if not machine.gpus:
        level: Level = "note" if shutil.which("nvidia-smi") else "ok"
        hidden = ": nvidia-smi is here and shows none, or CUDA_VISIBLE_DEVICES hides them" if level == "note" else ""
        yield Finding("GPUs", level, f"none{hidden}; runs train on the CPU")
        return
    if torch.version.cuda is None:
        yield Finding(
            "GPUs",
            "problem",
            f"torch {torch.__version__} is a build for CPUs, and this machine has GPUs: {len(machine.gpus)}",
            "install a build for CUDA: https://pytorch.org/get-started/locally",
        )
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        why = str(said[-1].message).splitlines()[0] if said else "it does not say why"
        yield Finding(
            "GPUs",
            "problem",
            f"torch {torch.__version__} for CUDA {torch.version.cuda} cannot use the GPUs: {why}",
            "update the driver, or install a torch that was built for an older CUDA; in a container: --gpus all, or --nv",
        )
        return
    if torch.cuda.device_count() != len(machine.gpus):
        yield Finding(
            "GPUs", "problem", f"torch sees {torch.cuda.device_count()} GPUs, and nvidia-smi {len(machine.gpus)}"
        )
    for index, gpu in enumerate(machine.gpus[: torch.cuda.device_count()]):
        try:
            yield _try_gpu(index, gpu)
        except RuntimeError as error:  # torch's for all that CUDA reports, out of memory included
            yield Finding(
                "GPUs",
                "problem",
                f"GPU {index} ({gpu.name}): {str(error).splitlines()[0]}",
                "nvidia-smi shows who uses it; dmesg shows Xid errors of the driver",
            )
    yield from _errors()


def _try_gpu(index: int, gpu: Gpu) -> Finding:
    import torch

    device = torch.device("cuda", index)
    free, total = torch.cuda.mem_get_info(index)
    # -1, 0 and 1: all sums on the way are whole numbers that bfloat16 holds, so that the answer is the CPU's, bit for bit.
    left, right = (torch.randint(-1, 2, (SMALL, SMALL)).float() for _ in range(2))
    dtype = torch.bfloat16 if gpu.compute_capability >= 8 else torch.float32
    wrong = not torch.equal(
        (left.to(device, dtype) @ right.to(device, dtype)).float().cpu(), (left @ right).to(dtype).float()
    )
    if wrong:
        return Finding("GPUs", "problem", f"GPU {index} ({gpu.name}) multiplies wrongly", "leave it out, and report it")
    kind = gpu_model(gpu)
    expected = kind.peak_flops * kind.gemm_share
    reached = _speed(device, dtype)
    said = f"GPU {index}: {gpu.name}, {total / 2**30:.0f} GiB, {reached / 1e12:,.0f} TFLOP/s in {str(dtype).partition('.')[2]}"
    if free < FREE * total:
        return Finding(
            "GPUs", "note", f"{said}; {(total - free) / 2**30:.1f} GiB are in use", "nvidia-smi shows by whom"
        )
    if reached < SLOW * expected:
        return Finding(
            "GPUs",
            "note",
            f"{said}, of {expected / 1e12:,.0f} that {kind.name} should reach",
            "nvidia-smi -q -d PERFORMANCE,POWER shows what slows it down",
        )
    return Finding("GPUs", "ok", said)


def _speed(device: object, dtype: object) -> float:
    """Floating-point operations a second in products of large matrices."""
    import torch

    matrix = torch.randn(SIZE, SIZE, device=device, dtype=dtype)  # type: ignore[call-overload]
    out = torch.empty_like(matrix)
    for _ in range(3):
        torch.matmul(matrix, matrix, out=out)
    torch.cuda.synchronize(device)  # type: ignore[arg-type]
    began = time.perf_counter()
    for _ in range(REPEATS):
        torch.matmul(matrix, matrix, out=out)
    torch.cuda.synchronize(device)  # type: ignore[arg-type]
    return float(REPEATS * 2 * SIZE**3 / (time.perf_counter() - began))


def _errors() -> Iterator[Finding]:
    """Memory errors that the GPUs could not correct since the driver was loaded."""
    query = ["nvidia-smi", f"--query-gpu=index,{ECC}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return
    yield from ecc_findings([line.split(",") for line in answer.splitlines()])


def ecc_findings(rows: Sequence[Sequence[str]]) -> Iterator[Finding]:
    """A problem for each GPU (index, count) whose count is neither 0 nor unknown."""
    for row in rows:
        if len(row) == 2 and row[1].strip().isdigit() and int(row[1]):
            yield Finding(
                "GPUs",
                "problem",
                f"GPU {row[0].strip()} has had {int(row[1])} memory errors that could not be corrected",
                "have it reset or replaced; until then leave its node out: slurm.exclude",
            )
