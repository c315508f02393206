"""What the watch over a training costs it: one beat, and all callbacks of one step, beside nothing.

    python benchmarks/heartbeat.py

On a GPU the second figure includes the copy of the step's two flags to the host, which nothing waits for.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from sft_dist.config.schema import Config
from sft_dist.jobs.beats import BEATS, Pulse, make_folder, read_beats, remove_folder
from sft_dist.parallel.machine import this_machine
from sft_dist.parallel.resolve import resolve
from sft_dist.rundir import RunDir
from sft_dist.train import heartbeat
from sft_dist.train.health import Health
from sft_dist.train.ranks import Ranks

REPEATS, CALLS = 9, 2000


def main() -> None:
    folder = make_folder()
    try:
        pulse = Pulse(folder, 1)
        report("a beat", per_call(lambda: pulse.beat("step")))
        report("reading 8 processes", per_call(lambda: read_beats(folder), with_eight(folder)))
        with tempfile.TemporaryDirectory() as name:
            report("the callbacks of one step", per_call(one_step(Path(name), folder)))
    finally:
        heartbeat.end()
        remove_folder(folder)


def one_step(run: Path, folder: Path) -> Callable[[], None]:
    """What is called in a step without a log and without a save."""

    os.environ[BEATS] = str(folder)
    heartbeat.begin(0, None)
    config = Config()
    resolved = resolve(config, this_machine())
    health = Health(RunDir(run), config, resolved, Ranks())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    health.facts.gradient_norm, health.facts.loss = torch.ones((), device=device), torch.ones((), device=device)
    callbacks = health.around([])
    state, control = SimpleNamespace(global_step=1), SimpleNamespace(should_save=False, should_evaluate=False)
    given = {"model": torch.nn.Linear(2, 2)}

    def step() -> None:
        for event in ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"):
            for callback in callbacks:
                getattr(callback, event)(None, state, control, **given)

    return step


def with_eight(folder: Path) -> int:
    for rank in range(2, 9):
        Pulse(folder, rank)
    return CALLS // 10


def per_call(call: Callable[[], object], calls: int = CALLS) -> list[float]:
    """Microseconds of a call, once for each repeat."""
    found = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        for _ in range(calls):
            call()
        found.append(1e6 * (time.perf_counter() - began) / calls)
    return found


def report(what: str, microseconds: list[float]) -> None:
    low, high = min(microseconds), max(microseconds)
    print(f"{what}: {statistics.median(microseconds):.1f} us (lowest {low:.1f}, highest {high:.1f})")


if __name__ == "__main__":
    main()
