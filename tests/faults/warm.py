"""A process that has imported torch and TRL once, and starts `python -m MODULE ...` as forks of itself.

Starting Python and importing them takes longer than training a tiny model, so that fifty injected faults would take half an
hour. Everything else is real: the command, its launcher, torchrun's agent and the workers are processes of their own with
the parents, sessions, signals and environments that they have otherwise; only exec is left out, at every level.

Requests are lines of JSON on stdin, answers on stdout: {"start": [words], "env": {}, "out": file} -> pid, {"poll": pid} ->
exit status, or null while it runs. When stdin ends, what was started is killed.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler as handler
import torch.distributed.run  # noqa: F401
from injections import arm

from sft_dist import cli, refs, stages, supervise  # noqa: F401
from sft_dist.jobs import launcher
from sft_dist.jobs.stacks import DUMP_SIGNAL
from sft_dist.train import (  # noqa: F401
    after_resume,
    arguments,
    callbacks,
    forecast,
    health,
    model,
    publish,
    resume,
    trackers,
    trainer,
    worker,
)


class Forked:
    """What subprocess.Popen([python, "-m", MODULE, ...]) returns, as far as launchers use it."""

    def __init__(
        self,
        args: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdout: Any = None,
        stderr: Any = None,
        start_new_session: bool = False,
        preexec_fn: Callable[[], None] | None = None,
    ) -> None:
        self.args, self.returncode = list(args), None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                become_new(env, stdout, stderr, start_new_session, preexec_fn)
                code = run([word for word in self.args if word not in (sys.executable, "-u")])
            except BaseException:
                traceback.print_exc()
            finally:
                if code < 0:  # as Python ends by a signal of which nobody has heard
                    signal.signal(-code, signal.SIG_DFL)
                    os.kill(os.getpid(), -code)
                os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(0.01)
        return int(self.returncode or 0)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def become_new(
    env: Mapping[str, str] | None, stdout: Any, stderr: Any, session: bool, preexec_fn: Callable[[], None] | None
) -> None:
    """What exec would have done: file descriptors, signals, environment; and what a new interpreter starts with."""
    if session:
        os.setsid()
    for wanted, number in ((stdout, 1), (stderr, 2)):
        if wanted is not None:
            os.dup2(wanted if isinstance(wanted, int) else wanted.fileno(), number)
    faulthandler.disable()
    faulthandler.unregister(DUMP_SIGNAL)
    if preexec_fn is not None:
        preexec_fn()
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.closerange(3, min(os.sysconf("SC_OPEN_MAX"), 1 << 16))
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
    atexit._clear()
    logging.disable(logging.NOTSET)
    logging.getLogger("sft_dist").handlers.clear()


def run(words: list[str]) -> int:
    """Be `python WORDS`; the exit status."""
    assert words[0] == "-m", words
    sys.argv = [words[1], *words[2:]]
    arm(words[1])
    try:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        code: Any = 0
    except SystemExit as error:
        code = error.code
    except KeyboardInterrupt:
        traceback.print_exc()
        code = -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


def main() -> None:
    """Answer requests until stdin ends."""
    handler.Popen = Forked
    launcher.subprocess = SimpleNamespace(Popen=Forked)
    # Not compared when the collector runs in a fork: their pages stay shared.
    gc.collect()
    gc.freeze()
    started: dict[int, Forked] = {}
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"ready": os.getpid()}), file=answer, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            with Path(request["out"]).open("ab") as out:
                process = Forked(request["start"], env=request["env"], stdout=out, stderr=out, start_new_session=True)
            started[process.pid] = process
            print(json.dumps(process.pid), file=answer, flush=True)
        else:
            print(json.dumps(started[request["poll"]].poll()), file=answer, flush=True)
    for process in started.values():
        process.kill()


if __name__ == "__main__":
    main()
