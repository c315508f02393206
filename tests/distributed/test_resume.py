"""A run that one signal stopped goes on bit for bit, under every plan, and on other numbers of processes where it can."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sft_dist.config.loader import load_run_config, write_config
from sft_dist.files import read_json, read_jsonl
from sft_dist.parallel.adopt import with_values
from sft_dist.rundir import RunDir
from sft_dist.train.checkpoint import MANIFEST, damage, list_checkpoints

TinyRun = Callable[..., RunDir]
Launch = Callable[..., str]

PLANS = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
# 24 rows, 8 a step: two epochs, and a checkpoint at the end of the first.
STEPS, SAVED = 6, 3
COMMON = (
    f"train.max_steps={STEPS}",
    "train.global_batch_size=8",
    "train.per_device_train_batch_size=2",
    "data.train={task: mix, rows: 24, seed: 1}",
    "checkpoint.save_strategy=steps",
    f"checkpoint.save_steps={SAVED}",
)
DEEPSPEED = ("zero1", "zero2", "zero3")
# name -> the run whose checkpoint at step 3 it goes on from, and the number of processes that it goes on with.
MOVED = {"fsdp2-2-to-1": ("fsdp2", 1), "fsdp2-1-to-2": ("fsdp2-of-1", 2), "2-to-1": ("ddp", 1), "1-to-2": ("cpu", 2)}
REFUSED = {f"{plan}-2-to-1": (plan, 1) for plan in DEEPSPEED}


def after_step_3(run: RunDir, folder: Path) -> RunDir:
    """A copy of a run as it would be had it been killed after its checkpoint at step 3."""
    copy = RunDir(Path(shutil.copytree(run.path, folder)))
    shutil.rmtree(copy.model)
    shutil.rmtree(copy.checkpoints / f"checkpoint-{STEPS}")
    copy.attempts.unlink()
    return copy


def leave_undecided(run: RunDir) -> None:
    """Plan and micro batch on `auto`: begun today it would be ddp with 4 rows at once."""
    values = {"parallel.plan": "auto", "train.per_device_train_batch_size": "auto"}
    run.config.write_text(write_config(with_values(load_run_config(run.config), values)))


@pytest.fixture(scope="module")
def runs(tiny_run: TinyRun, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDir]:
    """For each plan a `straight` and a `stopped` run of two processes, and copies that went on with another number."""
    folder = tmp_path_factory.mktemp("resume")

    def make(name: str, plan: str) -> RunDir:
        return tiny_run(folder, name, *COMMON, f"parallel.plan={plan}")

    # With `auto`, two processes are ddp and one is cpu.
    named = {plan: "auto" if plan == "ddp" else plan for plan in PLANS}
    made = {plan: make(plan, name) for plan, name in named.items()}
    stopped = {f"{plan}-stopped": make(f"{plan}-stopped", name) for plan, name in named.items()}
    alone = {"cpu": make("cpu", "auto"), "fsdp2-of-1": make("fsdp2-of-1", "fsdp2")}
    # A run that is named twice is stopped by its second process at first, and goes on.
    twice = [arm for run in stopped.values() for arm in (f"{run.path}@{SAVED}:1", run.path)]
    launch({1: [run.path for run in alone.values()], 2: [*(run.path for run in made.values()), *twice]})
    made |= alone
    moved = {name: after_step_3(made[origin], folder / name) for name, (origin, _) in {**MOVED, **REFUSED}.items()}
    moved["undecided"] = after_step_3(made["fsdp2"], folder / "undecided")
    leave_undecided(moved["undecided"])
    arms: dict[int, list[Path]] = {1: [], 2: [moved["undecided"].path]}
    for name, (_, processes) in {**MOVED, **REFUSED}.items():
        arms[processes].append(moved[name].path)
    launch(arms)
    return {**made, **stopped, **moved}


def rows(run: RunDir) -> list[tuple[int, float, float, int]]:
    return [
        (row["step"], row["loss"], row["grad_norm"], row["tokens"]) for row in read_jsonl(run.metrics) if "loss" in row
    ]


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return load_file(run.model / "model.safetensors")


@pytest.mark.parametrize("plan", PLANS)
def test_a_signal_to_one_process_stops_all_at_the_same_step(runs: dict[str, RunDir], plan: str) -> None:
    run = runs[f"{plan}-stopped"]
    first, second = read_jsonl(run.attempts)
    assert (first["ended"], first["first_step"], first["last_step"]) == ("stopped", 0, SAVED)
    assert first["reason"] == f"stopped by SIGTERM at step {SAVED}, saved as checkpoint-{SAVED}"
    assert (second["ended"], second["first_step"], second["last_step"]) == ("done", SAVED, STEPS)
    assert run.read_status()["state"] == "done"


@pytest.mark.parametrize("plan", PLANS)
def test_a_stopped_run_goes_on_bit_for_bit(runs: dict[str, RunDir], plan: str) -> None:
    straight, run = runs[plan], runs[f"{plan}-stopped"]
    assert [row[0] for row in rows(run)] == list(range(1, STEPS + 1)), "a step is missing or was logged twice"
    assert rows(run) == rows(straight)
    mine, theirs = weights(run), weights(straight)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_what_is_auto_stays_what_the_checkpoint_was_trained_with(runs: dict[str, RunDir]) -> None:
    straight, run = runs["fsdp2"], runs["undecided"]
    resolved = read_json(run.env)["resolved"]
    assert (resolved["plan"], resolved["per_device_train_batch_size"]) == ("fsdp2", 2)
    assert rows(run) == rows(straight)
    mine, theirs = weights(run), weights(straight)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("plan", PLANS)
def test_every_process_has_its_files_in_the_manifest(runs: dict[str, RunDir], plan: str) -> None:
    run = runs[f"{plan}-stopped"]
    assert [(step, damage(path)) for step, path in list_checkpoints(run)] == [(STEPS, None), (SAVED, None)]
    folder = run.checkpoints / f"checkpoint-{SAVED}"
    manifest = read_json(folder / MANIFEST)
    assert (manifest["plan"], manifest["world_size"], manifest["step"]) == (plan, 2, SAVED)
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    assert manifest["files"].keys() == there
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= there, "each process has random numbers of its own"
    whole = any(name.endswith("model.safetensors") for name in there)
    assert whole == (plan == "ddp"), "a sharded checkpoint holds shards only"


@pytest.mark.parametrize("name", MOVED)
def test_on_another_number_of_processes_the_losses_are_the_same(runs: dict[str, RunDir], name: str) -> None:
    origin, _ = MOVED[name]
    run, straight = runs[name], runs[origin]
    (attempt,) = read_jsonl(run.attempts)
    assert (attempt["ended"], attempt["first_step"]) == ("done", SAVED)
    found, wanted = (list(zip(*rows(each), strict=True)) for each in (run, straight))
    assert found[0] == wanted[0]
    assert found[1][:SAVED] == wanted[1][:SAVED]
    assert found[1] == pytest.approx(wanted[1], rel=1e-6)
    assert found[2] == pytest.approx(wanted[2], rel=4e-6)
    assert found[3] == wanted[3]
    for weight, wanted_weight in zip(weights(run).values(), weights(straight).values(), strict=True):
        assert float((weight - wanted_weight).norm() / wanted_weight.norm()) < 6e-5


@pytest.mark.parametrize("name", REFUSED)
def test_shards_of_deepspeed_are_refused_with_another_number(runs: dict[str, RunDir], name: str) -> None:
    run = runs[name]
    status = run.read_status()
    assert status["state"] == "failed"
    assert status["reason"] == f"checkpoint-{SAVED} was trained with other world_size: [2], now [1]"
    assert [step for step, _ in list_checkpoints(run)] == [SAVED], "the checkpoint stays"
    assert not run.model.exists()
