"""`evaluate.during`: scores between steps, the training untouched by them, and no longer than they may take."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sft_dist import stages
from sft_dist.config.loader import load_config
from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError, RunStopped
from sft_dist.evaluate import during
from sft_dist.evaluate.ask import score_set
from sft_dist.evaluate.compare import Loaded
from sft_dist.evaluate.held_out import held_out_rows, read_held_out
from sft_dist.files import read_jsonl
from sft_dist.parallel.batch import check_during
from sft_dist.rundir import RunDir
from sft_dist.stages import run_here
from sft_dist.train import callbacks
from sft_dist.train.shutdown import StopRequest

NewRun = Callable[..., RunDir]
SMALL = (
    "data.train.sample=24",
    "data.eval_size=0",
    "train.eval_strategy=no",
    "train.max_steps=6",
    "train.per_device_train_batch_size=4",
    "train.logging_steps=1",
    "checkpoint.save_strategy=no",
    "evaluate.before=false",
    "evaluate.after=false",
    "evaluate.questions=[]",
    "evaluate.generation.max_new_tokens=6",
)
ASKED = ("evaluate.during={steps: 2, rows: 3}",)


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "report_here", lambda run: None)


def scores(run: RunDir) -> list[dict[str, Any]]:
    return [row for row in read_jsonl(run.metrics) if "eval_data/n" in row]


def losses(run: RunDir) -> list[tuple[Any, ...]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_jsonl(run.metrics) if "loss" in row]


@pytest.mark.parametrize(
    "how", [(), ("model.lora={r: 4, lora_dropout: 0.1}", "train.gradient_checkpointing=true")], ids=["whole", "adapter"]
)
def test_the_model_is_asked_and_trains_as_if_it_were_not(how: tuple[str, ...], new_run: NewRun) -> None:
    """Dropout and the order of rows draw random numbers; sampling, which is asked for, would as well."""
    words = (*SMALL, *how, "evaluate.generation.do_sample=true")
    plain = new_run(*words, name="plain")
    asked = new_run(*words, *ASKED, name="asked")
    for run in (plain, asked):
        run_here(run)
    assert losses(asked) == losses(plain)
    assert (asked.model / "model.safetensors").read_bytes() == (plain.model / "model.safetensors").read_bytes()
    assert [row["step"] for row in scores(asked)] == [2, 4], "after the last step comes the evaluation of all rows"
    for row in scores(asked):
        assert row["eval_data/n"] == 3
        assert 0 <= row["eval_data/exact"] <= 1
        assert 0 <= row["eval_data/label"] <= 1
    assert not scores(plain)


def test_the_scores_are_those_that_all_rows_get(new_run: NewRun, tiny_model: Any, tiny_tokens: Any) -> None:
    words = ("evaluate.sets=[{name: letters, data: {task: extraction, rows: 4}, metrics: [json, perplexity]}]",)
    run = new_run(*SMALL, *ASKED, *words)
    config = load_config(str(run.config)).config
    tokens, model = tiny_tokens(), tiny_model().eval()
    assert len(config.evaluate.all_sets) == 2
    for spec in config.evaluate.all_sets:
        examples = read_held_out(run, spec.name)[:4]
        whole = score_set(config, Loaded(model, tokens.tokenizer), spec, examples)
        watch = during._Watch(time.monotonic() + 60, StopRequest())
        quick = during.score_until(model, tokens.tokenizer, config, spec, examples, watch)
        assert [row["scores"] for row in quick] == [pytest.approx(row["scores"], abs=1e-4) for row in whole]
        assert during.summary(spec.name, quick)[f"eval_{spec.name}/n"] == 4


def test_likelihoods_end_with_the_batch_of_four_in_which_the_time_runs_out(
    tiny_model: Any, tiny_tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time is over in the second forward: the batch it belongs to is finished, and no other one begun."""
    config = load_config("smoke", ["evaluate.generation.batch_size=64", "evaluate.data.rows=32"]).config
    spec = config.evaluate.all_sets[0].model_copy(update={"metrics": ("label", "perplexity")})
    model, tokens, stop, prompts = tiny_model().eval(), tiny_tokens(), StopRequest(), list[int]()
    examples = held_out_rows(config, tokens.tokenizer)[spec.name]
    forward = model.forward

    def slow(*words: Any, **named: Any) -> Any:
        prompts.append(len(named["input_ids"]))
        if len(prompts) == 5:
            stop.heard.append(signal.SIGTERM)
        return forward(*words, **named)

    watch = during._Watch(time.monotonic() + 600, stop)
    whole = during.score_until(model, tokens.tokenizer, config, spec, examples, watch)
    monkeypatch.setattr(model, "forward", slow)
    cut = during.score_until(model, tokens.tokenizer, config, spec, examples, watch)
    assert len(whole) == 32
    assert prompts[2::3] == [during.AT_ONCE], "labels (prompts, then continuations), perplexity, labels"
    assert len(prompts) == 5
    assert cut == whole[: during.AT_ONCE], "what was finished counts, whatever the batch of generation is"


