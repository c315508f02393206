"""A run that one signal stopped goes on bit for bit, under every plan, and with other processes or ZeRO stages too."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from sft_dist.config.loader import load_run_config, write_config
from sft_dist.errors import CheckpointError
from sft_dist.files import read_json, read_jsonl
from sft_dist.parallel.adopt import with_values
from sft_dist.rundir import RunDir
from sft_dist.train import universal
from sft_dist.train.checkpoint import list_checkpoints
from sft_dist.train.manifest import MANIFEST, damage

TinyRun = Callable[..., RunDir]
Launch = Callable[..., str]

PLANS = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
# 24 rows, 8 a step: two epochs, and a checkpoint at the end of the first. With 32 it is in the middle of one.
STEPS, SAVED = 6, 3
COMMON = (
    f"train.max_steps={STEPS}",
    "train.global_batch_size=8",
    "train.per_device_train_batch_size=2",
    "train.weight_decay=0.1",
    "checkpoint.save_strategy=steps",
    f"checkpoint.save_steps={SAVED}",
)
ROWS_24, ROWS_32 = (f"data.train={{task: mix, rows: {rows}, seed: 1}}" for rows in (24, 32))
DEEPSPEED = ("zero1", "zero2", "zero3")
# Whole copies, and each way in which an engine writes shards.
FULL = ("ddp", "zero3", "fsdp2")
OF_4 = {f"{plan}-of-4": plan for plan in DEEPSPEED}
# Two processes of plans that DeepSpeed saves in its own way: name -> overrides.
SPECIAL = {
    "offload": ("parallel.plan=zero2", "parallel.offload=cpu"),
    "lora": ("parallel.plan=zero1", "model.lora={r: 4}"),
    "bfloat16": ("parallel.plan=zero3", "model.dtype=bfloat16"),
}
SHARE = ("parallel.plan=zero3", "parallel.sequence_parallel_size=2")
# name -> the run whose checkpoint at step 3 it goes on from, the processes that it goes on with, another plan.
MOVED: dict[str, tuple[str, int | str, str | None]] = {
    "fsdp2-2-to-1": ("fsdp2", 1, None),
    "fsdp2-1-to-2": ("fsdp2-of-1", 2, None),
    "2-to-1": ("ddp", 1, None),
    "1-to-2": ("cpu", 2, None),
    **{f"{plan}-2-to-{world}": (plan, world, None) for plan in DEEPSPEED for world in (1, 4)},
    **{f"{origin}-to-2": (origin, 2, None) for origin in OF_4},
    "zero2-to-zero1": ("zero2", 2, "zero1"),
    "zero1-to-zero3": ("zero1", 4, "zero3"),
    "zero3-to-zero2": ("zero3-of-4", 2, "zero2"),
    "offload-2-to-1": ("offload", 1, None),
    "lora-to-zero3": ("lora", 4, "zero3"),
    "bfloat16-to-zero1": ("bfloat16", 4, "zero1"),
    "shared-2-to-4": ("shared", "1x4", None),
}
CUT_ANEW = [name for name, (origin, *_) in MOVED.items() if origin not in ("fsdp2", "fsdp2-of-1", "ddp", "cpu")]
REFUSED = {"zero3-to-fsdp2": ("zero3", 2, "fsdp2")}
# Loss, gradient norm, weights, relative; about ten times what was measured. bfloat16 rounds a sum of four otherwise than one
# of two.
FLOAT32, BFLOAT16 = (1e-6, 4e-6, 6e-5), (2e-4, 5e-3, 8e-3)


def after_step_3(run: RunDir, folder: Path, plan: str | None = None) -> RunDir:
    """A copy of a run as it would be had it been killed after its checkpoint at step 3, perhaps with another plan."""
    copy = RunDir(Path(shutil.copytree(run.path, folder)))
    shutil.rmtree(copy.model)
    shutil.rmtree(copy.checkpoints / f"checkpoint-{STEPS}")
    copy.attempts.unlink()
    if plan is not None:
        copy.config.write_text(re.sub(r"plan: zero\d", f"plan: {plan}", copy.config.read_text()))
    return copy


def leave_undecided(run: RunDir) -> None:
    """Plan and micro batch on `auto`: begun today it would be ddp with 4 rows at once."""
    values = {"parallel.plan": "auto", "train.per_device_train_batch_size": "auto"}
    run.config.write_text(write_config(with_values(load_run_config(run.config), values)))


@pytest.fixture(scope="module")
def runs(tiny_run: TinyRun, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDir]:
    """For each plan a `straight` and a `stopped` run of two processes, and copies that went on with another number."""
    folder = tmp_path_factory.mktemp("resume")

    def make(name: str, plan: str, *overrides: str) -> RunDir:
        return tiny_run(folder, name, *COMMON, f"parallel.plan={plan}", *(overrides or [ROWS_24]))

    # With `auto`, two processes are ddp and one is cpu.
    named = {plan: "auto" if plan == "ddp" else plan for plan in PLANS}
    made = {plan: make(plan, name) for plan, name in named.items()}
    made |= {name: tiny_run(folder, name, *COMMON, ROWS_24, *overrides) for name, overrides in SPECIAL.items()}
    stopped = {f"{plan}-stopped": make(f"{plan}-stopped", name) for plan, name in named.items()}
    full = {f"{plan}-full": make(f"{plan}-full", named[plan]) for plan in FULL}
    alone = {"cpu": make("cpu", "auto"), "fsdp2-of-1": make("fsdp2-of-1", "fsdp2")}
    of_4 = {name: make(name, plan, ROWS_32) for name, plan in OF_4.items()}
    shared = {name: tiny_run(folder, name, *COMMON, ROWS_32, *SHARE) for name in ("shared", "shared-stopped")}
    # A run that is named twice is stopped by its second process at first, and goes on.
    twice = [arm for run in stopped.values() for arm in (f"{run.path}@{SAVED}:1", run.path)]
    # Of these the second process finds the disk full at the last save; then they go on, too.
    twice += [arm for run in full.values() for arm in (f"{run.path}!{STEPS}:1", run.path)]
    again = shared["shared-stopped"].path
    launch(
        {
            1: [run.path for run in alone.values()],
            2: [*(run.path for run in made.values()), *twice],
            4: [run.path for run in of_4.values()],
            # Processes can share rows in one run only (DeepSpeed keeps their groups).
            "1x2": [shared["shared"].path],
            "01x2": [f"{again}@{SAVED}:1"],
            "001x2": [again],
        }
    )
    made |= {**alone, **of_4, **shared}
    moved = {
        name: after_step_3(made[origin], folder / name, plan)
        for name, (origin, _, plan) in {**MOVED, **REFUSED}.items()
    }
    moved["undecided"] = after_step_3(made["fsdp2"], folder / "undecided")
    leave_undecided(moved["undecided"])
    arms: dict[int | str, list[Path]] = {1: [], 2: [moved["undecided"].path], 4: [], "1x4": []}
    for name, (_, processes, _) in {**MOVED, **REFUSED}.items():
        arms[processes].append(moved[name].path)
    launch(arms)
    return {**made, **stopped, **full, **moved}


def rows(run: RunDir) -> list[tuple[int, float, float, int]]:
    return [
        (row["step"], row["loss"], row["grad_norm"], row["tokens"]) for row in read_jsonl(run.metrics) if "loss" in row
    ]


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    adapter = run.model / "adapter" / "adapter_model.safetensors"
    return load_file(adapter if adapter.is_file() else run.model / "model.safetensors")


@pytest.mark.parametrize("plan", PLANS)
def test_a_signal_to_one_process_stops_all_at_the_same_step(runs: dict[str, RunDir], plan: str) -> None:
    run = runs[f"{plan}-stopped"]
    first, second = read_jsonl(run.attempts)
    assert (first["ended"], first["first_step"], first["last_step"]) == ("stopped", 0, SAVED)
    assert first["reason"] == f"stopped by SIGTERM at step {SAVED}, saved as checkpoint-{SAVED}"
    assert (second["ended"], second["first_step"], second["last_step"]) == ("done", SAVED, STEPS)
    assert run.read_status()["state"] == "done"


@pytest.mark.parametrize("plan", [*PLANS, "shared"])
def test_a_stopped_run_goes_on_bit_for_bit(runs: dict[str, RunDir], plan: str) -> None:
    straight, run = runs[plan], runs[f"{plan}-stopped"]
    assert [row[0] for row in rows(run)] == list(range(1, STEPS + 1)), "a step is missing or was logged twice"
    assert rows(run) == rows(straight)
    mine, theirs = weights(run), weights(straight)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("plan", FULL)
def test_one_full_disk_ends_all_processes_and_the_older_checkpoint_goes_on(runs: dict[str, RunDir], plan: str) -> None:
    straight, run = runs[plan], runs[f"{plan}-full"]
    first, second = read_jsonl(run.attempts)
    assert (first["ended"], first["last_step"]) == ("failed", STEPS)
    assert f"checkpoint-{STEPS} could not be written and does not count: rank 1 (" in first["reason"]
    assert first["reason"].endswith("OSError: [Errno 28] No space left on device")
    assert (second["ended"], second["first_step"], second["last_step"]) == ("done", SAVED, STEPS)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [f"checkpoint-{SAVED}", f"checkpoint-{STEPS}"]
    assert rows(run) == rows(straight)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("harm", ["missing", "empty", "cut"])
def test_a_harmed_file_of_any_kind_is_found(runs: dict[str, RunDir], tmp_path: Path, plan: str, harm: str) -> None:
    folder = Path(shutil.copytree(runs[plan].checkpoints / f"checkpoint-{SAVED}", tmp_path / "checkpoint"))
    names = [*read_json(folder / MANIFEST)["files"], MANIFEST]
    assert len(names) >= 8
    for name in names:
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        if harm != "missing":
            (folder / name).write_bytes(b"" if harm == "empty" else content[: len(content) // 2])
        problem = damage(folder)
        assert problem is not None and name in problem, f"{name}: {problem}"
        (folder / name).write_bytes(content)
    assert damage(folder) is None


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
def test_on_other_processes_the_losses_are_the_same(runs: dict[str, RunDir], name: str) -> None:
    origin, _, plan = MOVED[name]
    run, straight = runs[name], runs[origin]
    (attempt,) = read_jsonl(run.attempts)
    assert (attempt["ended"], attempt["first_step"]) == ("done", SAVED)
    found, wanted = (list(zip(*rows(each), strict=True)) for each in (run, straight))
    loss, norm, weight = BFLOAT16 if origin == "bfloat16" else FLOAT32
    assert found[0] == wanted[0]
    assert found[1][:SAVED] == wanted[1][:SAVED]
    assert found[1] == pytest.approx(wanted[1], rel=loss)
    assert found[2] == pytest.approx(wanted[2], rel=norm)
    assert found[3] == wanted[3]
    mine, theirs = weights(run), weights(straight)
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        assert float((mine[key] - value).float().norm() / value.float().norm()) < weight
    assert plan in (None, read_json(run.checkpoints / f"checkpoint-{STEPS}" / MANIFEST)["plan"])


@pytest.mark.parametrize("name", CUT_ANEW)
def test_nothing_is_left_of_shards_that_were_cut_anew(runs: dict[str, RunDir], name: str) -> None:
    checkpoint = runs[name].checkpoints / f"checkpoint-{SAVED}"
    assert damage(checkpoint) is None
    there = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert there == {*read_json(checkpoint / MANIFEST)["files"], MANIFEST}


def test_shards_of_another_engine_are_refused(runs: dict[str, RunDir]) -> None:
    run = runs["zero3-to-fsdp2"]
    status = run.read_status()
    assert status["state"] == "failed"
    assert status["reason"] == f"checkpoint-{SAVED} was trained with other plan: ['zero3'], now ['fsdp2']"
    assert [step for step, _ in list_checkpoints(run)] == [SAVED], "the checkpoint stays"
    assert not run.model.exists()


def test_the_tool_cuts_a_checkpoint_anew_wherever_it_lies(runs: dict[str, RunDir], tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(runs["zero2"].checkpoints / f"checkpoint-{SAVED}", tmp_path / "c++ (1) [x]"))
    before = sorted(checkpoint.rglob("*"))
    universal.convert(checkpoint, was="zero2", now="zero2", processes=1)
    assert (checkpoint / "latest_universal").read_text() == "universal"
    assert sorted(path.name for path in checkpoint.iterdir() if path not in before) == ["latest_universal", "universal"]
    name = "model.layers.0.mlp.up_proj.weight"
    state = torch.load(checkpoint / "universal" / "zero" / name / "fp32.pt", weights_only=False)
    saved = torch.load(checkpoint / f"global_step{SAVED}" / "mp_rank_00_model_states.pt", weights_only=False)
    assert torch.equal(state["param"], saved["module"][name])
    universal.discard(checkpoint)
    assert sorted(checkpoint.rglob("*")) == before


def test_a_tool_that_fails_leaves_the_checkpoint_as_it_was(runs: dict[str, RunDir], tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(runs["zero2"].checkpoints / f"checkpoint-{SAVED}", tmp_path / "checkpoint"))
    (checkpoint / f"global_step{SAVED}" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(b"torn")
    before = sorted(checkpoint.rglob("*"))
    with pytest.raises(CheckpointError, match=r"could not cut checkpoint anew: .*Error.*\(exit status 1\)"):
        universal.convert(checkpoint, was="zero2", now="zero2", processes=1)
    assert sorted(checkpoint.rglob("*")) == before


def test_a_full_disk_is_told_before_anything_is_written(
    runs: dict[str, RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Path(shutil.copytree(runs["zero3"].checkpoints / f"checkpoint-{SAVED}", tmp_path / "checkpoint"))
    monkeypatch.setattr(universal.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**10))
    monkeypatch.setattr(universal, "run_tool", lambda *anything: pytest.fail("started all the same"))
    with pytest.raises(CheckpointError, match=r"takes 0\.\d+ GiB for a while; .* has 9.54e-07 GiB left"):
        universal.convert(checkpoint, was="zero3", now="zero3", processes=1)
