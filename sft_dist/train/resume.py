"""Which checkpoint a run goes on from, and whether it can: with this plan, these rows and this number of processes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_dist.errors import CheckpointError
from sft_dist.files import read_json
from sft_dist.rundir import RunDir
from sft_dist.train import universal
from sft_dist.train.checkpoint import MANIFEST, newest_complete

log = logging.getLogger(__name__)

# Plans whose checkpoints mean the same: whole models and optimizers in the same files, or DeepSpeed's shards, which its
# universal checkpoints make of each other's.
WHOLE, DEEPSPEED = ("cpu", "single", "ddp"), ("zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Resume:
    """A checkpoint to go on from."""

    checkpoint: Path
    universal: bool = False
    """Whether DeepSpeed must load the copy in it that was cut anew, instead of its own shards."""


def resume_from(run: RunDir, facts: dict[str, Any]) -> Resume | None:
    """The newest complete checkpoint of `run`, made ready for the plan and the processes that `facts` describe.

    None if there is none. Raises CheckpointError if it holds something else than the run of now needs.
    """
    checkpoint, torn = newest_complete(run)
    for line in torn:
        log.warning("%s", line)
    if checkpoint is None:
        return None
    manifest = read_json(checkpoint / MANIFEST)
    refuse_other_run(checkpoint.name, manifest, facts)
    universal.discard(checkpoint)  # of an attempt that ended before it had loaded it
    if not cut_anew(manifest, facts):
        log.info("resuming from %s", checkpoint.name)
        return Resume(checkpoint)
    universal.convert(checkpoint, was=manifest["plan"], now=facts["plan"], processes=facts["world_size"])
    log.info(
        "resuming from %s: shards of %s on %d processes, cut anew for %s on %d",
        *(checkpoint.name, manifest["plan"], manifest["world_size"], facts["plan"], facts["world_size"]),
    )
    return Resume(checkpoint, universal=True)


def cut_anew(manifest: dict[str, Any], facts: dict[str, Any]) -> bool:
    """Whether a checkpoint is in shards that the processes of now cannot load as they are.

    FSDP2 cuts its own for any number of processes when it loads them.
    """
    names = ("plan", "world_size")
    return manifest.get("plan") in DEEPSPEED and any(manifest.get(name) != facts[name] for name in names)


def refuse_other_run(name: str, manifest: dict[str, Any], facts: dict[str, Any]) -> None:
    """CheckpointError if the checkpoint's files mean something else to the plan, the data or the dtype of now."""
    changed = [field for field in ("data", "dtype", "plan") if manifest.get(field) != facts[field]]
    if any(manifest.get("plan") in alike and facts["plan"] in alike for alike in (WHOLE, DEEPSPEED)):
        changed = [field for field in changed if field != "plan"]
    if changed:
        was, now = [manifest.get(field) for field in changed], [facts[field] for field in changed]
        hint = "restore what it was, or start a new run with run.name=ANOTHER_NAME"
        raise CheckpointError(f"{name} was trained with other {' and '.join(changed)}: {was}, now {now}", hint=hint)

