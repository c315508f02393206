"""The package in a notebook or a script: load a model, look at the data, ask, train, compare.

    import sft_dist

    base = sft_dist.load("embedded:smollm2-135m")
    sft_dist.ask(base, "Calculate 1+1-1")
    config = sft_dist.load_config("tutorial", ["train.max_steps=20"])
    sft_dist.preview(config)
    run = sft_dist.fine_tune(config)
    sft_dist.compare(run)

`train` is a package here, hence fine_tune. Everything is what the commands do, so a run that is trained here can be looked at, resumed and reported there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from sft_dist.config.loader import LoadedConfig, load_config, load_run_config
from sft_dist.config.problems import validate
from sft_dist.config.schema import Config, GenerationConfig
from sft_dist.errors import ConfigError
from sft_dist.files import read_json
from sft_dist.rundir import RunDir, find_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sft_dist.evaluate.generate import Prompt

__all__ = ["Assistant", "ask", "compare", "fine_tune", "load", "load_config", "preview"]


@dataclass(frozen=True)
class Assistant:
    """A model that answers, with its tokenizer and the config that says how it is asked."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: Config


def load(source: str | os.PathLike[str] | LoadedConfig | RunDir) -> Assistant:
    """A model ready to answer: of a run its final one, of a config its base model, else the model of this name.

    A name is what `model.name` takes: embedded:smollm2-135m, a folder, a name on the Hub; a run's folder is the run. A tokenizer without a chat template
    gets one (`model.chat_template`). Raises ConfigError or PreflightError if there is no such model, CheckpointError if the
    run has no final model yet.
    """
    from sft_dist.evaluate.compare import load_for
    from sft_dist.parallel.resolve import one_process
    from sft_dist.train.settle import resolve_here

    if isinstance(source, str | os.PathLike) and RunDir(Path(source)).config.is_file():
        source = RunDir(Path(source))
    run = source if isinstance(source, RunDir) else RunDir(Path())
    if isinstance(source, RunDir):
        config = load_run_config(source.config)
    elif isinstance(source, LoadedConfig):
        config = source.config
    else:
        config = _config_of(source)
    loaded = load_for(
        config, run, resolve_here(one_process(config)), "after" if isinstance(source, RunDir) else "before"
    )
    return Assistant(loaded.model, loaded.tokenizer, config)


def _config_of(name: str | os.PathLike[str]) -> Config:
    """The config of a model that no config names. Raises ConfigError for what can be no model's name."""
    config, problems = validate({"model": {"name": os.fspath(name) if isinstance(name, os.PathLike) else name}})
    if config is None or problems:
        raise ConfigError("there is no such model", problems=[problem.line for problem in problems])
    return config


def ask(assistant: Assistant, questions: Prompt | Iterable[Prompt], **generation: Any) -> str | list[str]:
    """The answer to one question, or a list of the answers to several, as text without special tokens.

    A question is a text, or a conversation as a list of messages. A text is asked as a user's message, behind the config's
    system message if it has one. `generation` changes fields of the config's `evaluate.generation`, such as max_new_tokens.
    Raises ConfigError for a field that it has not, or a value that a field cannot have.
    """
    from sft_dist.evaluate.generate import generate

    if isinstance(questions, Mapping):
        raise ConfigError(
            "a single message was asked", hint="a conversation is a list of messages: ask(model, [message])"
        )
    several: list[Any] = [questions] if isinstance(questions, str) else list(questions)
    conversation = bool(several) and isinstance(several[0], Mapping)
    if conversation:
        several = [several]
    alone = conversation or isinstance(questions, str)
    given = assistant.config.evaluate.generation
    if unknown := generation.keys() - set(GenerationConfig.model_fields):
        raise ConfigError(
            f"evaluate.generation has no {', '.join(sorted(unknown))}",
            hint=f"it has {', '.join(GenerationConfig.model_fields)}",
        )
    try:
        options = GenerationConfig.model_validate({**given.model_dump(), **generation})
    except ValidationError as error:
        wrong = [
            f"{'.'.join(map(str, it['loc']))}: {it['msg']}, and {it['input']!r} was given" for it in error.errors()
        ]
        raise ConfigError("evaluate.generation cannot be as it was asked for", problems=wrong) from None
    system = assistant.config.evaluate.system or assistant.config.data.system
    opening = [{"role": "system", "content": system}] if system else []
    prompts = [[*opening, {"role": "user", "content": one}] if isinstance(one, str) else one for one in several]
    answers = generate(assistant.model, assistant.tokenizer, prompts, options)
    return answers[0] if alone else answers


def preview(config: LoadedConfig, rows: int = 3, row: int = 1) -> None:
    """Show the first rows, and the tokens of one, coloured by whether they are trained; in a notebook as HTML."""
    from rich.console import Console

    from sft_dist.data_here import preview_here

    console = Console(highlight=False)
    for part in preview_here(config.config, rows, row):
        console.print(part)


def fine_tune(config: LoadedConfig, *, overwrite: bool = False) -> RunDir:
    """Ask before, train, ask after, write the report: `sft-dist train`. Returns the run's directory.

    Several GPUs, if the config's plan takes them, are processes of their own. Raises what a run can fail with: ConfigError,
    DataError, RunStopped (Ctrl-C, or Interrupt in a notebook: go on with `sft-dist resume`), SftDistError.
    """
    from sft_dist.stages import new_run, run_here

    run = new_run(config, overwrite=overwrite)
    run_here(run)
    return run


def compare(run: RunDir | str | os.PathLike[str]) -> dict[str, Any]:
    """Show answers and scores before and after training; returns what scores.json holds, {} if nothing was scored."""
    from rich.console import Console

    from sft_dist.report.tables import result_tables

    found = run if isinstance(run, RunDir) else find_run(os.fspath(run))
    tables = result_tables(found)
    if not tables:
        raise ConfigError(
            f"run {found.name} was asked nothing", hint="set evaluate.questions or evaluate.data, and train it again"
        )
    console = Console(highlight=False)
    for table in tables:
        console.print(table)
    return read_json(found.scores) or {}
