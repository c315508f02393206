"""Run directories: found by name or path, never overwritten by accident, named so that any shell takes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft_dist.errors import ConfigError, SftDistError
from sft_dist.files import read_json
from sft_dist.rundir import STATES, RunDir, check_run_name, create_run, find_run, runs_root


def made(root: Path, name: str, state: str = "done") -> RunDir:
    run = create_run(root, name)
    run.config.write_text("run: {}\n", encoding="utf-8")
    run.write_status(state=state)
    return run


def test_the_parts_have_the_names_of_the_contract(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "demo")
    parts = {
        "config": "config.yaml", "provenance": "provenance.json", "env": "env.json", "status": "status.json",
        "attempts": "attempts.jsonl", "metrics": "metrics.jsonl", "ledger": "data/ledger.json",
        "checkpoints": "checkpoints", "eval": "eval", "scores": "scores.json", "model": "model",
        "report": "report.html", "loss_plot": "loss.png", "logs": "logs",
    }  # fmt: skip
    assert {part: str(getattr(run, part).relative_to(run.path)) for part in parts} == parts
    assert run.name == "demo"
    assert not run.path.exists(), "naming a run made it"


def test_the_root_is_the_config_then_the_environment_then_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs_root() == Path("runs")
    monkeypatch.setenv("SFT_DIST_RUNS", "")
    assert runs_root() == Path("runs")
    monkeypatch.setenv("SFT_DIST_RUNS", "~/elsewhere")
    assert runs_root() == Path.home() / "elsewhere"
    assert runs_root("/here") == Path("/here")


@pytest.mark.parametrize("state", STATES)
def test_the_status_is_merged(tmp_path: Path, state: str) -> None:
    run = RunDir(tmp_path / "a")
    assert run.read_status() == {}
    run.write_status(state=state, step=3)
    run.write_status(reason="because")
    status = run.read_status()
    assert status.pop("updated")
    assert status == {"state": state, "step": 3, "reason": "because"}
    assert read_json(run.status)["state"] == state


@pytest.mark.parametrize("left", ["", '{"state": "runn', "\0\0\0", "[]"])
def test_a_status_that_a_failed_machine_left_empty_or_torn_is_none(left: str, tmp_path: Path) -> None:
    """Progress is not synced: its rename may survive what its content does not."""
    run = RunDir(tmp_path)
    run.status.write_text(left)
    assert run.read_status() == {}
    run.write_status(state="running", step=3)
    assert run.read_status()["step"] == 3


def test_only_the_five_states_are_written(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a")
    run.write_status(state="running")
    with pytest.raises(ValueError, match="'finished' is not one of queued, running, stopped, failed, done"):
        run.write_status(state="finished")
    assert run.read_status()["state"] == "running"


def test_a_new_run_gets_its_folder(tmp_path: Path) -> None:
    run = create_run(tmp_path / "not" / "yet", "demo")
    assert run.path == tmp_path / "not" / "yet" / "demo"
    assert run.path.is_dir()
    assert create_run(tmp_path / "not" / "yet", "demo") == run, "an empty folder is no run"


def test_an_existing_run_is_refused_with_its_state_and_three_choices(tmp_path: Path) -> None:
    run = made(tmp_path, "demo", "stopped")
    with pytest.raises(ConfigError, match="never overwritten by accident") as refused:
        create_run(tmp_path, "demo")
    assert "state: stopped" in str(refused.value)
    assert len(refused.value.problems) == 3
    for choice in (f"sft-dist resume {run.path}", "run.name=ANOTHER_NAME", "--overwrite"):
        assert choice in str(refused.value)
    assert refused.value.exit_code == 2
    assert run.read_status()["state"] == "stopped"


def test_overwrite_deletes_the_old_run_and_nothing_else(tmp_path: Path) -> None:
    run, other = made(tmp_path, "demo"), made(tmp_path, "demo2")
    (run.path / "checkpoints").mkdir()
    create_run(tmp_path, "demo", overwrite=True)
    assert list(run.path.iterdir()) == []
    assert other.config.is_file()


def test_overwrite_leaves_a_folder_alone_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"jpg")
    with pytest.raises(SftDistError, match="not a run of sft-dist"):
        create_run(tmp_path, "photos", overwrite=True)
    assert (tmp_path / "photos" / "holiday.jpg").is_file()


def test_overwrite_of_a_link_leaves_what_it_points_to(tmp_path: Path) -> None:
    """Runs are linked to scratch disks; deleting through the link must not go half way."""
    run = made(tmp_path / "scratch", "demo")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(run.path)
    try:
        create_run(tmp_path / "runs", "demo", overwrite=True)
    except (SftDistError, OSError):
        assert run.config.is_file(), "refused, but some of it is gone"
    assert run.path.is_dir()


@pytest.mark.parametrize("name", ["demo", "Demo-1.2_x", "0", "a" * 120])
def test_good_names(name: str) -> None:
    check_run_name(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "-rf", "a/b", "a b", "a\n", "a$b", "\u00fcber", "a" * 121, "a\\b", "a*"]
)
def test_bad_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.name"):
        create_run(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_found_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    run = made(root, "demo")
    monkeypatch.setenv("SFT_DIST_RUNS", str(root))
    assert find_run("demo").path == run.path
    assert find_run(str(run.path)).path == run.path
    assert find_run("root/demo").path == Path("root/demo")
    monkeypatch.delenv("SFT_DIST_RUNS")
    made(tmp_path / "runs", "local")
    assert find_run("local").path == Path("runs/local")


def test_an_unknown_run_is_refused_with_the_runs_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run named 'demo'") as refused:
        find_run("demo")
    assert "there are no runs in runs" in str(refused.value)
    for name in ("b", "a"):
        made(tmp_path / "runs", name)
    (tmp_path / "runs" / "no-run").mkdir()
    with pytest.raises(ConfigError) as refused:
        find_run("demo")
    assert "runs in runs: a, b" in str(refused.value)
    assert "no-run" not in str(refused.value)
    for number in range(12):
        made(tmp_path / "runs", f"c{number}")
    with pytest.raises(ConfigError, match=r"c7 and 2 more$"):
        find_run("demo")


def test_a_path_is_one_word_in_commands_to_type() -> None:
    assert [RunDir(Path(path)).quoted for path in ("runs/a", "my runs/a")] == ["runs/a", "'my runs/a'"]
