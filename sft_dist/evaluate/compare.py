"""Ask a model the run's questions and score it on the held-out rows; before and after training alike."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from sft_dist.config.schema import Config
from sft_dist.data.example import Example, expected_answer, prompt_messages
from sft_dist.data.sources import load_examples
from sft_dist.errors import CheckpointError, DataError
from sft_dist.files import read_jsonl, write_json, write_jsonl
from sft_dist.process import libraries_are_in
from sft_dist.rundir import RunDir

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sft_dist.evaluate.generate import Prompt
    from sft_dist.parallel.resolve import Resolved

log = logging.getLogger(__name__)
When = Literal["before", "after"]


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_for(config: Config, run: RunDir, resolved: Resolved, when: When) -> Loaded:
    """The base model (`before`) or the run's final one (`after`), on the plan's device.

    Both are loaded as the final one is published: whole, or in 4 bits if only an adapter to such weights is.

    Raises CheckpointError if the run has no final model yet.
    """
    from sft_dist.train.adapter import ADAPTER, with_adapter
    from sft_dist.train.model import load_model
    from sft_dist.train.tokenizer import load_tokenizer

    libraries_are_in()
    spec = config.model
    adapter_only = spec.lora is not None and not spec.lora.merge
    if not adapter_only:
        spec = spec.model_copy(update={"lora": None})
    if when == "after":
        if not (run.model / "DONE").is_file():
            raise CheckpointError(
                f"{run.name} has no final model (state: {run.read_status().get('state', 'unknown')})",
                hint=f"finish the training first: sft-dist resume {run.path}",
            )
        # Saved with the template that it was trained with, so `auto` finds that one again.
        trained: dict[str, Any] = {"tokenizer": str(run.model), "chat_template": "auto"}
        if not adapter_only:
            trained |= {"name": str(run.model), "tokenizer": None, "revision": None}
        spec = spec.model_copy(update=trained)
    tokens = load_tokenizer(spec)
    attention = "sdpa" if resolved.padding_free else resolved.attn_implementation
    model = load_model(spec, tokens, dtype=resolved.dtype, attn_implementation=attention)
    model = model.to("cpu" if resolved.use_cpu else "cuda")
    if adapter_only and when == "after":
        model = with_adapter(model, run.model / ADAPTER).get_base_model()
    return Loaded(model.eval(), tokens.tokenizer)


def evaluate_model(config: Config, run: RunDir, loaded: Loaded, when: When) -> None:
    """Write eval/WHEN.jsonl, and scores.json if there are held-out rows."""
    started = time.monotonic()
    if config.evaluate.data is not None and not run.held_out.is_file():
        # A run that `python -m sft_dist.train CONFIG` made, which evaluates nothing, has not kept them yet.
        write_held_out(run, held_out_rows(config, loaded.tokenizer))
    held_out = read_held_out(run)
    rows = _ask(config, loaded)
    rows += _score(config, loaded, held_out) if held_out else []
    write_jsonl(run.eval / f"{when}.jsonl", rows)
    log.info("%s training: %d answers in %.0f s", when, len(rows), time.monotonic() - started)
    if held_out:
        update_scores(run)


def update_scores(run: RunDir) -> None:
    """Write scores.json from eval/before.jsonl and eval/after.jsonl, as far as they are there."""
    from sft_dist.evaluate.score import summarise

    parts = {when: read_jsonl(run.eval / f"{when}.jsonl") for when in ("before", "after")}
    scored = {when: [row for row in rows if row["kind"] == "scored"] for when, rows in parts.items()}
    scores: dict[str, Any] = {when: summarise(rows) for when, rows in scored.items() if rows}
    scores["n"] = max(len(rows) for rows in scored.values())
    write_json(run.scores, scores)


def wants_evaluation(config: Config) -> bool:
    """Whether the config asks or scores anything at all."""
    return bool(config.evaluate.questions) or config.evaluate.data is not None


def held_out_rows(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The rows to score, read from their source; [] if the config has none.

    Raises DataError for a row whose answer is not among the labels, ConfigError for a label that cannot be scored.
    """
    from sft_dist.evaluate.likelihood import candidate

    source, labels = config.evaluate.data, config.evaluate.labels
    if source is None:
        return []
    system = config.evaluate.system or config.data.system
    examples = load_examples(source, system=system, on_bad_row=config.data.on_bad_row)[0]
    for example in examples:
        expected = expected_answer(example).strip()
        if labels and expected not in labels:
            raise DataError(
                f"{example.where}: the expected answer {expected!r} is not one of evaluate.labels {list(labels)}",
                hint="add it to evaluate.labels, or set evaluate.labels=[] to score by exact match only",
            )
        for label in labels:
            candidate(tokenizer, prompt_of(example), label, config.evaluate.generation.enable_thinking)
    return examples


def prompt_of(example: Example) -> Prompt:
    """What a model is given of a held-out row: the messages before the last answer, or the plain prompt."""
    return list(prompt_messages(example)) if example.messages else str(example.prompt)


def write_held_out(run: RunDir, examples: Sequence[Example]) -> None:
    """Keep the held-out rows in the run, so that before and after are scored on the same ones, whenever that is."""
    if examples:
        write_jsonl(run.held_out, [asdict(example) for example in examples])


def read_held_out(run: RunDir) -> list[Example]:
    """The rows that `write_held_out` kept."""
    rows = read_jsonl(run.held_out)
    return [
        Example(**{**row, "messages": tuple(row["messages"]), "tools": tuple(row.get("tools", ()))}) for row in rows
    ]


def _ask(config: Config, loaded: Loaded) -> list[dict[str, Any]]:
    from sft_dist.evaluate.generate import generate

    evaluate = config.evaluate
    if not evaluate.questions:
        return []
    system = evaluate.system or config.data.system
    opening = [{"role": "system", "content": system}] if system else []
    prompts = [[*opening, {"role": "user", "content": question}] for question in evaluate.questions]
    answers = generate(loaded.model, loaded.tokenizer, prompts, evaluate.generation)
    return [
        {"kind": "question", "prompt": prompt, "answer": answer}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _score(config: Config, loaded: Loaded, examples: Sequence[Example]) -> list[dict[str, Any]]:
    from sft_dist.evaluate.generate import generate
    from sft_dist.evaluate.likelihood import label_logprobs
    from sft_dist.evaluate.score import exact_match

    labels = config.evaluate.labels
    prompts = [prompt_of(row) for row in examples]
    answers = generate(loaded.model, loaded.tokenizer, prompts, config.evaluate.generation)
    logprobs: list[dict[str, float]] = [{} for _ in examples]
    if labels:
        options = config.evaluate.generation
        logprobs = label_logprobs(
            loaded.model, loaded.tokenizer, prompts, labels, options.batch_size, options.enable_thinking
        )
    rows = []
    for index, (example, prompt, answer, scores) in enumerate(zip(examples, prompts, answers, logprobs, strict=True)):
        expected = expected_answer(example).strip()
        best = max(scores, key=lambda label: scores[label]) if scores else None
        rows.append(
            {
                "kind": "scored",
                "index": index,
                "category": example.fields.get(config.evaluate.category_field),
                "prompt": prompt,
                "expected": expected,
                "answer": answer,
                "exact_match": exact_match(answer, expected),
                "predicted_label": best,
                "label_correct": None if best is None else best == expected,
                "label_logprobs": {label: round(value, 6) for label, value in scores.items()} or None,
            }
        )
    return rows
