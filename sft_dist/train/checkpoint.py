"""The checkpoints of a run, of which only those with a manifest count: found, taken, set aside, removed. Imports no torch."""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
from pathlib import Path
from typing import Any

from sft_dist.files import read_json
from sft_dist.rundir import RunDir
from sft_dist.train.manifest import MANIFEST, damage
from sft_dist.train.ranks import Ranks

# In a checkpoint that was set aside: what was wrong with it.
SET_ASIDE = "SET_ASIDE.txt"
# What a checkpoint is called while it is being removed, so that half of one never bears its name.
REMOVING = ".removing-"
# What a manifest says of how its checkpoint was trained, as far as the run that goes on asks.
OF_PLAN = ("plan", "dtype", "use_cpu", "world_size", "per_device_train_batch_size", "gradient_checkpointing")
# The fewest complete checkpoints that rotation leaves: the newest may turn out to be damaged.
LEAST = 2


def list_checkpoints(run: RunDir) -> list[tuple[int, Path]]:
    """(step, folder) of everything named checkpoint-N, newest first, complete or not."""
    found = []
    if run.checkpoints.is_dir():
        for path in run.checkpoints.iterdir():
            match = re.fullmatch(r"checkpoint-(\d+)", path.name)
            if match and path.is_dir():
                found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def newest_complete(run: RunDir, ranks: Ranks | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line on each damaged one, which is renamed `torn-checkpoint-N`.

    With `ranks` every process must call it: the main one lists and renames, all of them verify.
    """
    ranks = ranks or Ranks()
    torn: list[str] = []
    for _, path in ranks.by_main(lambda: list_checkpoints(run)):
        problem = damage(path, ranks)
        if problem is None:
            return path, torn
        torn.append(ranks.by_main(functools.partial(set_aside, path, problem)))
    return None, torn


def set_aside(checkpoint: Path, problem: str) -> str:
    """Rename a checkpoint that cannot be used to torn-checkpoint-N, with the reason in it; a line that says so."""
    aside = checkpoint.with_name(f"torn-{checkpoint.name}")
    while aside.exists():  # set aside before, saved again and torn again
        aside = aside.with_name(f"{aside.name}-again")
    checkpoint.rename(aside)
    with contextlib.suppress(OSError):  # the disk may be full
        (aside / SET_ASIDE).write_text(f"{problem}\n", encoding="utf-8")
    return f"{checkpoint.name}: {problem}; set aside as {aside.name}"


def newest_facts(run: RunDir) -> dict[str, Any] | None:
    """What the newest checkpoint that has a manifest says of how it was trained; None without one. Hashes nothing."""
    for _, path in list_checkpoints(run):
        with contextlib.suppress(ValueError):
            manifest = read_json(path / MANIFEST)
            if isinstance(manifest, dict) and manifest.keys() >= {*OF_PLAN}:
                return manifest
    return None


def rotate(run: RunDir, keep: int, milestone_steps: int | None = None) -> None:
    """Remove the oldest checkpoints beyond `keep` complete ones; called once a newer one is complete. Raises OSError.

    At least two complete ones stay, whatever `keep` says, and so do those at multiples of `milestone_steps`.
    """
    for left in run.checkpoints.glob(f"{REMOVING}*"):  # of a process that was killed while it removed one
        shutil.rmtree(left)
    complete = [(step, path) for step, path in list_checkpoints(run) if (path / MANIFEST).is_file()]
    for step, path in complete[max(keep, LEAST) :]:
        if not milestone_steps or step % milestone_steps:
            discard(path)


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint; at no moment half of one stands under its name. Raises OSError."""
    leaving = checkpoint.with_name(f"{REMOVING}{checkpoint.name}")
    if leaving.exists():
        shutil.rmtree(leaving)
    checkpoint.rename(leaving)
    shutil.rmtree(leaving)
