"""python -m sft_dist.check.reduce: processes that torchrun started add up numbers; rank 0 prints how that went, as JSON."""

from __future__ import annotations

import datetime
import json
import os
import signal
import sys
import time

from sft_dist.jobs.launcher import end_with_parent
from sft_dist.process import begin, run_to_end

# Float32 numbers: 256 MiB between GPUs, as large as what gradients are summed in; 16 MiB between processes on CPUs.
GPU_NUMBERS, CPU_NUMBERS = 1 << 26, 1 << 22
REPEATS = 5
TIMEOUT = datetime.timedelta(seconds=60)


def main() -> int:
    """0 if every process has the right sum."""
    import torch
    import torch.distributed as dist

    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    on_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= size
    if on_gpus:
        torch.cuda.set_device(local)
    device = torch.device("cuda", local) if on_gpus else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpus else "gloo", timeout=TIMEOUT)
    numbers = torch.full((GPU_NUMBERS if on_gpus else CPU_NUMBERS,), float(rank + 1), device=device)
    dist.all_reduce(numbers)
    right = bool((numbers == size * (size + 1) / 2).all())
    seconds = float("inf")
    for _ in range(REPEATS):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(numbers)
        if on_gpus:
            torch.cuda.synchronize()
        seconds = min(seconds, time.perf_counter() - began)
    verdict = torch.tensor(int(right), device=device)
    dist.all_reduce(verdict, op=dist.ReduceOp.MIN)
    if rank == 0:
        # What NCCL's tests call the bus bandwidth: each process sends and receives 2 (n - 1) / n of the buffer.
        gb_s = 2 * (size - 1) / size * numbers.nbytes / seconds / 1e9
        sys.stdout.write(
            json.dumps(
                {
                    "right": bool(verdict.item()),
                    "backend": dist.get_backend(),
                    "gb_per_s": gb_s,
                    "mib": numbers.nbytes / 2**20,
                }
            )
            + "\n"
        )
    dist.barrier()
    dist.destroy_process_group()
    return 0 if verdict.item() else 1


if __name__ == "__main__":
    begin()
    end_with_parent(
        signal.SIGKILL
    )  # torchrun gives each process a session of its own, which a kill of torchrun's does not reach
    run_to_end(main)
