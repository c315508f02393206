"""Ask the model while it trains: a few held-out rows at chosen steps, for no longer than the config allows."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import (
    StoppingCriteria,
    StoppingCriteriaList,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from sft_dist.config.schema import Config, SetConfig
from sft_dist.data.example import Example, expected_answer
from sft_dist.evaluate.ask import add_perplexity
from sft_dist.evaluate.asked import prompts_at_once
from sft_dist.evaluate.generate import left_pad, prompt_ids, settings
from sft_dist.evaluate.held_out import complete_held_out, prompt_of, read_held_out
from sft_dist.evaluate.likelihood import answer_logprobs, label_logprobs
from sft_dist.evaluate.metrics import RowScores, Scorer, reduction
from sft_dist.evaluate.summary import counts_of
from sft_dist.files import read_jsonl
from sft_dist.parallel.compiling import VARLEN
from sft_dist.rundir import RunDir
from sft_dist.train.heartbeat import phase

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sft_dist.train.ranks import Ranks
    from sft_dist.train.shutdown import StopRequest

log = logging.getLogger(__name__)
# Prompts whose likelihoods are computed in one go, which nothing ends, whatever evaluate.generation.batch_size is.
AT_ONCE = 4


class AskDuring(TrainerCallback):  # type: ignore[misc]
    """Every `evaluate.during.steps` steps the main process asks and scores, and the others wait for it.

    The scores go where all metrics go, as eval_SET/SCORE, with eval_SET/n, the number of rows that there was time for. Between two
    steps, where no random number is drawn and no gradient is held: the training goes on as if nobody had asked.
    """

    def __init__(self, run: RunDir, config: Config, stop: StopRequest, ranks: Ranks) -> None:
        self.run, self.config, self.stop, self.ranks = run, config, stop, ranks
        self.trainer: Any = None
        """Set once there is one."""
        self._start, self._off = 0, False
        self._rows: dict[str, list[Example]] = {}
        self._unanswered: set[str] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start = state.global_step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What was due after the step before; after a resume as well, if a stop had left it out."""
        during, step = self.config.evaluate.during, state.global_step
        if during is None or self.trainer is None or not step or step % during.steps:
            return
        if step == self._start and self.ranks.by_main(lambda: _is_there(read_jsonl(self.run.metrics), step)):
            return
        phase("ask")
        found = self.ranks.by_main(lambda: self._asked(time.monotonic() + during.seconds, during.rows))
        if found:
            # Not TRL's: that would add what it has gathered for the next row on the training.
            transformers.Trainer.log(self.trainer, found)

    def _asked(self, deadline: float, rows: int) -> dict[str, float]:
        """What `_ask` finds. If it fails, memory above all, the training goes on without it."""
        if self._off:
            return {}
        try:
            return self._ask(deadline, rows)
        except Exception as error:
            self._off = True
            log.warning("evaluate.during failed and is off for the rest of this attempt; training goes on: %s", error)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return {}

    def _ask(self, deadline: float, rows: int) -> dict[str, float]:
        """The scores, of as many rows as there is time for; {} if there is none for any."""
        model, tokenizer = self.trainer.accelerator.unwrap_model(self.trainer.model), self.trainer.processing_class
        found: dict[str, float] = {}
        sets = self.config.evaluate.all_sets
        if not self._rows:
            complete_held_out(self.config, self.run, tokenizer)
            self._rows = {spec.name: read_held_out(self.run, spec.name)[:rows] for spec in sets}
        with _ready_to_answer(model):
            for place, spec in enumerate(sets):
                now = time.monotonic()
                watch = _Watch(now + (deadline - now) / (len(sets) - place), self.stop)
                scored = score_until(model, tokenizer, self.config, spec, self._rows[spec.name], watch)
                if not scored and not self.stop.number and spec.name not in self._unanswered:
                    self._unanswered.add(spec.name)
                    log.warning(
                        "evaluate.during: no batch of the set %s was answered in time; more seconds, a smaller "
                        "evaluate.generation.batch_size or fewer max_new_tokens would help",
                        spec.name,
                    )
                found |= summary(spec.name, scored)
        return found


