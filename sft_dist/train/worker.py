"""The worker: trains the run that a directory describes, by the config that was read there.

The steps, in order: load the tokenizer, prepare the rows, load the model, train (resuming if there is a complete
checkpoint), publish the final model. Several workers of one launcher take the same steps together; what is written once
is written by the main one.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError, DataError, PreflightError, RunStopped, SftDistError
from sft_dist.files import told_by, write_json
from sft_dist.parallel.machine import this_machine
from sft_dist.parallel.resolve import Resolved, with_rows
from sft_dist.parallel.world import unlaunched
from sft_dist.rundir import RunDir
from sft_dist.train.attempt import Attempt
from sft_dist.train.heartbeat import phase
from sft_dist.train.progress import Progress
from sft_dist.train.ranks import Ranks, tell_deepspeed
from sft_dist.train.settle import as_main, record_refined

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, TrainerCallback

    from sft_dist.data.prepared import Prepared
    from sft_dist.train.callbacks import RunRecorder
    from sft_dist.train.health import Health
    from sft_dist.train.saving import Saves
    from sft_dist.train.tokenizer import RunTokenizer

log = logging.getLogger(__name__)


def train(
    run: RunDir, current: Attempt, resolved: Resolved, ranks: Ranks, asking: Sequence[TrainerCallback] = ()
) -> None:
    """Train `run` to its end and leave its model in model/.

    `asking` are callbacks that ask the model between steps; each gets the trainer as its `trainer`.

    Raises RunStopped after a requested stop, with a checkpoint saved; ConfigError, DataError or PreflightError before
    the first step.
    """
    config = resolved.config
    from sft_dist.train.after_resume import CutAnew, LateEvaluation
    from sft_dist.train.arguments import sft_config
    from sft_dist.train.callbacks import RunRecorder
    from sft_dist.train.environment import run_facts
    from sft_dist.train.forecast import write_forecast
    from sft_dist.train.health import Health
    from sft_dist.train.publish import publish_model
    from sft_dist.train.resume import resume_from
    from sft_dist.train.tokenizer import load_tokenizer
    from sft_dist.train.trackers import missed_rows, trackers
    from sft_dist.train.trainer import build_trainer

    tokens = load_tokenizer(config.model)
    prepared = _prepare(run, config, tokens, ranks)
    resolved = _refine(run, resolved, prepared.ledger, ranks)
    facts = run_facts(resolved, prepared.ledger["key"], tokens.template.training_text)
    resume = resume_from(run, facts, ranks)
    if resume is not None and resume.accepted:
        current.facts["accepted_change"] = resume.accepted
    _tell_libraries(resolved)
    health = Health(run, config, resolved, ranks)
    saves = _saves(run, resolved, facts, ranks, health)
    # Before the model: from here on transformers knows that each process keeps a share of it only.
    arguments = sft_config(config, resolved, run, has_eval=prepared.eval is not None, resume=resume)
    model = _model(resolved, tokens, ranks)
    rows = prepared.ledger["train"]
    forecast = write_forecast(run, config, resolved, this_machine(), rows) if ranks.is_main else None
    recorder = RunRecorder(run, config, current.stop, Progress(silent=not ranks.is_main), saves, ranks, forecast)
    cut = [CutAnew(resume.checkpoint, ranks)] if resume is not None and resume.universal else []
    asking = [LateEvaluation(run, ranks), *asking]
    told = trackers(config, run, resolved.facts()) if ranks.is_main else []
    callbacks = health.around([*asking, recorder, *told, *cut])
    trainer = health.attend(build_trainer(config, resolved, arguments, model, tokens.tokenizer, prepared, callbacks))
    trainer.saves = saves
    for callback in asking:
        callback.trainer = trainer
    with current.stop.deferred():
        try:
            trainer.train(resume_from_checkpoint=resume and str(resume.checkpoint))
        except ValueError as error:
            raise _disagreement(error) from None
        except Exception:
            saves.leave()
            raise
        finally:
            recorder.progress.end()
            step = trainer.state.global_step
            missed = missed_rows(recorder.metrics_lost, told)
            current.facts.update(first_step=recorder.first_step, last_step=step, **missed, **recorder.energy)
        if step < trainer.state.max_steps:
            raise _ended_early(step, trainer.state.max_steps, recorder)
        publish_model(run, config, resolved, trainer, tokens, ranks)
        asked = ranks.largest(current.stop.number)
        current.stop.agreed = ranks.size > 1  # a single process goes on, to ask the model
    if asked:  # during the last step or the publishing: both are done
        raise RunStopped("stopped after the last step; the model is complete")


def _ended_early(step: int, max_steps: int, recorder: RunRecorder) -> SftDistError:
    """Why the training is over before its last step."""
    if recorder.stopped_by is None:
        return SftDistError(f"the rows ended at step {step} of {max_steps}: a loader lost some")
    return RunStopped(recorder.stop_reason(step))


def _tell_libraries(resolved: Resolved) -> None:
    """What they must know before the model is loaded."""
    from sft_dist.train.attention import register

    register()
    if resolved.layout.plan.engine == "deepspeed":
        tell_deepspeed(use_cpu=resolved.use_cpu)
    if resolved.layout.plan.engine == "fsdp2":
        # transformers asks for it when it loads: only the main process then reads the weights.
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def _saves(run: RunDir, resolved: Resolved, facts: dict[str, Any], ranks: Ranks, health: Health) -> Saves:
    """The saves of the training, once it is known that the first one would fit: not after hours. DiskError if not."""
    from sft_dist.train.disk import look_for_room
    from sft_dist.train.saving import Saves

    need = look_for_room(run, resolved, ranks)
    return Saves(run, resolved.config.checkpoint, facts, ranks, need, health.save_took)


def _model(resolved: Resolved, tokens: RunTokenizer, ranks: Ranks) -> PreTrainedModel | PeftModel:
    """The model to train, as the plan's engine wants it."""
    from sft_dist.train.adapter import add_adapter
    from sft_dist.train.model import compile_layers, gather_by_layer, load_model

    config = resolved.config
    # Weights that an adapter leaves as they are need no float32 masters.
    dtype = resolved.loading_dtype if config.model.lora is None else resolved.dtype
    model = load_model(config.model, tokens, dtype, resolved.attn_implementation, ranks)
    if resolved.plan == "zero3":
        gather_by_layer(model)
    if resolved.compile_layers:
        compile_layers(model)
    if config.model.lora is not None:
        return add_adapter(model, config.model, tokens, plan=resolved.plan, seed=config.run.seed)
    return model


