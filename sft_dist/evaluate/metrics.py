"""The metrics of a set: what an answer scores against the expected one.

A metric gives each row one or more numbers by name. Most scores are means of them; BLEU, chrF and perplexity are made of
what all rows count together, so that a row keeps its counts, too.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from sft_dist.config.rules_evaluate import metric_of
from sft_dist.config.schema import SetConfig
from sft_dist.data.example import Example, expected_answer
from sft_dist.errors import ConfigError, DataError
from sft_dist.evaluate.answer_fields import json_scores, normalised, plain_scores
from sft_dist.evaluate.intervals import Reduce, mean, perplexity

Unit = Literal["share", "points", "number"]
# A sign right after a digit is that of a subtraction, a range or a date.
NUMBER = re.compile(r"(?:(?<!\d)[-+])?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
CORPUS = ("bleu", "chrf")
# Metrics that need no answer: they ask how likely the expected one is.
LIKELIHOODS = ("label", "perplexity")


@dataclass
class RowScores:
    """What one answer scores: a number for each name, None where the row has nothing to score."""

    values: dict[str, float] = field(default_factory=dict)
    counts: dict[str, list[float]] = field(default_factory=dict)
    """Of scores that are no means: what is summed over rows."""


def exact(answer: str, expected: str) -> dict[str, float]:
    """1 if the answer is the expected text, white space at the ends aside."""
    return {"exact": float(answer.strip() == expected.strip())}


def contains(answer: str, expected: str) -> dict[str, float]:
    """1 if the expected text stands somewhere in the answer; case, width of characters and runs of spaces do not count."""
    return {"contains": float(normalised(expected).casefold() in normalised(answer).casefold())}


def numeric(answer: str, expected: str) -> dict[str, float]:
    """1 if the last number of the answer is the last number of what is expected: `1,200.0` is `1200`.

    Raises ValueError if `expected` has no number.
    """
    wanted, given = _last_number(expected), _last_number(answer)
    if wanted is None:
        raise ValueError("the expected answer holds no number")
    return {"numeric": float(given == wanted)}


def _last_number(text: str) -> Decimal | None:
    found = NUMBER.findall(normalised(text).replace("\u2212", "-"))  # the minus sign of typeset text
    return Decimal(found[-1].replace(",", "")) if found else None


def _rouge(answer: str, expected: str) -> dict[str, float]:
    from sft_dist.evaluate.overlap import rouge_scores

    return rouge_scores(answer, expected)


TEXT: Mapping[str, Callable[[str, str], dict[str, float]]] = {
    "exact": exact,
    "contains": contains,
    "numeric": numeric,
    "json": json_scores,
    "fields": plain_scores,
    "rouge": _rouge,
}
# The name of a metric's first number, where it is not the metric's own: rows are sorted by it.
FIRST = {"json": "json_all", "fields": "fields_all", "rouge": "rougeL"}


class Scorer:
    """Scores the answers of one set."""

    def __init__(self, spec: SetConfig, examples: Sequence[Example]) -> None:
        """Raises ConfigError if a function of the user's cannot be imported."""
        self.spec = spec
        self.wants_answers = any(metric not in LIKELIHOODS for metric in spec.metrics)
        self._own = {metric: imported(metric) for metric in spec.metrics if ":" in metric}
        self._corpus: dict[str, Any] = {}
        if any(metric in CORPUS for metric in spec.metrics):
            from sft_dist.evaluate.overlap import CorpusMetric, bleu_tokenizer

            tokenize = bleu_tokenizer([expected_answer(row) for row in examples])
            self._corpus = {name: CorpusMetric(name, tokenize) for name in CORPUS if name in spec.metrics}

    def score(self, example: Example, answer: str) -> RowScores:
        """What `answer` scores by the metrics that look at it. Raises DataError for a row that a metric cannot use."""
        expected = expected_answer(example).strip()
        scores = RowScores()
        for metric in self.spec.metrics:
            if metric in TEXT:
                try:
                    scores.values |= TEXT[metric](answer, expected)
                except ValueError as error:
                    raise DataError(f"{example.where}: {error}, which the metric {metric} needs") from None
            elif metric in self._corpus:
                counts = self._corpus[metric].counts(answer, expected)
                scores.values |= self._one_row(metric, counts)
                scores.counts[metric] = counts
            elif metric in self._own:
                found = self._by_function(metric, answer, expected, example)
                if taken := sorted(found.keys() & scores.values.keys()):
                    raise ConfigError(
                        f"the metric {metric} gave a score {taken[0]}, and so did one before it, which would be lost",
                        hint=f"give the scores of a set's functions names of their own ({example.where})",
                    )
                scores.values |= found
        return scores

    def below_full_marks(self, scores: RowScores) -> Iterator[str]:
        """The metrics by which a row's expected answer, which has these scores, is not right; a corpus is judged as a whole."""
        for metric in self.spec.metrics:
            if metric in TEXT and scores.values[FIRST.get(metric, metric)] < 1 - 1e-9:
                yield metric

    def nothing_to_reach(self, examples: Sequence[Example]) -> Iterator[str]:
        """The metrics by which the expected answers of all rows together are not right."""
        import numpy as np

        texts = [expected_answer(example).strip() for example in examples]
        for name, metric in self._corpus.items():
            sums = np.asarray([metric.counts(text, text) for text in texts]).sum(0)
            if float(metric.scores(sums)) < 100 - 1e-6:
                yield name

    def _one_row(self, metric: str, counts: list[float]) -> dict[str, float]:
        import numpy as np

        return {metric: float(self._corpus[metric].scores(np.asarray(counts)))}

    def _by_function(self, metric: str, answer: str, expected: str, example: Example) -> dict[str, float]:
        try:
            found = self._own[metric](answer, expected, dict(example.fields))
            named = found if isinstance(found, Mapping) else {metric.rpartition(":")[2]: found}
            scores = {str(name): float(value) for name, value in named.items()}
        except Exception as error:
            raise ConfigError(
                f"the metric {metric} failed on {example.where}: {type(error).__name__}: {error}",
                hint="it is called with (answer, expected, row) and returns a number, or numbers by name",
            ) from error
        for name, value in scores.items():
            if not math.isfinite(value):
                raise ConfigError(
                    f"the metric {metric} gave {value} as {name} on {example.where}, which has no mean",
                    hint="return a finite number for every answer, an empty one, too; leave a name out of the dict where there is nothing to score",
                )
            if (ours := metric_of(name)) is not None:
                raise ConfigError(
                    f"the metric {metric} gave a score {name}, and scores of that name are those of {ours}",
                    hint=f"call it otherwise: my_{name}",
                )
        return scores


