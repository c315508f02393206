"""Numbers that go wrong, decided on made-up ones: spikes, rows of bad steps, weights, and who is slow."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sft_dist.config.schema import Config, TrainConfig
from sft_dist.errors import ConfigError, SftDistError
from sft_dist.files import read_jsonl
from sft_dist.parallel.machine import Machine
from sft_dist.parallel.resolve import resolve
from sft_dist.rundir import RunDir
from sft_dist.train.health import Health
from sft_dist.train.numbers import Numbers, Row, SaveGuard, Spikes, all_finite, is_finite
from sft_dist.train.ranks import MainFailed, Ranks
from sft_dist.train.step_facts import StepFacts
from sft_dist.train.stragglers import Slow, Stragglers, slowest


def state(step: int) -> Any:
    return SimpleNamespace(global_step=step)


class Training:
    """Drives the callbacks as transformers would."""

    def __init__(self, folder: Path, ranks: Ranks | None = None, **train: Any) -> None:
        self.facts = StepFacts()
        self.numbers = Numbers(RunDir(folder), TrainConfig(**train), self.facts, ranks or Ranks())
        self.guard = SaveGuard(self.numbers)
        self.model = torch.nn.Linear(2, 2)
        self.step = 0

    def take(self, norm: float = 1.0, loss: float = 1.0, *, save: bool = False) -> dict[str, Any]:
        """One step that ends with this norm and loss, and is logged; returns the row."""
        self.step += 1
        self.facts.gradient_norm, self.facts.loss = torch.tensor(norm), torch.tensor(loss)
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, norm)
        control, given = SimpleNamespace(should_save=save), {"model": self.model}
        self.numbers.on_pre_optimizer_step(None, state(self.step - 1), control, **given)
        torch.optim.SGD(self.model.parameters(), lr=0.1).step()
        self.numbers.on_step_end(None, state(self.step), control, **given)
        self.guard.on_step_end(None, state(self.step), control, **given)
        row = {"loss": loss}
        self.numbers.on_log(None, state(self.step), control, row, **given)
        return row


# --- steps that are not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [math.nan, math.inf, -1.0])  # the last one is DeepSpeed's word for the first two
def test_too_many_in_a_row_fail_the_run(tmp_path: Path, norm: float) -> None:
    training = Training(tmp_path)
    assert training.take() == {"loss": 1.0}
    assert training.take(norm, math.nan)["nonfinite_steps"] == 1
    training.take(norm)
    with pytest.raises(SftDistError) as caught:
        training.take(norm)
    assert caught.value.message == "the gradient is not finite, steps 2 to 4: train.max_nonfinite_steps is 3"
    assert "train.learning_rate" in str(caught.value.hint)


def test_a_good_step_ends_the_row(tmp_path: Path) -> None:
    training = Training(tmp_path, max_nonfinite_steps=2)
    for _ in range(5):
        training.take(math.nan)
        assert "nonfinite_steps" not in training.take()


def test_a_loss_without_a_gradient_norm_counts_too(tmp_path: Path) -> None:
    """Where an engine tells no norm, the logged loss is what all processes know."""
    training = Training(tmp_path, max_nonfinite_steps=2)
    assert training.take(1.0, math.inf)["nonfinite_steps"] == 1
    with pytest.raises(SftDistError, match="the loss is not finite, steps 1 to 2"):
        training.take(1.0, math.inf)


def test_skip_leaves_the_weights_alone(tmp_path: Path) -> None:
    training = Training(tmp_path, nonfinite="skip", max_nonfinite_steps=2)
    training.take()
    before = [parameter.clone() for parameter in training.model.parameters()]
    assert training.take(math.nan, save=True)["nonfinite_steps"] == 1, "it may be saved: nothing has changed"
    after = list(training.model.parameters())
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    training.take()
    assert not torch.equal(before[0], after[0])
    training.take(math.nan)
    with pytest.raises(SftDistError, match="skipped, steps 4 to 5"):
        training.take(math.nan)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    training = Training(tmp_path, max_nonfinite_steps=100)
    for step in (2, 1):
        (tmp_path / f"checkpoints/checkpoint-{step}").mkdir(parents=True)
    (tmp_path / "checkpoints/checkpoint-1/MANIFEST.json").write_text("{}")
    training.take(save=True)
    training.take(math.nan)
    training.take()
    with pytest.raises(SftDistError) as caught:
        training.take(save=True)
    expected = (
        "the weights are not finite since step 2 and were not saved at step 4; checkpoint-1 is the last good checkpoint"
    )
    assert caught.value.message == expected


def test_a_bad_step_that_left_the_weights_finite_does_not_keep_them_from_being_saved(tmp_path: Path) -> None:
    """A norm that overflows although no gradient does: clipping makes zeros of them all."""
    training = Training(tmp_path)
    training.facts.gradient_norm, training.facts.loss = torch.tensor(math.inf), torch.tensor(1.0)
    training.numbers.on_step_end(None, state(1), None)
    assert training.numbers.tainted == 1
    training.numbers.before_save(1, training.model)
    assert training.numbers.tainted is None


def test_nothing_is_published_from_such_weights(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.take(math.nan)
    with pytest.raises(SftDistError, match="there is no checkpoint before"):
        training.guard.on_train_end(None, state(1), None, model=training.model)


def test_weights_are_looked_at_only_when_there_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(tmp_path)
    looked: list[Any] = []
    monkeypatch.setattr("sft_dist.train.numbers.all_finite", lambda parameters: not looked.append(parameters))
    for _ in range(3):
        training.take(save=True)
    assert looked == [], "it takes time"
    training.take(math.inf, save=True)
    assert len(looked) == 1


def test_only_the_main_process_says_it(tmp_path: Path) -> None:
    class Second(Ranks):
        def everyones(self, value: Any) -> list[Any]:
            return [True, value]

    training = Training(tmp_path, Second(rank=1, size=2), max_nonfinite_steps=1)
    with pytest.raises(MainFailed):
        training.take(math.nan, math.nan)


def test_the_ranks_whose_loss_it_was_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class First(Ranks):
        def everyones(self, value: Any) -> list[Any]:
            return [value, True, False, True]

    training = Training(tmp_path, First(rank=0, size=4))
    training.take(math.nan, 1.0)
    assert caplog.messages == ["step 1: the gradient is not finite, nor is the loss on rank 2 of 4"]


def test_a_row_counts() -> None:
    row = Row(most=2)
    assert [row.count(step, good=good) for step, good in enumerate([False, True, False, False])] == [
        False, False, False, True,
    ]  # fmt: skip
    assert row.first == 2
    assert (row.logged(), row.logged()) == (3, 0)


def test_what_counts_as_finite() -> None:
    assert is_finite(None)
    assert is_finite(0.0)
    assert is_finite(torch.tensor(1e30))
    assert not is_finite(torch.tensor(math.nan))
    assert not is_finite(-1.0)
    fine, bad = torch.ones(3, dtype=torch.bfloat16), torch.tensor([[1.0, -math.inf]])
    assert all_finite([fine, torch.zeros(0), torch.tensor([1, 2], dtype=torch.uint8)])
    assert not all_finite([fine, bad])
    assert not all_finite([torch.tensor([1.0, math.nan, 5.0])])
    assert all_finite([])
    sharded = torch.zeros(0)
    sharded.ds_tensor = torch.tensor([math.nan])  # type: ignore[attr-defined]
    assert not all_finite([sharded]), "ZeRO-3 keeps a process's share there"


@pytest.mark.parametrize(
    ("plan", "dtype", "refused"),
    [
        ("zero2", "bfloat16", True),
        ("zero2", "float32", False),
        ("zero3", "bfloat16", False),
        ("ddp", "bfloat16", False),
    ],
)
def test_skip_is_refused_where_the_engine_takes_every_step(
    tmp_path: Path, plan: str, dtype: str, refused: bool
) -> None:
    tree = {"train": {"nonfinite": "skip"}, "parallel": {"plan": plan, "num_processes": 2}, "model": {"dtype": dtype}}
    config = Config.model_validate(tree)
    resolved = resolve(config, Machine("x", 8, False, 16.0, ()))
    with pytest.raises(ConfigError, match=r"train\.nonfinite is skip") if refused else contextlib.nullcontext():
        health = Health(RunDir(tmp_path), config, resolved, Ranks())
        assert health.numbers.skip == (plan == "ddp"), "DeepSpeed leaves the step out by itself"


def test_a_step_that_the_engine_left_out_spoils_nothing(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.facts.gradient_norm = math.inf
    training.numbers.on_step_end(None, state(1), None, optimizer=SimpleNamespace(step_was_skipped=True))
    assert training.numbers.tainted is None
    assert training.numbers.row.in_a_row == 1


# --- spikes ----------------------------------------------------------------------------------------------------------


def spikes_in(losses: list[float]) -> list[int]:
    spikes = Spikes()
    return [index for index, loss in enumerate(losses) if spikes.is_spike(loss)]


def test_a_jump_is_a_spike_and_a_falling_or_noisy_loss_has_none() -> None:
    noise = random.Random(1)
    falling = [3.0 * math.exp(-step / 40) + 0.5 + noise.gauss(0, 0.03) for step in range(300)]
    assert spikes_in(falling) == []
    jumped = list(falling)
    jumped[200] = 2.5
    assert spikes_in(jumped) == [200]
    assert spikes_in([1.0] * 30 + [1.01] + [1.0] * 5) == [], "a flat curve's noise is next to nothing"
    assert spikes_in([1.0] * 30 + [1.5]) == [30]


def test_spikes_need_a_past_and_survive_what_is_not_finite() -> None:
    assert spikes_in([1.0, 9.0, 1.0]) == []
    assert spikes_in([1.0] * 20 + [math.nan, math.inf, 5.0]) == [22]
    assert spikes_in([1.0] * 20 + [5.0, 5.0, 5.0]) == [20, 21, 22], "a few do not become the usual"


def test_a_spike_is_on_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    training = Training(tmp_path)
    for _ in range(20):
        training.take()
    assert training.take(loss=7.0)["loss_spike"] is True
    assert caplog.messages == ["step 21: the loss jumped to 7; see loss_spike in metrics.jsonl"]


# --- the slow one ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "found"),
    [
        ([0.1, 0.3], (1, 3.0)),  # of two the faster one is the measure
        ([0.1, 0.1, 0.2, 0.1], (2, 2.0)),
        ([0.1, None], None),
        ([0.1], None),
        ([0.0, 0.0], None),
    ],
)
def test_the_slowest_is_measured_by_the_median(seconds: list[float | None], found: tuple[int, float] | None) -> None:
    assert slowest(seconds) == (pytest.approx(found) if found else None)


def test_a_warning_needs_three_slow_logs_of_the_same_rank() -> None:
    slow = Slow()
    assert [slow.see(1, 2.0) for _ in range(5)] == [False, False, True, False, False], "once in a row is enough"
    assert [slow.see(1, 1.0), slow.see(1, 2.0), slow.see(1, 2.0), slow.see(2, 2.0), slow.see(2, 2.0)] == [False] * 5
    assert slow.see(2, 2.0)


def test_the_row_says_who_is_slow(caplog: pytest.LogCaptureFixture) -> None:
    class Two(Ranks):
        def everyones(self, value: Any) -> list[Any]:
            return [value, 3 * value]

    facts = StepFacts()
    callback = Stragglers(facts, Two(rank=0, size=2))
    for step in (1, 2, 3):
        facts.own.seconds, facts.own.passes = 1.0, 4
        row: dict[str, Any] = {"loss": 1.0}
        callback.on_log(None, state(step), None, row)
        assert row == {"loss": 1.0, "slowest_rank": 1, "slowest_over_median": 3.0}
    assert caplog.messages == ["rank 1 takes 3.0 times as long as the median for its share of a step"]
    evaluated = {"eval_loss": 1.0}
    callback.on_log(None, state(4), None, evaluated)
    assert evaluated == {"eval_loss": 1.0}


# --- in a run --------------------------------------------------------------------------------------------------------


def test_a_run_notes_its_pace_and_a_step_that_is_skipped(
    new_run: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft_dist import stages
    from sft_dist.jobs.walltime import read_pace
    from sft_dist.train import loss

    plain, calls = loss.trained_token_loss, []

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        value, *rest = plain(*args, **kwargs)
        calls.append(1)
        return (value * math.nan if len(calls) == 2 else value, *rest)

    monkeypatch.setattr(loss, "trained_token_loss", poisoned)
    run = new_run(
        "train.max_steps=4", "train.global_batch_size=2", "train.per_device_train_batch_size=2", "train.nonfinite=skip",
        "train.eval_strategy=no", "checkpoint.save_strategy=steps", "checkpoint.save_steps=2", "evaluate.before=false",
        "evaluate.after=false",
    )  # fmt: skip
    stages.run_here(run)
    rows = [row for row in read_jsonl(run.metrics) if "loss" in row]
    assert [row.get("nonfinite_steps") for row in rows] == [None, 1, None, None]
    assert rows[1]["loss"] is None, "it is not hidden"
    assert all(row["loss"] > 0 for row in (rows[0], *rows[2:]))
    assert "slowest_rank" not in rows[0]
    pace = read_pace(run)
    assert pace is not None
    assert pace.step_s > 0
    assert pace.save_s is not None
    assert pace.start_s is not None
