"""Ask a model the run's questions and score it on the held-out rows; before and after training alike."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sft_dist.config.schema import Config
from sft_dist.errors import CheckpointError
from sft_dist.evaluate.held_out import complete_held_out, read_held_out
from sft_dist.export import ADAPTER, write_card
from sft_dist.files import read_jsonl, write_json, write_jsonl
from sft_dist.process import libraries_are_in
from sft_dist.rundir import RunDir
from sft_dist.train.environment import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sft_dist.evaluate.asked import Asked
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
    from sft_dist.train.adapter import with_adapter
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
                hint=f"finish the training first: sft-dist resume {run.quoted}",
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


def evaluate_model(
    config: Config, run: RunDir, loaded: Loaded, when: When, *, again: bool = False, devices: Sequence[str] = ()
) -> None:
    """Write eval/WHEN.jsonl, and scores.json if there are held-out rows.

    What eval/asked-WHEN.jsonl holds of the same model is not asked again, unless `again`. With several `devices`, and enough
    rows for them, a process on each but the first answers its share.
    """
    from sft_dist.evaluate.ask import ask, score_set
    from sft_dist.evaluate.harness import harness_rows
    from sft_dist.evaluate.sharing import share_out, worth_it

    started = time.monotonic()
    sets = config.evaluate.all_sets
    complete_held_out(config, run, loaded.tokenizer)
    asked = _asked(config, run, loaded, when, again=again)
    held_out = {it.name: read_held_out(run, it.name) for it in sets}
    if devices := worth_it(devices, config, len(config.evaluate.questions) + sum(map(len, held_out.values()))):
        share_out(run, when, asked, devices, lambda: _answer(config, run, loaded, asked))
    rows = ask(config, loaded, asked)
    for spec in sets:
        rows += score_set(config, loaded, spec, held_out[spec.name], asked)
    rows += harness_rows(config, loaded, asked)
    write_jsonl(run.eval / f"{when}.jsonl", rows)
    log.info("%s training: %d answers in %.0f s", when, len(rows), time.monotonic() - started)
    if sets or config.evaluate.harness:
        update_scores(run)
    if when == "after" and (run.model / "DONE").is_file():
        write_card(run, config, versions(), run.model)


def answer_share(config: Config, run: RunDir, loaded: Loaded, when: When, place: int, processes: int) -> None:
    """Answer the batches of one of several processes, and keep them for the one that scores."""
    asked = _asked(config, run, loaded, when, place=place)
    with asked.only(place, processes):
        _answer(config, run, loaded, asked)


def _answer(config: Config, run: RunDir, loaded: Loaded, asked: Asked) -> None:
    from sft_dist.evaluate.ask import answer_set, ask
    from sft_dist.evaluate.harness import harness_rows

    harness_rows(config, loaded, asked)
    ask(config, loaded, asked)
    for spec in config.evaluate.all_sets:
        answer_set(config, loaded, spec, read_held_out(run, spec.name), asked)


def _asked(config: Config, run: RunDir, loaded: Loaded, when: When, *, again: bool = False, place: int = 0) -> Asked:
    from sft_dist.evaluate.asked import Asked

    path = run.eval / f"asked-{when}.jsonl"
    if again:
        for file in path.parent.glob(f"{path.stem}*{path.suffix}"):
            file.unlink()
    return Asked(path, _identity(config, run, loaded, when), config.run.seed, place)


def _identity(config: Config, run: RunDir, loaded: Loaded, when: When) -> list[str]:
    """Which model answers: the base by its name, the final one by when it was published; both by how they compute."""
    base = config.model
    named = [str(value) for value in (base.name, base.revision, base.tokenizer, base.lora and base.lora.quantization)]
    done = run.model / "DONE"
    published = [done.read_text(encoding="utf-8").strip()] if when == "after" and done.is_file() else []
    return [when, *named, *published, str(loaded.model.dtype), str(loaded.model.device.type)]


def update_scores(run: RunDir) -> None:
    """Write scores.json from eval/before.jsonl and eval/after.jsonl, as far as they are there."""
    from sft_dist.config.loader import load_run_config
    from sft_dist.evaluate.metrics import OURS, TASKS, Meaning, first_score
    from sft_dist.evaluate.score import summarise
    from sft_dist.evaluate.summary import set_scores

    parts = {when: read_jsonl(run.eval / f"{when}.jsonl") for when in ("before", "after")}
    scored = {
        when: [row for row in rows if row["kind"] == "scored" and row.get("set", "data") == "data"]
        for when, rows in parts.items()
    }
    scores: dict[str, Any] = {when: summarise(rows) for when, rows in scored.items() if rows}
    if scores:
        scores["n"] = max(len(rows) for rows in scored.values())
    evaluate = load_run_config(run.config).evaluate
    tasks = evaluate.harness.tasks if evaluate.harness else ()
    named: list[tuple[str, str | None, Meaning]] = [(it.name, first_score(it), OURS) for it in evaluate.all_sets]
    named += [(name, None, TASKS) for name in tasks]
    scores["sets"] = {}
    for name, first, meaning in named:
        before, after = ([row for row in rows if row.get("set") == name] for rows in parts.values())
        scores["sets"][name] = set_scores(first, before, after, meaning)
    write_json(run.scores, scores)


def base_lacks(config: Config, run: RunDir) -> list[str]:
    """The sets and tasks that the base model was not asked, of a run that it was asked for."""
    if not config.evaluate.before or not (run.eval / "before.jsonl").is_file():
        return []
    there = {row.get("set", "data") for row in read_jsonl(run.eval / "before.jsonl") if row["kind"] == "scored"}
    tasks = config.evaluate.harness.tasks if config.evaluate.harness else ()
    return [name for name in (*(spec.name for spec in config.evaluate.all_sets), *tasks) if name not in there]


def wants_evaluation(config: Config) -> bool:
    """Whether the config asks or scores anything at all."""
    return bool(config.evaluate.questions or config.evaluate.all_sets or config.evaluate.harness)
