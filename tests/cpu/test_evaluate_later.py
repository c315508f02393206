"""What a run is asked after it was made: sets that came into its config later, by hand or by `sft-dist evaluate RUN key=value`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_dist import cli_evaluate
from sft_dist.config.loader import load_config, load_run_config, write_config
from sft_dist.config.resubmit import with_evaluate
from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError
from sft_dist.evaluate import tracked
from sft_dist.evaluate.held_out import read_held_out
from sft_dist.files import read_json, read_jsonl
from sft_dist.rundir import RunDir

CallCli = Callable[..., int]
MORE = "evaluate.sets=[{name: sums, data: sums.jsonl, metrics: [numeric]}]"
SMALL = (
    "train.max_steps=1",
    "train.eval_strategy=no",
    "data.eval_size=0",
    "data.train.sample=8",
    "evaluate.data.rows=3",
    "evaluate.questions=[]",
    "evaluate.generation.max_new_tokens=2",
)


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, session_environment: dict[str, str], tiny_model_dir: Path
) -> Path:
    from sft_dist.stages import new_run, run_here

    run = new_run(load_config("smoke", [f"run.dir={tmp_path_factory.mktemp('trained')}", *SMALL]))
    run_here(run)
    return run.path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> RunDir:
    """A copy of the finished run; the working directory holds three rows more."""
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(3)]
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return RunDir(Path(shutil.copytree(trained, tmp_path / "runs" / "smoke")))


def sets(run: RunDir) -> dict[str, tuple[int, set[str]]]:
    """Of each set how many rows were scored, and for which models."""
    found = read_json(run.scores)["sets"]
    sides = {"before", "after"}
    return {name: (part["n"], sides & set(next(iter(part["scores"].values())))) for name, part in found.items()}


BOTH = {"before", "after"}


def test_a_finished_model_is_scored_on_another_set_and_so_is_the_base(
    run: RunDir, call_cli: CallCli, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[RunDir] = []
    monkeypatch.setattr(tracked, "tell_trackers", lambda config, run: told.append(run))
    kept, page = run.held_out.read_text(), run.report.read_text()
    assert call_cli("evaluate", run.path, MORE) == 0
    shown = capsys.readouterr()
    assert "the base model was not asked sums" in shown.err
    assert "Set sums" in shown.out
    assert sets(run) == {"data": (3, BOTH), "sums": (3, BOTH)}
    assert run.held_out.read_text().startswith(kept), "the rows that were there stay as they are"
    assert load_run_config(run.config).evaluate.sets[0].data.path == str(Path("sums.jsonl").resolve())
    assert read_json(run.provenance)["evaluate.sets"] == "cli"
    assert read_json(run.provenance)["train.max_steps"] == "cli"
    assert "sums" in run.report.read_text() != page
    assert [one.path for one in told] == [run.path], "trackers hear of later scores"


def test_rows_of_a_set_that_was_written_into_the_config_are_read(run: RunDir, call_cli: CallCli) -> None:
    config = with_evaluate(load_run_config(run.config), [MORE])
    run.config.write_text(write_config(config))
    assert call_cli("evaluate", run.path) == 0
    assert len(read_held_out(run, "sums")) == 3
    assert sets(run) == {"data": (3, BOTH), "sums": (3, BOTH)}


def test_the_base_is_asked_under_the_same_settings(run: RunDir, call_cli: CallCli) -> None:
    before = read_jsonl(run.eval / "asked-before.jsonl")
    assert call_cli("evaluate", run.path, "evaluate.generation.max_new_tokens=4") == 0
    assert len(read_jsonl(run.eval / "asked-before.jsonl")) > len(before)
    assert load_run_config(run.config).evaluate.generation.max_new_tokens == 4


@pytest.mark.parametrize(
    ("words", "said", "status"),
    [
        (["train.max_steps=3"], "train   cannot change: the run was made with another value", 2),
        (["evaluate.sets=[{name: a, data: sums.jsonl, metrics: [jsno]}]"], "did you mean json?", 2),
        (["evaluate.set=[]"], "evaluate.set   unknown key", 2),
        (["evaluate.sets=[{name: a, data: sums.jsonl, metrics: [json]}]"], "the expected answer is no JSON object", 4),
        (["evaluate.sets=[{name: a, data: nowhere.jsonl}]"], "nowhere.jsonl", 4),
        (["evaluate.sets=[{name: a, data: sums.jsonl, metrics: ['no_module:f']}]"], "cannot be imported", 2),
        (["evaluate.data.rows=5"], "the rows of the set data are kept in the run", 2),
        (["evaluate.system=Be brief"], "the rows of the set data are kept in the run", 2),
        (["evaluate.labels=[refund]"], "is not one of evaluate.labels ['refund']", 4),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_written(
    words: list[str], said: str, status: int, run: RunDir, call_cli: CallCli, capsys: pytest.CaptureFixture[str]
) -> None:
    there = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert call_cli("evaluate", run.path, *words) == status
    assert said in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == there


def test_without_a_final_model_nothing_is_written_either(
    run: RunDir, call_cli: CallCli, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.model / "DONE").unlink()
    config = run.config.read_bytes()
    assert call_cli("evaluate", run.path, MORE) == 5
    assert "--before asks the base model" in capsys.readouterr().err
    assert run.config.read_bytes() == config
    assert call_cli("evaluate", run.path, MORE, "--before") == 0
    assert {row["set"] for row in read_jsonl(run.eval / "before.jsonl")} == {"data", "sums"}


def test_a_run_at_work_is_left_alone(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    from sft_dist.jobs import admission

    def live(_: Any) -> None:
        raise ConfigError("run smoke is not stopped")

    monkeypatch.setattr(admission, "refuse_live", live)
    config = run.config.read_bytes()
    with pytest.raises(ConfigError, match="not stopped"):
        cli_evaluate.evaluated(str(run.path), [MORE])
    assert run.config.read_bytes() == config


def test_another_source_of_evaluate_data_takes_nothing_of_the_one_before() -> None:
    config = load_config("smoke").config
    Path("rows.jsonl").touch()
    changed = with_evaluate(config, ["evaluate.data=rows.jsonl", "evaluate.labels=[]"])
    assert changed.evaluate.data is not None
    assert (changed.evaluate.data.task, changed.evaluate.data.path) == (None, str(Path("rows.jsonl").resolve()))
    assert changed == Config.model_validate({**config.model_dump(), "evaluate": changed.evaluate.model_dump()})


def test_what_is_gone_since_the_run_was_made_does_not_matter() -> None:
    template = Path("mine.jinja")
    template.write_text("x")
    config = load_config("smoke", ["model.chat_template=mine.jinja"]).config
    template.unlink()
    assert with_evaluate(config, ["evaluate.questions=[Hello]"]).evaluate.questions == ("Hello",)