def imported(metric: str) -> Callable[..., Any]:
    """The function that `module:function` names; modules of the current folder are found, too. Raises ConfigError."""
    module, _, name = metric.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:
        raise ConfigError(
            f"the metric {metric} cannot be imported: {type(error).__name__}: {error}",
            hint="install its package, or put the module's folder into PYTHONPATH or start from there",
        ) from error
    if not callable(found):
        raise ConfigError(f"the metric {metric} cannot be used: {module} has no function {name}")
    return found  # type: ignore[no-any-return]


def reduction(name: str) -> Reduce:
    """How a set's score `name` comes from sums over rows. Functions of the user's cannot have the names of ours."""
    if name == "perplexity":
        return perplexity
    if name in CORPUS:
        from sft_dist.evaluate.overlap import CorpusMetric

        return CorpusMetric(name).scores
    return mean


def unit(name: str) -> Unit:
    """share: 0 to 1, of rows or fields; points: 0 to 100; number: anything else, what the user's functions give included."""
    metric = metric_of(name)
    if metric in CORPUS:
        return "points"
    return "share" if metric in ("exact", "contains", "numeric", "json", "fields", "label") else "number"


def higher_is_better(name: str) -> bool:
    return name != "perplexity"


@dataclass(frozen=True)
class Meaning:
    """How scores are put together from rows and read, by their names."""

    reduction: Callable[[str], Reduce]
    unit: Callable[[str], Unit]
    higher_is_better: Callable[[str], bool]


OURS = Meaning(reduction, unit, higher_is_better)
# Tasks of lm-evaluation-harness: their names are the harness's, and what is kept of their scores are means (harness.py).
TASKS = Meaning(
    lambda name: mean,
    lambda name: "share" if name.startswith("acc") or name.partition(".")[0] == "exact_match" else "number",
    lambda name: True,
)


def first_score(spec: SetConfig) -> str:
    """The score that the rows of a set are sorted by."""
    metric = spec.metrics[0]
    return FIRST.get(metric, metric.rpartition(":")[2])
