"""The held-out rows of a run: read once from their sources, checked before a model is asked, and kept in the run."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from sft_dist.config.schema import Config, SetConfig
from sft_dist.data.example import Example, expected_answer, prompt_messages
from sft_dist.data.sources import load_examples
from sft_dist.errors import ConfigError, DataError
from sft_dist.files import read_jsonl, write_jsonl
from sft_dist.rundir import RunDir

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sft_dist.evaluate.generate import Prompt

log = logging.getLogger(__name__)


def held_out_rows(config: Config, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Example]]:
    """The rows of each set, read from their source; {} if the config has none.

    Raises DataError for a row that a metric cannot use or whose answer is not among the labels, ConfigError for a label
    that cannot be scored, for a function of the user's that cannot be called, and for a metric by which even the expected
    answers score nothing.
    """
    return {spec.name: _set_rows(config, spec, tokenizer) for spec in config.evaluate.all_sets}


def missing_rows(config: Config, run: RunDir, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Example]]:
    """The rows of each set that the run has none of: one that came into its config later. Raises what `held_out_rows` raises."""
    kept = {row.get("set", "data") for row in read_jsonl(run.held_out)} if run.held_out.is_file() else set()
    return {spec.name: _set_rows(config, spec, tokenizer) for spec in config.evaluate.all_sets if spec.name not in kept}


def complete_held_out(config: Config, run: RunDir, tokenizer: PreTrainedTokenizerBase) -> None:
    """Keep the rows of sets that the run has none of: all, where `python -m sft_dist.train CONFIG` made it."""
    if missing := missing_rows(config, run, tokenizer):
        write_held_out(run, missing)


def system_of(config: Config, spec: SetConfig) -> str | None:
    """The system message of a set's rows that have none."""
    return spec.system or config.evaluate.system or config.data.system


def _set_rows(config: Config, spec: SetConfig, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    examples = load_examples(spec.data, system=system_of(config, spec), on_bad_row=config.data.on_bad_row)[0]
    check_rows(config, spec, examples, tokenizer)
    return examples


def check_rows(
    config: Config, spec: SetConfig, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Score the expected answers against themselves. Raises what `held_out_rows` raises."""
    from sft_dist.evaluate.likelihood import candidate
    from sft_dist.evaluate.metrics import Scorer

    labels, thinking = spec.labels, config.evaluate.generation.enable_thinking
    field = "evaluate.labels" if spec.name == "data" else f"labels of the set {spec.name}"
    scorer, low = Scorer(spec, examples), Counter[str]()
    for example in examples:
        expected = expected_answer(example).strip()
        if labels and expected not in labels:
            raise DataError(
                f"{example.where}: the expected answer {expected!r} is not one of {field} {list(labels)}",
                hint="add it there, or score by other metrics only"
                if spec.name != "data"
                else "add it to evaluate.labels, or set evaluate.labels=[] to score by exact match only",
            )
        for label in labels:
            candidate(tokenizer, prompt_of(example), label, thinking, field)
        if "perplexity" in spec.metrics:
            candidate(tokenizer, prompt_of(example), expected, thinking, f"{example.where}, the expected answer")
        low.update(scorer.below_full_marks(scorer.score(example, expected)))
    for metric in scorer.nothing_to_reach(examples):
        low[metric] = len(examples)
    for metric, rows in low.items():
        _say_low(spec, metric, rows, len(examples))


def _say_low(spec: SetConfig, metric: str, rows: int, total: int) -> None:
    """ConfigError if no answer to the set can be right by this metric; else a warning."""
    what = f"the set {spec.name}: by the metric {metric} the expected answer itself does not score full marks"
    why = {
        "bleu": "BLEU counts runs of four words, and short answers have none",
        "chrf": "chrF counts letters and digits",
        "rouge": "ROUGE counts words, and text without letters and digits has none",
        "json": "NaN in JSON equals nothing",
    }.get(metric, "the rows hold what it cannot compare")
    if rows == total:
        raise ConfigError(
            f"{what}: {why}, so right answers would count as wrong",
            hint="score it by another metric: exact, contains, or chrf for text",
        )
    log.warning("%s in %d of %d rows: %s; right answers to these count as wrong", what, rows, total, why)


def prompt_of(example: Example) -> Prompt:
    """What a model is given of a held-out row: the messages before the last answer, or the plain prompt."""
    return list(prompt_messages(example)) if example.messages else str(example.prompt)


def write_held_out(run: RunDir, sets: Mapping[str, Sequence[Example]]) -> None:
    """Keep these sets' rows beside those that the run has: before and after are scored on the same ones, whenever that is."""
    if sets:
        kept = read_jsonl(run.held_out) if run.held_out.is_file() else []
        named = [({} if name == "data" else {"set": name}, row) for name, rows in sets.items() for row in rows]
        write_jsonl(run.held_out, [*kept, *({**name, **asdict(example)} for name, example in named)])


def read_held_out(run: RunDir, name: str = "data") -> list[Example]:
    """The rows of one set that `write_held_out` kept."""
    return [
        Example(**{**row, "messages": tuple(row["messages"]), "tools": tuple(row.get("tools", ()))})
        for row in read_jsonl(run.held_out)
        if row.pop("set", "data") == name
    ]
