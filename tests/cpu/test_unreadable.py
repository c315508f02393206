"""A checkpoint whose bytes are those that were written, but which no library can read: set aside before anything is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sft_dist import stages
from sft_dist.files import read_json, read_jsonl
from sft_dist.rundir import RunDir
from sft_dist.stages import run_here
from sft_dist.train import universal
from sft_dist.train.checkpoint import SET_ASIDE, list_checkpoints
from sft_dist.train.manifest import MANIFEST, damage, write_manifest
from sft_dist.train.ranks import Ranks
from sft_dist.train.resume import unreadable

OPTIONS = (
    "data.train.sample=24",
    "data.eval_size=0",
    "train.eval_strategy=no",
    "train.max_steps=6",
    "model.dtype=float32",
    "checkpoint.save_strategy=steps",
    "checkpoint.save_steps=2",
    "evaluate.before=false",
    "evaluate.after=false",
    "evaluate.data=null",
    "evaluate.labels=[]",
)


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, session_environment: dict[str, str], tiny_model_dir: Path
) -> RunDir:
    from sft_dist.config.loader import load_config

    folder = tmp_path_factory.mktemp("whole")
    run = stages.new_run(load_config("smoke", [f"run.dir={folder}", "run.name=whole", *OPTIONS]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "report_here", lambda run: None)
        run_here(run)
    return run


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def nothing(path: Path) -> None:
    path.write_bytes(b"")


def other_step(path: Path) -> None:
    path.write_text(json.dumps({**read_json(path), "global_step": 5}))


def without_states(path: Path) -> None:
    torch.save({}, path)


LOADED = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
HARMS: list[tuple[str, Callable[[Path], None]]] = [
    *((name, harm) for name in LOADED for harm in (half, nothing)),
    *((name, without_states) for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")),
    ("trainer_state.json", other_step),
]


@pytest.mark.parametrize(("name", "harm"), HARMS, ids=[f"{name}-{harm.__name__}" for name, harm in HARMS])
def test_each_file_that_is_loaded_is_opened_before(
    whole: RunDir, tmp_path: Path, name: str, harm: Callable[[Path], None]
) -> None:
    folder = Path(shutil.copytree(whole.checkpoints / "checkpoint-4", tmp_path / "checkpoint-4"))
    assert unreadable(folder, Ranks()) is None
    harm(folder / name)
    write_manifest(folder, 4, {})
    assert damage(folder) is None, "the manifest vouches for what was written"
    assert str(unreadable(folder, Ranks())).startswith(f"{name} cannot be loaded: ")


def test_half_a_universal_copy_is_no_reason_to_set_a_whole_checkpoint_aside(whole: RunDir, tmp_path: Path) -> None:
    """A process that was killed while it cut the shards anew leaves one; the next attempt makes another."""
    folder = Path(shutil.copytree(whole.checkpoints / "checkpoint-4", tmp_path / "checkpoint-4"))
    for name in (universal.PARTIAL, universal.UNIVERSAL):
        part = folder / name / "zero" / "model.norm.weight" / "fp32.pt"
        part.parent.mkdir(parents=True)
        torch.save({"param": torch.ones(64)}, part)
        half(part)
    assert damage(folder) is None
    assert unreadable(folder, Ranks()) is None


def test_a_run_goes_on_from_the_one_before_with_the_same_losses(
    whole: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stages, "report_here", lambda run: None)
    run = RunDir(Path(shutil.copytree(whole.path, tmp_path / "again")))
    shutil.rmtree(run.model)
    newest = run.checkpoints / "checkpoint-6"
    facts: dict[str, Any] = read_json(newest / MANIFEST)
    without_states(newest / "optimizer.pt")
    write_manifest(newest, 6, facts)
    run_here(run)
    problem = "optimizer.pt cannot be loaded: ValueError: it does not hold param_groups, state"
    assert f"checkpoint-6: {problem}; set aside as torn-checkpoint-6" in caplog.text
    assert (run.checkpoints / "torn-checkpoint-6" / SET_ASIDE).read_text() == f"{problem}\n"
    assert read_jsonl(run.attempts)[-1]["first_step"] == 4
    assert [step for step, _ in list_checkpoints(run)] == [6, 4]
    mine, theirs = (load_file(it.model / "model.safetensors") for it in (run, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