class _Watch(StoppingCriteria):  # type: ignore[misc]
    """Ends a generation, all of its rows, when the time is over or a stop was asked for."""

    def __init__(self, deadline: float, stop: StopRequest) -> None:
        self.deadline, self.stop = deadline, stop

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.deadline or bool(self.stop.number)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.over, device=input_ids.device)


@contextmanager
def _ready_to_answer(model: PreTrainedModel) -> Iterator[None]:
    """In the state for generation: no dropout, no checkpointing, nothing compiled for it, attention that takes padded rows."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    was, attention = model.training, base.config._attn_implementation
    model.eval()
    try:
        if attention == VARLEN:
            base.set_attn_implementation("sdpa")
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        if attention == VARLEN:
            base.set_attn_implementation(attention)
        model.train(was)


@torch.no_grad()
def score_until(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    spec: SetConfig,
    examples: Sequence[Example],
    watch: _Watch,
) -> list[dict[str, Any]]:
    """Scores and counts of each row that was answered before `watch` is over; what is cut does not count.

    `watch` ends a generation at any token. Likelihoods it cannot end, so it is asked before every `AT_ONCE` prompts of them.
    """
    options = config.evaluate.generation
    # The likeliest token: sampling would take from the random numbers of the training.
    options = options.model_copy(
        update={"do_sample": False, "max_new_tokens": spec.max_new_tokens or options.max_new_tokens}
    )
    scorer, chosen = Scorer(spec, examples), settings(model, tokenizer, options)
    thinking, rows = options.enable_thinking, list[dict[str, Any]]()
    size = prompts_at_once(options, generates_on_gpu=False)  # as few as on a CPU: the training holds most of the memory
    for start in range(0, len(examples), size):
        batch = examples[start : start + size]
        found = [RowScores() for _ in batch]
        if scorer.wants_answers and not watch.over:
            ids = [prompt_ids(tokenizer, prompt_of(example), thinking) for example in batch]
            inputs = left_pad(ids, int(tokenizer.pad_token_id), model.device)
            output = model.generate(**inputs, generation_config=chosen, stopping_criteria=StoppingCriteriaList([watch]))
            if watch.over:  # it may have been cut
                break
            told = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            found = [scorer.score(example, answer.strip()) for example, answer in zip(batch, told, strict=True)]
        for first in range(0, len(batch), AT_ONCE):
            few = slice(first, first + AT_ONCE)
            if not _likelihoods(model, tokenizer, spec, batch[few], found[few], thinking, watch):
                return rows
            rows += [{"scores": scores.values, "counts": scores.counts} for scores in found[few]]
    return rows


def _likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: SetConfig,
    few: Sequence[Example],
    found: Sequence[RowScores],
    thinking: bool | None,
    watch: _Watch,
) -> bool:
    """Add what the set wants to know of likelihoods to `found`; False if `watch` was over before all of it was begun."""
    prompts = [prompt_of(example) for example in few]
    if watch.over:
        return False
    if spec.labels:
        by_label = label_logprobs(model, tokenizer, prompts, spec.labels, AT_ONCE, thinking)
        for example, labels, scores in zip(few, by_label, found, strict=True):
            best = max(labels, key=lambda label: labels[label])
            scores.values["label"] = float(best == expected_answer(example).strip())
    if "perplexity" in spec.metrics:
        if spec.labels and watch.over:
            return False
        wanted = [expected_answer(example).strip() for example in few]
        by_answer = answer_logprobs(model, tokenizer, prompts, wanted, AT_ONCE, thinking)
        for (logprob, count), scores in zip(by_answer, found, strict=True):
            add_perplexity(scores, logprob, count)
    return True


def summary(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """eval_SET/SCORE of each score over the rows, and eval_SET/n; {} without rows."""
    if not rows:
        return {}
    scores = dict.fromkeys(score for row in rows for score in row["scores"])
    values = {f"eval_{name}/{score}": float(reduction(score)(counts_of(rows, score).sum(0))) for score in scores}
    return {**{key: round(value, 6) for key, value in values.items()}, f"eval_{name}/n": float(len(rows))}


def _is_there(rows: Sequence[dict[str, Any]], step: int) -> bool:
    return any(row.get("step") == step and any(str(name).endswith("/n") for name in row) for row in rows)
