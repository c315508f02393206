"""Whether processes on this machine find each other: torchrun starts them as it does those of a run, and they add numbers up."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys

from sft_dist.check.finding import Finding
from sft_dist.parallel.hardware import gpu_model
from sft_dist.parallel.machine import Machine

TIMEOUT_S, LEAVE_S = 180.0, 10.0
# Of the speed that the planner assumes between two GPUs of this kind.
SLOW = 0.5
HOSTS = "let the host's own name resolve (/etc/hosts), and unset MASTER_ADDR, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"


def look_at_processes(machine: Machine, timeout_s: float = TIMEOUT_S) -> Finding:
    """An all-reduce of a process on each GPU over NCCL, or of two on the CPU over gloo."""
    count = len(machine.gpus) if len(machine.gpus) > 1 else 2
    on_gpus = len(machine.gpus) > 1
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    variables = {"OMP_NUM_THREADS": "1"} | ({} if on_gpus else {"CUDA_VISIBLE_DEVICES": ""})
    process = subprocess.Popen(
        [*words, "-m", "sft_dist.check.reduce"],
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    who = f"{count} processes on {'GPUs' if on_gpus else 'the CPU'}"
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return Finding("processes", "problem", f"{who} had not met after {timeout_s:.0f} s", HOSTS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that is stuck in a driver holds the pipes
                process.communicate(timeout=LEAVE_S)
    return judge(who, process.returncode, output, errors, machine if on_gpus else None)


def judge(who: str, status: int, output: str, errors: str, machine: Machine | None) -> Finding:
    """What the processes' output says; `machine` if its GPUs took part."""
    line = next((line for line in output.splitlines() if line.startswith("{")), None)
    if line is None:
        return Finding("processes", "problem", f"{who} could not add up numbers: {_cause(errors, status)}", HOSTS)
    said = json.loads(line)
    if not said["right"]:
        fix = "NCCL_P2P_DISABLE=1 shows whether it is the links between GPUs (in virtual machines: the IOMMU)"
        return Finding("processes", "problem", f"{who} added up numbers wrongly over {said['backend']}", fix)
    text = f"{who} add up {said['mib']:.0f} MiB at {said['gb_per_s']:.3g} GB/s over {said['backend']}"
    if machine is not None:
        expected = min(gpu_model(gpu).inside_bytes_per_s for gpu in machine.gpus) / 1e9
        if said["gb_per_s"] < SLOW * expected:
            fix = "nvidia-smi topo -m shows how they are linked; NCCL_DEBUG=INFO what NCCL makes of it"
            return Finding("processes", "note", f"{text}, of {expected:.0f} that the planner assumes", fix)
    return Finding("processes", "ok", text)


def _cause(errors: str, status: int) -> str:
    """The last line that names an error."""
    lines = [line.strip() for line in errors.splitlines() if "Error" in line and "ChildFailed" not in line]
    return lines[-1][:300] if lines else f"they ended with exit status {status}"