def _disagreement(error: ValueError) -> Exception:
    """`error`, in our words where transformers compared a user's DeepSpeed file with its own arguments: only now."""
    if "DeepSpeed config values that mismatch" not in str(error):
        return error
    differences = [line.removeprefix("- ") for line in str(error).splitlines() if line.startswith("- ")]
    hint = "hf is what the config asks for: change it (model.dtype, train), or write auto into the file"
    return ConfigError("the DeepSpeed file of the launch disagrees with the config", problems=differences, hint=hint)


def _prepare(run: RunDir, config: Config, tokens: RunTokenizer, ranks: Ranks) -> Prepared:
    """The tokenised rows, which all processes map; a process of its own makes them if they are not there yet."""
    from sft_dist.data.identity import data_key
    from sft_dist.data.prepared import check_limits, open_prepared, prepared_folder
    from sft_dist.train.pretrained import cache_root

    phase("prepare")

    def there() -> Prepared | None:
        return open_prepared(
            prepared_folder(cache_root(), data_key(config, tokens.tokenizer, tokens.template, cache_root()))
        )

    if ranks.by_main(lambda: there() is None):
        ranks.by_main(lambda: _prepare_elsewhere(run))
    made = there()
    if made is None:
        raise DataError("the rows were prepared, and are not there", hint="is the cache on a disk that all nodes see?")
    check_limits(config.data.limits, made.ledger)
    if ranks.is_main:
        write_json(run.ledger, made.ledger)
        log.info("%s", summary(made.ledger))
    return made


def _prepare_elsewhere(run: RunDir) -> None:
    """Have the rows prepared by a process that no launcher knows; its errors are raised here."""
    command = [sys.executable, "-m", "sft_dist.data_here", str(run.config)]
    done = subprocess.run(command, env=unlaunched(), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        told = {"message": f"preparing the rows ended with status {done.returncode}", **told_by(done.stdout)}
        kinds = {kind.exit_code: kind for kind in (SftDistError, ConfigError, PreflightError, DataError)}
        error = kinds.get(done.returncode, SftDistError)(told["message"], hint=told.get("hint"))
        error.kind = told.get("kind", error.kind)
        raise error


def _refine(run: RunDir, resolved: Resolved, ledger: dict[str, Any], ranks: Ranks) -> Resolved:
    """What the rows' real lengths change, as the main process sees it, on record."""
    phase("load")  # the rows are there, and the model is next
    refined = as_main(ranks, lambda: with_rows(resolved, this_machine(), ledger["train"]), resolved.num_threads)
    if ranks.is_main:
        record_refined(run, refined, resolved)
    return refined


def summary(ledger: dict[str, Any]) -> str:
    """The ledger in one line."""
    train = ledger["train"]
    share = 100 * train["trained_tokens"] / train["tokens"]
    dropped = sum(value for name, value in train.items() if name.startswith("dropped") and isinstance(value, int))
    weighted = train.get("weighted_rows", 0)
    weights = f"{weighted} rows with weights that add up to {train['trained_weight']:.6g}; " if weighted else ""
    special = train.get("special_token_rows", 0)
    spelled = f"{special} rows spell {', '.join(list(train['special_texts'])[:3])} in their words; " if special else ""
    thoughts = train.get("reasoning_left_out", 0)
    unthought = f"the template leaves out the reasoning of {thoughts} answers; " if thoughts else ""
    both = (ledger.get("eval") or {}).get("also_in_train", 0)
    twice = f"{both} held-out rows are trained as well; " if both else ""
    return (
        f"data: {train['rows']} rows, {train['tokens']} tokens, {share:.1f}% trained; "
        f"{weights}{spelled}{unthought}{twice}{train['truncated_rows']} rows cut, {dropped} dropped; {ledger['template']}"
    )
