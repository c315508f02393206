"""What a process is doing, seen from outside: the kernel's word, the stacks of its threads, NCCL's flight recorder.

py-spy reads a process that cannot answer, even a stopped one, but is seldom installed or permitted. Without it the
process writes its own stacks: faulthandler does so from inside a signal handler in C, so that a main thread which is blocked in a
library, with or without Python's lock, does not matter. A stopped process answers nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

# Asks a worker for its stacks. None of the signals that stop a run, that torchrun forwards or that libraries use.
DUMP_SIGNAL = signal.SIGRTMIN + 6
ANSWER_S, SPY_S = 2.0, 10.0
# What a thread that waits for other processes has among its innermost frames: a collective, DDP's backward pass, which ends
# with one, and on a GPU whatever needs the gradients of all first.
WAITING = re.compile(
    r"torch[/.]distributed|_engine_run_backward|deepspeed[/.]comm|gather_object|all_reduce|all_gather|barrier"
    r"|clip_grad_norm|_get_grad_norm|get_global_grad_norm|synchronize"
)
INNERMOST = 4


def stacks_file(logs: Path, rank: int) -> Path:
    """Where a worker writes its stacks when it is asked to, or crashes."""
    return logs / f"stacks-rank-{rank}.txt"


def flight_recorder(environment: Mapping[str, str], logs: Path, pipes: Path) -> dict[str, str]:
    """Variables with which NCCL's last collectives are written into `logs` on a hang; what the user has set stays.

    The names are those of torch 2.11 to 2.13, where the older TORCH_NCCL_TRACE_BUFFER_SIZE and
    TORCH_NCCL_DEBUG_INFO_TEMP_FILE still work with a warning each. A word into a pipe has a process write at once.
    """
    wanted = {
        "TORCH_FR_BUFFER_SIZE": ("2000", "TORCH_NCCL_TRACE_BUFFER_SIZE"),
        "TORCH_FR_DUMP_TEMP_FILE": (str(logs / "nccl-trace-rank-"), "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": ("1", ""),
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": (str(pipes / "nccl-"), ""),
    }
    return {name: value for name, (value, old) in wanted.items() if name not in environment and old not in environment}


def ask_flight_recorder(pipes: Path) -> int:
    """Have every process of this node that uses NCCL write its last collectives; how many were asked."""
    asked = 0
    for pipe in sorted(pipes.glob("nccl-*.pipe")):
        with contextlib.suppress(OSError):  # nobody reads it any more
            handle = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            try:
                os.write(handle, b"1\n")
                asked += 1
            finally:
                os.close(handle)
    return asked


def state_of(pid: int) -> str:
    """The kernel's letter for a process: R, S, D, T, t, Z; X if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for the signal `number`."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def kernel_lines(pid: int) -> list[str]:
    """What /proc says of a process beside its state, as far as it may be read."""
    lines = []
    for name in ("wchan", "syscall"):
        with contextlib.suppress(OSError):
            lines.append(f"{name}: {Path(f'/proc/{pid}/{name}').read_text().strip()}")
    return lines


def dump_stacks(logs: Path, pids: Mapping[int, int]) -> dict[int, str]:
    """The stacks of all threads of these processes (rank to pid), as text; of one that does not answer, why."""
    spy = shutil.which("py-spy")
    found: dict[int, str] = {}
    for rank, pid in pids.items():
        text = _spied(spy, pid) if spy else None
        if text is not None:
            found[rank] = text
    return {**found, **_asked(logs, {rank: pid for rank, pid in pids.items() if rank not in found})}


def waits(stacks: str) -> bool | None:
    """Whether the main thread waits for other processes by what it does; None if the text holds no stack of it."""
    block = _main_thread(stacks)
    return None if block is None else any(WAITING.search(line) for line in block[:INNERMOST])


def _main_thread(stacks: str) -> list[str] | None:
    """Its frames, innermost first. py-spy names it; faulthandler lists threads newest first, so it is the last one."""
    blocks: list[list[str]] = []
    named: list[str] | None = None
    for line in stacks.splitlines():
        if re.match(r"\s*(Thread|Current thread) ", line):
            blocks.append([])
            named = blocks[-1] if "MainThread" in line else named
        elif blocks and line.strip():
            blocks[-1].append(line)
    block = named if named is not None else blocks[-1] if blocks else None
    return block or None


def _spied(spy: str, pid: int) -> str | None:
    """None if py-spy may not look, or finds nothing."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run([spy, "dump", "--pid", str(pid)], capture_output=True, text=True, timeout=SPY_S)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout
    return None


def _asked(logs: Path, pids: Mapping[int, int]) -> dict[int, str]:
    """Ask each process, and wait a moment for the answers."""
    found: dict[int, str] = {}
    before: dict[int, int] = {}
    for rank, pid in pids.items():
        silent = _cannot_answer(pid)
        if silent is not None:
            found[rank] = silent
            continue
        before[rank] = _size(stacks_file(logs, rank))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, DUMP_SIGNAL)
    deadline = time.monotonic() + ANSWER_S
    sizes: dict[int, int] = dict(before)
    while before and time.monotonic() < deadline:
        time.sleep(0.1)
        now = {rank: _size(stacks_file(logs, rank)) for rank in before}
        if now == sizes and all(now[rank] > before[rank] for rank in before):
            break  # all have answered, and none is still writing
        sizes = now
    for rank, size in before.items():
        text = _tail(stacks_file(logs, rank), size)
        found[rank] = text or f"it did not answer within {ANSWER_S:.0f} s"
    return found


def _cannot_answer(pid: int) -> str | None:
    """Why a process cannot be asked; the signal would end one that has not set up its answer yet."""
    state = state_of(pid)
    if state in "XZ":
        return "it has ended"
    if state in "Tt":
        return "it is stopped and cannot answer (install py-spy to see the stacks of stopped processes)"
    return None if catches(pid, DUMP_SIGNAL) else "it has not started far enough to answer"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _tail(path: Path, start: int) -> str:
    with contextlib.suppress(OSError), path.open("rb") as stream:
        stream.seek(start)
        return stream.read(1 << 20).decode("utf-8", "replace")
    return ""


def report_text(title: str, lines: Sequence[str], stacks: Mapping[int, str], pids: Mapping[int, int]) -> str:
    """The content of hang-NODE.txt."""
    parts = [title, "", *lines]
    for rank, text in sorted(stacks.items()):
        parts += ["", f"--- rank {rank}, process {pids[rank]}", *kernel_lines(pids[rank]), text.rstrip()]
    return "\n".join(parts) + "\n"
