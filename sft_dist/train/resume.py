"""Which checkpoint a run goes on from, and whether it can: with this plan, these rows and this number of processes."""

from __future__ import annotations

import fnmatch
import functools
import json
import logging
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_dist.errors import CheckpointError
from sft_dist.files import read_json, utc_now, write_json
from sft_dist.parallel.decide import WHOLE
from sft_dist.rundir import RunDir
from sft_dist.train import universal
from sft_dist.train.checkpoint import newest_complete, set_aside
from sft_dist.train.manifest import MANIFEST
from sft_dist.train.ranks import Ranks

log = logging.getLogger(__name__)

# Plans whose checkpoints mean the same, as those of WHOLE do: DeepSpeed's shards, which its universal checkpoints make of
# each other's.
DEEPSPEED = ("zero1", "zero2", "zero3")
# What a checkpoint's files do not depend on, but what its run is: refused unless the user accepts it.
OF_RUN = ("data", "template", "packing", "global_batch_size")
# What its files mean: nothing could load them otherwise.
OF_FILES = ("dtype", "plan")
# Files that a resumed run does not load; what others hold at least.
NOT_LOADED = (MANIFEST, "training_args.bin")
HOLDS = {
    "optimizer.pt": {"state", "param_groups"},
    "scheduler.pt": {"last_epoch"},
    "rng_state*.pth": {"python", "numpy", "cpu"},
    "*_optim_states.pt": {"optimizer_state_dict"},
    "*_model_states.pt": {"module"},
}
# In the run directory: `--accept-change` was given; once used, what was accepted.
ACCEPTED = "accepted_change.json"


def accept_change(run: RunDir) -> None:
    """Let the next attempt go on although the data, the template, packing or the global batch are others now."""
    write_json(run.path / ACCEPTED, {"time": utc_now(), "changed": None})


@dataclass(frozen=True)
class Resume:
    """A checkpoint to go on from."""

    checkpoint: Path
    universal: bool = False
    """Whether DeepSpeed must load the copy in it that was cut anew, instead of its own shards."""
    accepted: Mapping[str, Any] | None = None
    """What is not as it was, and was accepted: field -> [was, now]."""


def resume_from(run: RunDir, facts: dict[str, Any], ranks: Ranks) -> Resume | None:
    """The newest complete checkpoint of `run`, made ready for the plan and the processes that `facts` describe.

    None if there is none. Every process must call it: they verify the files together, and the main one decides. Raises
    CheckpointError if it holds something else than the run of now needs.
    """
    while True:
        checkpoint, torn = newest_complete(run, ranks)
        problem = None if checkpoint is None else unreadable(checkpoint, ranks)
        if checkpoint is not None and problem is not None:
            torn.append(ranks.by_main(functools.partial(set_aside, checkpoint, problem)))
        for line in torn:
            log.warning("%s", line)
        if checkpoint is None:
            return None
        if problem is None:
            return ranks.by_main(functools.partial(_made_ready, run, checkpoint, facts))


def unreadable(checkpoint: Path, ranks: Ranks) -> str | None:
    """What is wrong with a file whose bytes are those that were written, but which nothing can read; None if none is.

    Opens each file as the trainer and the engine will, before there is an engine that could be left half loaded; tensors
    are mapped, not read. Every process must call it: each opens a share, and all learn the answer.
    """
    # Those that were saved: half a universal copy, of an attempt that was killed while it made one, is no damage.
    saved = sorted(read_json(checkpoint / MANIFEST)["files"])
    files = [path for path in map(checkpoint.joinpath, saved) if path.name not in NOT_LOADED]
    found = None
    for path in files[ranks.rank :: ranks.size]:
        try:
            _open(path, checkpoint)
        except MemoryError:
            raise
        except Exception as error:  # whatever pickles, tensors and archives raise
            first = (str(error).splitlines() or [""])[0][:200]
            found = f"{path.relative_to(checkpoint)} cannot be loaded: {type(error).__name__}: {first}"
            break
    return next((it for it in ranks.everyones(found) if it is not None), None)


def _open(path: Path, checkpoint: Path) -> None:
    """Raises what the library that reads this kind of file raises, or ValueError for one that holds something else."""
    import torch
    from safetensors import safe_open
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    if path.suffix == ".json":
        content = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "trainer_state.json" and f"checkpoint-{content['global_step']}" != checkpoint.name:
            raise ValueError(f"it is of step {content['global_step']}")
    elif path.suffix == ".safetensors":
        with safe_open(str(path), framework="pt") as tensors:
            tensors.keys()
    elif path.name == ".metadata":
        FileSystemReader(path.parent).read_metadata()
    elif path.suffix in (".pt", ".pth"):
        # Written by this run: as DeepSpeed and transformers read it.
        content = torch.load(path, map_location="cpu", weights_only=False, mmap=zipfile.is_zipfile(path))
        wanted = next((keys for pattern, keys in HOLDS.items() if fnmatch.fnmatch(path.name, pattern)), set())
        if not isinstance(content, dict) or wanted - content.keys():
            raise ValueError(f"it does not hold {', '.join(sorted(wanted))}")


def _made_ready(run: RunDir, checkpoint: Path, facts: dict[str, Any]) -> Resume:
    manifest = read_json(checkpoint / MANIFEST)
    accepted = accepted_change(run, manifest, facts)
    refuse_other_run(checkpoint.name, {**manifest, **{name: facts[name] for name in accepted or ()}}, facts)
    if accepted:
        log.warning("%s was trained with other %s; accepted: %s", checkpoint.name, " and ".join(accepted), accepted)
    refuse_uncuttable(checkpoint.name, manifest, facts)
    universal.discard(checkpoint)  # of an attempt that ended before it had loaded it
    if not cut_anew(manifest, facts):
        log.info("resuming from %s", checkpoint.name)
        return Resume(checkpoint, accepted=accepted)
    universal.convert(checkpoint, was=manifest["plan"], now=facts["plan"], processes=facts["world_size"])
    log.info(
        "resuming from %s: shards of %s on %d processes, cut anew for %s on %d",
        *(checkpoint.name, manifest["plan"], manifest["world_size"], facts["plan"], facts["world_size"]),
    )
    return Resume(checkpoint, universal=True, accepted=accepted)


