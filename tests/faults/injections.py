"""Faults that a process does to itself at a named point of its run; tests/faults/warm.py arms them in each process.

The variable FAULTS holds a list in JSON, each entry {"at": POINT, "rank": R, "do": ACTION, "after": SECONDS}; without a rank
every process does it. Points: command, start, join, prepare, load, forward:N, step:N, evaluate:N, save:N, manifest:N, publish,
leave; N is the step.
"""

from __future__ import annotations

import datetime
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from sft_dist import files
from sft_dist.jobs import launcher
from sft_dist.train import callbacks, publish, ranks, saving, trainer, worker

VARIABLE = "FAULTS"
# The folder where each process leaves its number.
PIDS = "FAULTS_PIDS"
_faults: list[dict[str, Any]] = []


def arm(module: str) -> None:
    """Take over what is to happen in this process, which is about to become `python -m MODULE`."""
    if PIDS in os.environ:
        (Path(os.environ[PIDS]) / str(os.getpid())).touch()
    _faults[:] = json.loads(os.environ.get(VARIABLE, "[]"))
    if not _faults:
        return
    if module == "sft_dist":
        reach("command")
    if module == "sft_dist.train":
        reach("start")
    # A disk under load may take seconds for a few kilobytes. What is tested is what a save that has been waited for is worth.
    saving.QUICK_S = 60.0
    _wrap(ranks, "join", lambda *_: "join")
    _wrap(ranks, "leave", lambda *_: "leave")
    _wrap(worker, "_prepare", lambda *_: "prepare")
    _wrap(worker, "_model", lambda *_: "load")
    _wrap(trainer.Trainer, "compute_loss", lambda self, *_: f"forward:{self.state.global_step + 1}")
    _wrap(callbacks.RunRecorder, "on_step_end", lambda self, args, state, *_: f"step:{state.global_step}")
    _wrap(callbacks.RunRecorder, "on_prediction_step", lambda self, args, state, *_: f"evaluate:{state.global_step}")
    _wrap(trainer.Trainer, "_save_optimizer_and_scheduler", lambda self, *_: f"save:{self.state.global_step}")
    _wrap(saving, "seal", lambda folder, step, *_: f"manifest:{step}")
    _wrap(publish, "_compare", lambda *_: "publish")


def reach(point: str) -> None:
    """This process is at `point`: what is to happen here happens, once."""
    rank = int(os.environ.get("RANK", "0"))
    for fault in [it for it in _faults if it["at"] == point and it.get("rank", rank) == rank]:
        _faults.remove(fault)
        if fault.get("after"):
            timer = threading.Timer(fault["after"], do, (fault["do"],))
            timer.daemon = True
            timer.start()
        else:
            do(fault["do"])


def do(action: str) -> None:
    """A signal's name; `launcher SIGNAL`; `everybody SIGNAL`, as a cluster does that signals all processes of a job; an exception; something done to the disk, the clock, a port."""
    what, _, rest = action.partition(" ")
    if what.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[what])
    elif what == "launcher":
        os.kill(command_of_this_worker(), signal.Signals[rest])
    elif what == "everybody":
        command = command_of_this_worker()
        for process in (command, os.getppid(), *launcher.children(os.getppid())):
            os.kill(process, signal.Signals[rest])
    elif what == "sleep":
        time.sleep(float(rest))
    elif what == "raise":
        raise RuntimeError(rest)
    elif what == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    elif what == "fill":
        fill(Path(rest))
    elif what == "readonly":
        for words in (("--bind", rest, rest), ("-o", "remount,ro,bind", rest)):
            subprocess.run(["mount", *words], check=True)
    elif what == "clock":
        shift_clock(float(rest))
    elif what == "port":
        hold_port()
    else:
        raise ValueError(action)


def command_of_this_worker() -> int:
    """The process id of `sft-dist`: the worker's parent is torchrun's agent, the agent's is the command."""
    agent = Path(f"/proc/{os.getppid()}/stat").read_text()
    return int(agent.rpartition(")")[2].split()[1])


def fill(path: Path) -> None:
    """Leave no room on the file system of `path`."""
    with path.open("wb", buffering=0) as stream:
        block = 1 << 16
        while block:
            try:
                stream.write(b"\0" * block)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                block //= 2


def shift_clock(seconds: float) -> None:
    """The wall clock of this process jumps. The monotonic one does not: no kernel lets it."""
    real, shift = time.time, datetime.timedelta(seconds=seconds)
    time.time = lambda: real() + seconds

    class Shifted(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.datetime.now(tz) + shift

    clock = type(sys)("datetime")
    clock.__dict__.update(datetime.__dict__)
    clock.datetime = Shifted  # type: ignore[attr-defined]
    files.datetime = clock


def hold_port() -> None:
    """The processes are to meet at a port that somebody else listens on: this one does, until it ends."""
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port, real = taken.getsockname()[1], launcher.torchrun

    def torchrun(resolved: Any, arguments: list[str]) -> list[str]:
        words = real(resolved, arguments)
        at = words.index("--standalone")
        fixed = ["--nnodes", "1", "--node-rank", "0", "--master-addr", "127.0.0.1", "--master-port", str(port)]
        return [*words[:at], *fixed, *words[at + 1 :]]

    torchrun.holds = taken  # type: ignore[attr-defined]
    launcher.torchrun = torchrun


def _wrap(owner: Any, name: str, point: Any) -> None:
    plain = getattr(owner, name)
    plain = getattr(plain, "plain", plain)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        reach(point(*args))
        return plain(*args, **kwargs)

    wrapped.plain = plain  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)
