"""`sync` with a stand-in for the package wandb: what it is asked to upload, and what is said when it does not."""

from __future__ import annotations

import importlib.util
import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_dist.cli_jobs import sync as command
from sft_dist.config.loader import write_config
from sft_dist.config.schema import Config
from sft_dist.errors import SftDistError, explained
from sft_dist.jobs import sync as module
from sft_dist.jobs.sync import PROXIES, recordings
from sft_dist.rundir import RunDir

# Uploads what REFUSE does not name, marks it as wandb does, and ends with 0 whatever happens, as wandb does.
FAKE = """
import json, os, pathlib, sys
print("wandb: Syncing 1 run(s):")
said = os.environ.get("FAKE_SAYS")
if said:
    print(said)
    sys.exit(int(os.environ.get("FAKE_STATUS", "0")))
with pathlib.Path(os.environ["FAKE_ASKED"]).open("a") as stream:
    stream.write(json.dumps(sys.argv[1:]) + "\\n")
for folder in map(pathlib.Path, sys.argv[2:]):
    (file,) = folder.glob("run-*.wandb")
    if os.environ.get("REFUSE", "none") in str(folder):
        print("wandb: ERROR the server is full")
        continue
    if (folder / "torn").exists():
        print(f'wandb: ERROR Failed to sync all data from "some/where/{folder.name}": the file ends with an incomplete record.')
        break
    if (folder / "broken").exists():
        print(f'wandb: ERROR Failed to read "some/where/{folder.name}": transactionlog: error getting next record')
        break
    file.with_name(file.name + ".synced").touch()
    name = file.stem.removeprefix("run-")
    print(f"wandb: [p/{name}] View run at http://wandb.test/e/p/runs/{name}")
"""

Sync = Callable[..., "tuple[int, str, str]"]


@pytest.fixture
def sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sync:
    """`sync("a", REFUSE="a")` calls the command; returns exit status, stdout, stderr. A server listens and says nothing."""
    package = tmp_path / "site" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    listener = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(module, "server", lambda: f"http://127.0.0.1:{listener.getsockname()[1]}")
    monkeypatch.setenv("FAKE_ASKED", str(tmp_path / "asked"))

    def call(*words: str, as_json: bool = False, online: bool = True, **more: str) -> tuple[int, str, str]:
        for name, value in more.items():
            monkeypatch.setenv(name, value)
        if not online:
            monkeypatch.setattr(module, "server", lambda: f"http://127.0.0.1:{unused_port()}")
        try:
            command(list(words) or None, as_json)
        except SftDistError as error:
            told = capsys.readouterr()
            return error.exit_code, told.out, told.err + explained(error)
        told = capsys.readouterr()
        return 0, told.out, told.err

    return call


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[..., RunDir]:
    """`new_run("a", 2)` makes a run that is done, with so many recordings."""

    def make(name: str, attempts: int, state: str = "done") -> RunDir:
        run = RunDir(tmp_path / "runs" / name)
        run.path.mkdir(parents=True)
        run.config.write_text(write_config(Config()))
        run.write_status(state=state)
        for number in range(attempts):
            folder = run.logs / "wandb" / f"offline-run-2026010{number + 1}_000000-{name}"
            folder.mkdir(parents=True)
            (folder / f"run-{name}.wandb").write_text("a header and records")
        return run

    return make


def asked(tmp_path: Path) -> list[str]:
    """The run and the attempt of each call, such as a1."""
    calls = [json.loads(line) for line in (tmp_path / "asked").read_text().splitlines()]
    assert all(call.pop(0) == "sync" for call in calls)
    names = [[Path(word).name for word in call] for call in calls]
    return [f"{name[28:]}{name[19]}" for (name,) in names]


