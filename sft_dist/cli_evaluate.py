"""`sft-dist evaluate RUN`: a run's models are asked what they were not asked yet, and what the command line adds to that."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sft_dist.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from sft_dist.config.schema import Config
    from sft_dist.parallel.resolve import Resolved
    from sft_dist.rundir import RunDir

log = logging.getLogger(__name__)


def evaluated(
    name: str, overrides: Sequence[str], *, before: bool = False, again: bool = False, flags: Sequence[str] = ()
) -> RunDir:
    """The run, once its tuned model (`before`: its base model) is asked and scored by its config with `overrides`.

    The base model is asked as well where it was before, and lacks a set or would be compared under other settings. Goes on
    inside of the run's image if it has one, with `flags`.
    """
    from sft_dist.config.loader import load_run_config
    from sft_dist.config.resubmit import with_evaluate
    from sft_dist.evaluate.compare import base_lacks, wants_evaluation
    from sft_dist.evaluate.tracked import tell_trackers
    from sft_dist.jobs.container_probe import enter_image
    from sft_dist.parallel.resolve import one_process
    from sft_dist.rundir import find_run
    from sft_dist.stages import evaluate_here, report_here
    from sft_dist.train.settle import needs_packages, resolve_here

    run = find_run(name)
    recorded = load_run_config(run.config)
    config = with_evaluate(recorded, overrides)
    enter_image(config, ["evaluate", str(run.path.absolute()), *overrides, *flags], run.path.absolute().parent)
    if not wants_evaluation(config):
        raise ConfigError(
            f"run {run.name} asks nothing: it has no evaluate.questions, data or sets",
            hint=f"sft-dist evaluate {shlex.quote(name)} 'evaluate.sets=[{{name: mine, data: rows.jsonl}}]'",
        )
    resolved = resolve_here(one_process(config))
    needs_packages(config, resolved)
    if overrides:
        _take(run, recorded, config, before=before)
    evaluate_here(config, run, resolved, "before" if before else "after", again=again)
    lacking = base_lacks(config, run)
    if not before and (lacking or (overrides and (run.eval / "before.jsonl").is_file() and config.evaluate.before)):
        _ask_base(config, run, resolved, lacking)
    report_here(run)
    tell_trackers(config, run)
    return run


def _ask_base(config: Config, run: RunDir, resolved: Resolved, lacking: Sequence[str]) -> None:
    from sft_dist.stages import evaluate_here

    why = f"was not asked {', '.join(lacking)}" if lacking else "is compared under the same settings"
    log.info("the base model %s, so it is asked as well; what it has answered is not asked again", why)
    evaluate_here(config, run, resolved, "before")


def _take(run: RunDir, recorded: Config, config: Config, *, before: bool) -> None:
    """Put the changed config and the rows of new sets into the run, once it is known that they can be asked."""
    from sft_dist.config.loader import fields, write_config
    from sft_dist.evaluate.harness import prove_tasks
    from sft_dist.evaluate.held_out import check_rows, missing_rows, read_held_out, write_held_out
    from sft_dist.files import read_json, write_json, write_text
    from sft_dist.jobs.admission import refuse_live
    from sft_dist.train.tokenizer import load_tokenizer

    if not before and not (run.model / "DONE").is_file():
        raise CheckpointError(
            f"run {run.name} has no final model (state: {run.read_status().get('state', 'unknown')})",
            hint=f"finish the training first: sft-dist resume {run.quoted}; --before asks the base model",
        )
    refuse_live(run)
    tokenizer = load_tokenizer(config.model).tokenizer
    added = missing_rows(config, run, tokenizer)
    _refuse_other_rows(recorded, config, set(added))
    for spec in config.evaluate.all_sets:
        if spec.name not in added:
            check_rows(config, spec, read_held_out(run, spec.name), tokenizer)
    prove_tasks(config)
    write_held_out(run, added)
    known = dict(fields(recorded))
    origins = {".".join(path): "cli" for path, value in fields(config) if known.get(path, ...) != value}
    if isinstance(provenance := read_json(run.provenance), dict):
        write_json(run.provenance, {**provenance, **origins})
    write_text(run.config, write_config(config))


def _refuse_other_rows(recorded: Config, config: Config, added: set[str]) -> None:
    """ConfigError for a set whose rows are kept and would be others now: before and after are scored on the same ones."""
    from sft_dist.evaluate.held_out import system_of

    old = {spec.name: (spec.data, system_of(recorded, spec)) for spec in recorded.evaluate.all_sets}
    for spec in config.evaluate.all_sets:
        if spec.name in old and spec.name not in added and old[spec.name] != (spec.data, system_of(config, spec)):
            raise ConfigError(
                f"the rows of the set {spec.name} are kept in the run, and its data or system message would be another",
                hint="add a set of another name to evaluate.sets, beside those that are there",
            )
