"""What must hold between the fields of a config."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sft_dist.config.rules_evaluate import evaluate_problems
from sft_dist.config.rules_parallel import parallel_problems
from sft_dist.config.rules_slurm import slurm_problems
from sft_dist.config.schema import SOURCES, Config, SourceConfig, SourcePart
from sft_dist.config.sft_fields import known_sft_fields, refused_extra
from sft_dist.config.spelling import Problem, did_you_mean, shown, suggest
from sft_dist.errors import ConfigError
from sft_dist.rundir import check_run_name

EMBEDDED_MODELS = ("embedded:smollm2-135m", "embedded:tiny")
CHAT_TEMPLATES = ("auto", "chatml", "plain")
# Fields of a data source that mean nothing for the other kind.
FOREIGN = {
    "a file or a dataset": ("rows", "seed", "language", "answer"),
    "a synthetic task": ("name", "split", "revision", "fields", "roles"),
    "several sources": (
        "rows",
        "seed",
        "language",
        "answer",
        "name",
        "split",
        "revision",
        "fields",
        "roles",
        "format",
        "weight",
    ),
}


def rule_problems(config: Config) -> list[Problem]:
    """Each contradiction between fields of `config`; [] if it holds together."""
    checks = (
        _names,
        _sources,
        _batch_sizes,
        _strategies,
        _shares,
        _rows,
        evaluate_problems,
        _extra,
        parallel_problems,
        slurm_problems,
    )
    return [problem for check in checks for problem in check(config)]


def _names(config: Config) -> Iterator[Problem]:
    if config.run.name is not None:
        try:
            check_run_name(config.run.name)
        except ConfigError as error:
            yield Problem("run.name", f"{shown(config.run.name)} cannot be a folder name; {error.hint}")
    name, template = config.model.name, config.model.chat_template
    if name.startswith("embedded:") and name not in EMBEDDED_MODELS:
        yield Problem("model.name", f"{shown(name)} is not one of {', '.join(EMBEDDED_MODELS)}")
    if template.endswith(".jinja"):
        if not Path(template).expanduser().is_file():
            yield Problem("model.chat_template", f"there is no file {shown(template)}")
    elif template not in CHAT_TEMPLATES:
        known = ", ".join(CHAT_TEMPLATES)
        guess = did_you_mean(template, CHAT_TEMPLATES)
        yield Problem(
            "model.chat_template", f"{shown(template)} is not one of {known}, nor the path of a .jinja file{guess}"
        )


def _sources(config: Config) -> Iterator[Problem]:
    """Fields of the other kind of source, which would be ignored."""
    places = [(f"{section}.{field}", getattr(getattr(config, section), field)) for section, field in SOURCES]
    places += [(f"evaluate.sets[{index}].data", it.data) for index, it in enumerate(config.evaluate.sets)]
    for where, source in places:
        several = source is not None and bool(source.sources)
        for index, part in enumerate(source.parts if source is not None else ()):
            kind = "a file or a dataset" if part.path else "a synthetic task"
            yield from _foreign_fields(part, where + f".sources[{index}]" * several, kind)
        if several:
            yield from _foreign_fields(source, where, "several sources")


def _foreign_fields(source: SourcePart, where: str, kind: str) -> Iterator[Problem]:
    for name in FOREIGN[kind]:
        if getattr(source, name) != SourceConfig.model_fields[name].default:
            use = "; use sample" if name == "rows" else "; set it in one of them" if kind == "several sources" else ""
            yield Problem(f"{where}.{name}", f"would be ignored, since the rows come from {kind}{use}")


def _batch_sizes(config: Config) -> Iterator[Problem]:
    """The sizes that do not divide; how many processes there are is known only where the config says so."""
    total, micro = config.train.global_batch_size, config.train.per_device_train_batch_size
    devices = _data_parallel_size(config)
    step = devices * (1 if micro == "auto" else micro)
    if total % step == 0:
        return
    totals = " or ".join(str(size) for size in (total // step * step, (total // step + 1) * step) if size)
    rests_on = ["parallel.num_processes", "parallel.sequence_parallel_size"] if devices > 1 else []
    how_many = f"{devices} device{'s' * (devices > 1)}"
    if micro == "auto":
        text = f"{total} is not divisible by {how_many}; use {totals}"
    else:
        rests_on = ["train.per_device_train_batch_size", *rests_on]
        micros = [size for size in range(1, total + 1) if total % (size * devices) == 0]
        nearest = sorted(sorted(micros, key=lambda size: abs(size - micro))[:4])
        text = f"{total} is not divisible by per_device_train_batch_size {micro} x {how_many} = {step}; use {totals}"
        if nearest:
            text += f", or per_device_train_batch_size {', '.join(map(str, nearest))} or auto"
    yield Problem("train.global_batch_size", text, tuple(rests_on))


def _data_parallel_size(config: Config) -> int:
    """Processes that see different rows, as far as the config knows: a run may have several times as many."""
    processes, shared = config.parallel.num_processes, config.parallel.sequence_parallel_size
    return processes // shared if processes != "auto" and processes % shared == 0 else 1


def _strategies(config: Config) -> Iterator[Problem]:
    train, save = config.train, config.checkpoint
    for section, kind, strategy, steps in (
        ("train", "eval", train.eval_strategy, train.eval_steps),
        ("checkpoint", "save", save.save_strategy, save.save_steps),
    ):
        field = f"{section}.{kind}_steps"
        rests_on = (f"{section}.{kind}_strategy",)
        if strategy == "steps" and steps is None:
            yield Problem(field, f"is not set, and {kind}_strategy is 'steps'; set it to a number of steps", rests_on)
        elif strategy != "steps" and steps is not None:
            problem = f"{steps} would be ignored, since {kind}_strategy is '{strategy}'; set {kind}_strategy=steps"
            yield Problem(field, problem, rests_on)
    if save.milestone_steps is not None and save.save_strategy != "steps":
        problem = f"{save.milestone_steps} would be ignored, since save_strategy is '{save.save_strategy}'; set save_strategy=steps"
        yield Problem("checkpoint.milestone_steps", problem, ("checkpoint.save_strategy",))
    elif save.milestone_steps is not None and save.save_steps and save.milestone_steps % save.save_steps:
        problem = f"{save.milestone_steps} is not a multiple of save_steps {save.save_steps}, so most of them would not be saved"
        yield Problem("checkpoint.milestone_steps", problem, ("checkpoint.save_steps",))
    if train.eval_strategy != "no" and config.data.eval is None and config.data.eval_size == 0:
        problem = f"'{train.eval_strategy}' needs rows to evaluate on; set data.eval, or data.eval_size above 0"
        yield Problem("train.eval_strategy", problem, ("data.eval", "data.eval_size"))
    if config.data.eval is not None and config.data.eval_size > 0:
        problem = f"{config.data.eval_size:g} would be ignored, since data.eval is set; set only one of them"
        yield Problem("data.eval_size", problem, ("data.eval",))


def _shares(config: Config) -> Iterator[Problem]:
    for path, value in (("data.eval_size", config.data.eval_size), ("train.warmup_steps", config.train.warmup_steps)):
        if value > 1 and not value.is_integer():
            yield Problem(path, f"{value:g} is neither a share (below 1) nor a whole number")


def _rows(config: Config) -> Iterator[Problem]:
    data = config.data
    if not data.assistant_only_loss and data.loss_on not in ("assistant", "all"):
        problem = f"'{data.loss_on}' would be ignored, since assistant_only_loss is false; take that out"
        yield Problem("data.loss_on", problem, ("data.assistant_only_loss",))
    if data.packing and config.parallel.sequence_parallel_size > 1:
        problem = "true cannot be combined with rows that several GPUs share (parallel.sequence_parallel_size): they know no documents"
        yield Problem("data.packing", problem, ("parallel.sequence_parallel_size",))
    if data.packing_overflow == "split" and not data.packing:
        yield Problem("data.packing_overflow", "'split' would be ignored, since packing is false", ("data.packing",))


def _extra(config: Config) -> Iterator[Problem]:
    for name in config.train.extra:
        refusal = refused_extra(name)
        if refusal is None and name not in known_sft_fields():
            refusal = f"is not a field of TRL's SFTConfig; {suggest(('train', 'extra', name))[0]}".rstrip("; ")
        if refusal is not None:
            yield Problem(f"train.extra.{name}", refusal)
