"""Ask a model the run's questions and the rows of its sets, and score what it says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sft_dist.config.schema import Config, SetConfig
from sft_dist.data.example import Example, expected_answer
from sft_dist.evaluate.asked import Asked, prompts_at_once
from sft_dist.evaluate.compare import Loaded
from sft_dist.evaluate.held_out import prompt_of
from sft_dist.evaluate.metrics import RowScores, Scorer, first_score


def ask(config: Config, loaded: Loaded, asked: Asked | None = None) -> list[dict[str, Any]]:
    """A row for each of the config's questions."""
    from sft_dist.evaluate.generate import generate

    evaluate = config.evaluate
    if not evaluate.questions:
        return []
    system = evaluate.system or config.data.system
    opening = [{"role": "system", "content": system}] if system else []
    prompts = [[*opening, {"role": "user", "content": question}] for question in evaluate.questions]
    answers = generate(loaded.model, loaded.tokenizer, prompts, evaluate.generation, asked)
    return [
        {"kind": "question", "prompt": prompt, "answer": answer}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def score_set(
    config: Config, loaded: Loaded, spec: SetConfig, examples: Sequence[Example], asked: Asked | None = None
) -> list[dict[str, Any]]:
    """A row for each of the set's: what was asked, expected and answered, and its scores by name."""
    scorer = Scorer(spec, examples)
    said = answer_set(config, loaded, spec, examples, asked)
    rows = []
    for index, example in enumerate(examples):
        answer = said.answers[index] if said.answers else None
        scores = scorer.score(example, answer) if answer is not None else RowScores()
        if said.by_answer:
            add_perplexity(scores, *said.by_answer[index])
        row = {
            "kind": "scored",
            "set": spec.name,
            "index": index,
            "category": example.fields.get(spec.category_field),
            "prompt": prompt_of(example),
            "expected": expected_answer(example).strip(),
            "answer": answer,
        }
        rows.append(row | _marks(row, said.by_label[index] if said.by_label else {}, scores, first_score(spec)))
    return rows


@dataclass(frozen=True)
class Said:
    """What a model has said to the rows of a set, in their order; [] of what the set does not ask."""

    answers: list[str]
    by_label: list[dict[str, float]]
    """The score of each label."""
    by_answer: list[tuple[float, int]]
    """The log-probability of the expected answer, and its tokens."""


def answer_set(
    config: Config, loaded: Loaded, spec: SetConfig, examples: Sequence[Example], asked: Asked | None = None
) -> Said:
    """Ask the model all that the set wants to know."""
    from sft_dist.evaluate.generate import generate
    from sft_dist.evaluate.likelihood import answer_logprobs, label_logprobs

    options, (model, tokenizer) = config.evaluate.generation, (loaded.model, loaded.tokenizer)
    if spec.max_new_tokens is not None:
        options = options.model_copy(update={"max_new_tokens": spec.max_new_tokens})
    prompts, thinking = [prompt_of(row) for row in examples], options.enable_thinking
    size = prompts_at_once(options, generates_on_gpu=False)
    answers: list[str] = []
    by_label: list[dict[str, float]] = []
    by_answer: list[tuple[float, int]] = []
    if Scorer(spec, examples).wants_answers:
        answers = generate(model, tokenizer, prompts, options, asked)
    if spec.labels:
        by_label = label_logprobs(model, tokenizer, prompts, spec.labels, size, thinking, asked)
    if "perplexity" in spec.metrics:
        expected = [expected_answer(row).strip() for row in examples]
        by_answer = answer_logprobs(model, tokenizer, prompts, expected, size, thinking, asked)
    return Said(answers, by_label, by_answer)


def add_perplexity(scores: RowScores, logprob: float, tokens: int) -> None:
    """Note the perplexity of an expected answer of so many tokens whose log-probabilities add up to `logprob`."""
    scores.values["perplexity"] = math.exp(min(700.0, -logprob / tokens))
    scores.counts["perplexity"] = [-logprob, float(tokens)]


def _marks(row: dict[str, Any], labels: dict[str, float], scores: RowScores, first: str) -> dict[str, Any]:
    """What a row says of how good it is: its scores, and whether answer and likeliest label are right."""
    best = max(labels, key=lambda label: labels[label]) if labels else None
    if best is not None:
        scores.values["label"] = float(best == row["expected"])
    chief = scores.values.get("exact", scores.values.get(first))
    return {
        "exact_match": bool(chief) if chief in (0.0, 1.0) and row["answer"] is not None else None,
        "predicted_label": best,
        "label_correct": None if best is None else best == row["expected"],
        "label_logprobs": {label: round(value, 6) for label, value in labels.items()} or None,
        "scores": {name: round(value, 6) for name, value in scores.values.items()},
        **({"counts": scores.counts} if scores.counts else {}),
    }
