"""The worker: trains the run that a directory describes. It reads config.yaml there and nothing else.

The steps, in order: load the tokenizer, prepare the rows, load the model, train (resuming if there is a complete
checkpoint), publish the final model.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from sft_dist.config.loader import load_run_config
from sft_dist.config.schema import Config
from sft_dist.errors import CheckpointError, ConfigError, PreflightError, RunStopped
from sft_dist.files import read_json, write_json
from sft_dist.parallel.machine import this_machine
from sft_dist.parallel.resolve import Resolved, resolve, with_longest_row
from sft_dist.rundir import RunDir
from sft_dist.train.attempt import Attempt
from sft_dist.train.cpu import settle_cpu
from sft_dist.train.environment import environment
from sft_dist.train.progress import Progress

log = logging.getLogger(__name__)


def train(run: RunDir, current: Attempt, resolved: Resolved) -> None:
    """Train `run` to its end and leave its model in model/.

    Raises RunStopped after a requested stop, with a checkpoint saved; ConfigError, DataError or PreflightError before
    the first step.
    """
    config = load_run_config(run.config)
    from sft_dist.data.prepare import prepare
    from sft_dist.train.attention import register
    from sft_dist.train.callbacks import RunRecorder, trackers
    from sft_dist.train.model import load_model
    from sft_dist.train.pretrained import cache_root
    from sft_dist.train.publish import publish_model
    from sft_dist.train.tokenizer import load_tokenizer
    from sft_dist.train.trainer import build_trainer

    register()
    tokens = load_tokenizer(config.model)
    prepared = prepare(config, tokens.tokenizer, tokens.template, cache_root())
    write_json(run.ledger, prepared.ledger)
    log.info("%s", summary(prepared.ledger))
    refined = with_longest_row(config, resolved, prepared.ledger["train"]["longest_row"])
    if refined is not resolved:
        for line in refined.decisions[len(resolved.decisions) :]:
            log.info("%s", line)
        resolved = refined
        write_json(run.env, environment(this_machine(), resolved))
    model = load_model(config.model, tokens, dtype=resolved.dtype, attn_implementation=resolved.attn_implementation)
    facts = {"plan": resolved.plan, "world_size": 1, "data": prepared.ledger["key"], "dtype": resolved.dtype}
    progress = Progress()
    recorder = RunRecorder(run, config, current.stop, progress, facts)
    callbacks = [recorder, *trackers(config, run)]
    trainer = build_trainer(config, resolved, run, model, tokens.tokenizer, prepared, callbacks)
    checkpoint = _resume_from(run, facts)
    with current.stop.deferred():
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            progress.end()
        step = trainer.state.global_step
        current.facts.update(first_step=recorder.first_step, last_step=step)
        if step < trainer.state.max_steps:
            raise RunStopped(f"stopped by {current.stop.reason} at step {step}, saved as checkpoint-{step}")
        publish_model(run, config, trainer.model, tokens.tokenizer)
    if current.stop.reason:  # asked during the last step or the publishing: both are done
        raise RunStopped(f"stopped by {current.stop.reason} after the last step; the model is complete")


def resolve_here(config: Config) -> Resolved:
    """Decide every `auto` on this machine, and settle its threads and visible GPU for this process.

    Must run before torch is imported: it reads the visible GPUs and the threads' settings once.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but parallel.plan {config.parallel.plan!r} is one process",
            hint="start it with `sft-dist train CONFIG` or `python -m sft_dist.train CONFIG`",
        )
    resolved = resolve(config, this_machine())
    if resolved.plan == "single":
        # TRL refuses several visible GPUs in one process, since Trainer would wrap the model in DataParallel.
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if resolved.plan == "cpu":
        settle_cpu()
    import torch

    from sft_dist.train.quiet import quiet_libraries

    quiet_libraries()
    if resolved.plan == "single" and not torch.cuda.is_available():
        raise PreflightError(
            f"nvidia-smi lists a GPU, but this torch ({torch.__version__}) cannot use it",
            hint="install a CUDA build of torch that fits the driver, or set parallel.plan=cpu",
        )
    if resolved.plan == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(resolved.num_threads)
    return resolved


def record_environment(run: RunDir, resolved: Resolved) -> None:
    """Write env.json and log what `auto` was decided to be."""
    write_json(run.env, environment(this_machine(), resolved))
    for line in resolved.decisions:
        log.info("%s", line)


def summary(ledger: dict[str, Any]) -> str:
    """The ledger in one line."""
    train = ledger["train"]
    share = 100 * train["trained_tokens"] / train["tokens"]
    dropped = sum(value for name, value in train.items() if name.startswith("dropped"))
    return (
        f"data: {train['rows']} rows, {train['tokens']} tokens, {share:.1f}% trained; "
        f"{train['truncated_rows']} rows cut, {dropped} dropped; {ledger['template']}"
    )


def _resume_from(run: RunDir, facts: dict[str, Any]) -> str | None:
    from sft_dist.train.checkpoint import MANIFEST, newest_complete

    checkpoint, torn = newest_complete(run)
    for line in torn:
        log.warning("%s", line)
    if checkpoint is None:
        return None
    manifest = read_json(checkpoint / MANIFEST)
    changed = [name for name in ("data", "dtype") if manifest.get(name) != facts[name]]
    if changed:
        raise CheckpointError(
            f"{checkpoint.name} was trained with other {' and '.join(changed)}: {[manifest.get(n) for n in changed]}, "
            f"now {[facts[n] for n in changed]}",
            hint="restore what it was, or start a new run with run.name=ANOTHER_NAME",
        )
    log.info("resuming from %s", checkpoint.name)
    return str(checkpoint)