def test_what_takes_too_long_does_not_count_and_holds_nothing(new_run: NewRun) -> None:
    run = new_run(*SMALL, "evaluate.during={steps: 1, seconds: 0.000001}")
    run_here(run)
    assert run.read_status()["state"] == "done"
    assert len(losses(run)) == 6
    assert not scores(run)


@pytest.mark.parametrize(("heard", "asked"), [(1, [2, 4]), (2, [4])], ids=["left for the resume", "given up"])
def test_a_stop_comes_before_the_asking(
    heard: int, asked: list[int], new_run: NewRun, signal_at: Callable[..., None]
) -> None:
    """A signal is honoured at the end of the next step: the second of these, before it is asked, or the third, while it would be."""
    run = new_run(*SMALL, *ASKED)
    signal_at(heard, signal.SIGTERM)
    with pytest.raises(RunStopped):
        run_here(run)
    assert run.read_status()["step"] == heard + 1
    assert not scores(run)
    run_here(run)
    assert [row["step"] for row in scores(run)] == asked
    assert [step for step, *_ in losses(run)] == [1, 2, 3, 4, 5, 6]


def test_a_generation_ends_with_the_time_or_a_stop() -> None:
    import torch

    ids, stop = torch.zeros(2, 3, dtype=torch.long), StopRequest()
    watch = during._Watch(time.monotonic() + 60, stop)
    assert watch(ids, ids).tolist() == [False, False]
    stop.heard.append(signal.SIGTERM)
    assert watch(ids, ids).tolist() == [True, True]
    assert during._Watch(time.monotonic() - 1, StopRequest()).over


def test_an_asking_that_fails_is_the_last_one_and_stops_no_training(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def fail(*words: Any) -> None:
        calls.append(words)
        raise MemoryError("no room for the cache")

    monkeypatch.setattr(during, "score_until", fail)
    run = new_run(*SMALL, *ASKED)
    run_here(run)
    assert run.read_status()["state"] == "done"
    assert len(calls) == 1
    assert "training goes on: no room for the cache" in caplog.text


def test_speed_does_not_count_the_asking(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that is an hour later after each asking."""
    asks, clock = during.AskDuring._ask, time.monotonic
    late = [0.0]

    def ask(self: during.AskDuring, *words: Any) -> dict[str, float]:
        late[0] += 3600
        return asks(self, clock() + 60, 3)

    monkeypatch.setattr(during.AskDuring, "_ask", ask)
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: clock() + late[0]))
    run = new_run(*SMALL, *ASKED, "train.logging_steps=3")
    run_here(run)
    assert late[0] == 7200
    rows = [row for row in read_jsonl(run.metrics) if "tokens_per_s" in row]
    tokens = [row["tokens"] for row in rows]
    taken = [
        (after - before) / row["tokens_per_s"] for before, after, row in zip([0, *tokens], tokens, rows, strict=False)
    ]
    assert max(taken) < 3600


@pytest.mark.parametrize("plan", ["zero3", "fsdp2"])
def test_a_plan_without_a_whole_model_is_refused(plan: str) -> None:
    config = load_config("smoke", list(ASKED)).config
    with pytest.raises(ConfigError, match=f"under {plan} no process has the whole model"):
        check_during(config, plan)
    check_during(config, "zero2")
    check_during(Config(), plan)


def test_without_rows_there_is_nothing_to_ask(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.during +would ask nothing"):
        load_config("smoke", [*ASKED, "evaluate.data=null", "evaluate.labels=[]"])