def cut_anew(manifest: dict[str, Any], facts: dict[str, Any]) -> bool:
    """Whether a checkpoint is in shards that the processes of now cannot load as they are.

    FSDP2 cuts its own for any number of processes when it loads them.
    """
    names = ("plan", "world_size")
    return manifest.get("plan") in DEEPSPEED and any(manifest.get(name) != facts[name] for name in names)


def accepted_change(run: RunDir, manifest: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any] | None:
    """What has changed since the checkpoint and was accepted, field -> [was, now]; None if nothing has, or it was not.

    The first attempt after `--accept-change` puts down what it was for; attempts that start again from the same
    checkpoint, after a requeue, need no new word, and another change does.
    """
    asked, changed = read_json(run.path / ACCEPTED), changed_fields(manifest, facts, OF_RUN)
    if asked is None or not changed:
        return None
    if asked.get("changed") is None:
        write_json(run.path / ACCEPTED, {"time": utc_now(), "step": manifest.get("step"), "changed": changed})
        return changed
    return changed if changed == asked["changed"] else None


def changed_fields(manifest: Mapping[str, Any], facts: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """field -> [was, now] of those that differ; what an older version did not put down counts as unchanged."""
    known = [name for name in names if name in facts and (name in manifest or name in ("data", *OF_FILES))]
    return {name: [manifest.get(name), facts[name]] for name in known if manifest.get(name) != facts[name]}


def refuse_other_run(name: str, manifest: dict[str, Any], facts: dict[str, Any]) -> None:
    """CheckpointError if the checkpoint's files mean something else to the plan, the data or the dtype of now."""
    of_run, of_files = changed_fields(manifest, facts, OF_RUN), changed_fields(manifest, facts, OF_FILES)
    if any(manifest.get("plan") in alike and facts["plan"] in alike for alike in (WHOLE, DEEPSPEED)):
        of_files.pop("plan", None)
    changed = {**of_run, **of_files}
    if changed:
        was, now = ([pair[place] for pair in changed.values()] for place in (0, 1))
        hint = "restore what it was, or start a new run with run.name=ANOTHER_NAME"
        if not of_files:
            hint = "restore what it was, start a new run with run.name=ANOTHER_NAME, or resume with --accept-change"
        raise CheckpointError(f"{name} was trained with other {' and '.join(changed)}: {was}, now {now}", hint=hint)


def refuse_uncuttable(name: str, manifest: dict[str, Any], facts: dict[str, Any]) -> None:
    """CheckpointError where DeepSpeed 0.19.8 cannot load the shards of `manifest` for the processes of `facts`.

    docs/decisions.md (2026-11-22) has the evidence for each case.
    """
    if manifest.get("plan") not in DEEPSPEED:
        return
    was, now = ({**_ALONE, **values} for values in (manifest, facts))
    cut = cut_anew(manifest, facts)
    why, hint = "", "restore plan, processes and parallel of before, or start a new run with run.name=ANOTHER_NAME"
    # engine.py, load_checkpoint: what is on NVMe are files of each process, copied as they are.
    on_disk = [values["offload"] == "nvme" for values in (was, now)]
    if any(on_disk) and (cut or not all(on_disk)):
        why = "DeepSpeed reads optimizer states on NVMe back only as the processes left them"
    elif cut and {was["sequence_parallel_size"], now["sequence_parallel_size"]} != {1}:
        why, hint = _shared_rows(was, now) or ("", hint)
    if why:
        raise CheckpointError(f"{name} was saved by {_told(was)}, now it is {_told(now)}: {why}", hint=hint)


_ALONE = {"offload": "none", "sequence_parallel_size": 1, "gradient_accumulation_steps": 1}


def _shared_rows(was: dict[str, Any], now: dict[str, Any]) -> tuple[str, str] | None:
    """Why a checkpoint cannot be cut anew where processes share rows, and what to do; None if it can."""
    size, field = was["sequence_parallel_size"], "parallel.sequence_parallel_size"
    before = f"resume with plan {was['plan']}, {was['world_size']} process(es) and {field}={size}"
    if size != now["sequence_parallel_size"]:
        return f"{field} cannot change together with plan or processes", before
    if (was["plan"], now["plan"]) != ("zero3", "zero3"):
        # The engine writes the groups that share rows into the checkpoint as tensor parallelism.
        return "where processes share rows, DeepSpeed's tool cuts only zero3 anew", before
    # Each process brings a batch that its group then computes in turn; a step that ends between the turns has other rows
    # where there are more groups.
    if any(values["gradient_accumulation_steps"] % size for values in (was, now)):
        told = f"a step has the same rows only if gradient accumulation is a multiple of {field}={size}"
        return told, f"{before}, or choose a smaller train.per_device_train_batch_size"
    return None


def _told(values: dict[str, Any]) -> str:
    given = [f"offload={values['offload']}"] if values["offload"] != "none" else []
    if values["sequence_parallel_size"] > 1:
        given.append(f"sequence_parallel_size={values['sequence_parallel_size']}")
        given.append(f"gradient accumulation {values['gradient_accumulation_steps']}")
    return f"{values['world_size']} process(es) of {', '.join([values['plan'], *given])}"