def test_all_attempts_of_a_run_one_by_one_and_none_twice(
    sync: Sync, new_run: Callable[..., RunDir], tmp_path: Path
) -> None:
    new_run("a", 3)
    new_run("b", 1)
    new_run("without", 0)
    code, out, _ = sync()
    assert (code, out.splitlines()) == (
        0,
        [f"{it} uploaded http://wandb.test/e/p/runs/{it[0]}" for it in ("a: 3", "b: 1")],
    )
    assert [it for it in asked(tmp_path) if it != "b1"] == ["a1", "a2", "a3"]
    (tmp_path / "asked").unlink()
    assert sync("a")[:2] == (0, "a: nothing new\n")
    assert not (tmp_path / "asked").exists()


def test_only_what_is_new(sync: Sync, new_run: Callable[..., RunDir], tmp_path: Path) -> None:
    run = new_run("a", 2)
    (run.logs / "wandb" / "offline-run-20260101_000000-a" / "run-a.wandb.synced").touch()
    code, out, _ = sync(as_json=True)
    (facts,) = json.loads(out)["runs"]
    assert (code, facts["before"], len(facts["uploaded"])) == (0, 1, 1)
    assert asked(tmp_path) == ["a2"]


def test_what_a_running_run_writes_stays(sync: Sync, new_run: Callable[..., RunDir], tmp_path: Path) -> None:
    run = new_run("a", 2, state="running")
    with run.locked():
        code, out, _ = sync()
    assert (code, out) == (0, "a: 1 uploaded, 1 in use http://wandb.test/e/p/runs/a\n")
    assert asked(tmp_path) == ["a1"]


def test_what_a_killed_attempt_left_does_not_keep_the_others(
    sync: Sync, new_run: Callable[..., RunDir], tmp_path: Path
) -> None:
    run = new_run("a", 4)
    first, second, third, _ = recordings(run)
    first.file.write_bytes(b":W&B\x00\x00\x00")
    (second.folder / "torn").touch()
    (third.folder / "broken").touch()
    code, out, err = sync()
    assert (code, out) == (1, "a: 2 uploaded, 1 refused http://wandb.test/e/p/runs/a\n")
    assert "Failed to read" in err
    assert asked(tmp_path) == ["a2", "a3", "a4"]
    assert second.uploaded
    assert not third.uploaded


def test_what_wandb_leaves_is_an_error_although_it_ends_well(
    sync: Sync, new_run: Callable[..., RunDir], tmp_path: Path
) -> None:
    new_run("a", 1)
    new_run("b", 2)
    code, out, err = sync(REFUSE="runs/b")
    assert code == 1
    assert sorted(asked(tmp_path)) == ["a1", "b1"], "what comes after it must not stand before it"
    assert "a: 1 uploaded" in out
    assert "b: 2 refused" in out
    assert "did not upload everything: the server is full" in err


def test_nothing_to_sync(sync: Sync, new_run: Callable[..., RunDir]) -> None:
    code, _, err = sync()
    assert (code, "nothing to sync" in err) == (0, True)
    new_run("a", 0)
    code, _, err = sync("a")
    assert code == 2
    assert "tracking.report_to=[wandb]" in err


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("Error: No API key configured. Use `wandb login` to log in.", "1"),
        ("wandb: ERROR Failed to get resume status for run a: returned error 401: {}", "0"),
    ],
)
def test_no_account(sync: Sync, new_run: Callable[..., RunDir], said: str, status: str) -> None:
    new_run("a", 1)
    code, _, err = sync(FAKE_SAYS=said, FAKE_STATUS=status)
    assert code == 3
    assert "wandb login" in err
    assert "WANDB_API_KEY" in err


def test_no_network(sync: Sync, new_run: Callable[..., RunDir]) -> None:
    new_run("a", 1)
    code, _, err = sync(online=False)
    assert code == 3
    assert "cannot be reached from here" in err


def test_no_wandb(sync: Sync, new_run: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch) -> None:
    new_run("a", 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = sync()
    assert code == 3
    assert "pip install 'sft-dist[wandb]'" in err
