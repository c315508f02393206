"""`sync` with the real wandb client against a stand-in for its server, which answers as far as an upload needs it to."""

from __future__ import annotations

import gzip
import http.server
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sft_dist.jobs.sync import recordings
from sft_dist.rundir import RunDir
from sft_dist.train.trackers import wandb_run_id

if TYPE_CHECKING:
    from tests.conftest import RunCli
    from tests.cpu.conftest import Serve

pytest.importorskip("wandb")
NewRun = Callable[..., RunDir]
# One attempt: the steps as they are named by the training, and the values. With `kill` it ends as on a node that fails.
ATTEMPT = """
import os, pathlib, sys, time, wandb
first, last, kill = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
run = wandb.init(project="proj")
for step in range(first, last):
    wandb.log({"loss": float(step), "train/global_step": step, **{f"{name} {step}": name * step for name in range(kill and 40 or 1)}})
if kill:
    (file,) = pathlib.Path(run.settings.sync_dir).glob("*.wandb")
    while file.stat().st_size < int(kill[0]):
        time.sleep(0.1)
    os.kill(os.getpid(), 9)
wandb.finish()
"""
PROJECT = {"id": "P", "name": "proj", "entity": {"id": "E", "name": "me"}}


class Server(http.server.ThreadingHTTPServer):
    """Keeps each run's lines of history at the places that the client gives them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.history: dict[str, dict[int, dict[str, Any]]] = {}
        self.summary: dict[str, str] = {}
        self.resumed: list[int] = []
        """How many lines there were each time that a client asked."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        if operation == "RunResumeStatus":
            lines = self.history.get(given["name"], {})
            self.resumed.append(len(lines))
            bucket = {
                "id": "R",
                "name": given["name"],
                "summaryMetrics": "{}",
                "displayName": "run",
                "logLineCount": 0,
                "historyLineCount": len(lines),
                "eventsLineCount": 0,
                "historyTail": json.dumps([json.dumps(lines[max(lines)])] if lines else []),
                "eventsTail": "[]",
                "config": "{}",
                "tags": [],
                "notes": "",
                "wandbConfig": json.dumps({"t": 1}),
            }
            return {"model": {**PROJECT, "bucket": bucket if lines else None}}
        if operation == "UpsertBucket":
            bucket = {"id": "R", "name": given["name"], "displayName": "run", "config": "{}", "project": PROJECT}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.address}/upload"} for name in given["files"]]
            return {"createRunFiles": {"runID": "R", "uploadHeaders": [], "files": files}}
        return {}

    def stream(self, name: str, files: dict[str, Any]) -> None:
        part = files.get("wandb-history.jsonl", {"offset": 0, "content": []})
        for number, line in enumerate(part["content"], part["offset"]):
            self.history.setdefault(name, {})[number] = json.loads(line)


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            answer = {"data": self.server.answer(asked["operationName"], asked.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            self.server.stream(self.path.split("/")[-2], json.loads(body).get("files") or {})
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture
def server(serve: Serve) -> Server:
    return serve(Server())


@pytest.fixture
def account(server: Server, tmp_path: Path, no_proxy: dict[str, str | None]) -> dict[str, str | None]:
    """The environment of someone with a key for that server, and without settings of their own."""
    return {"HOME": str(tmp_path), "WANDB_BASE_URL": server.address, "WANDB_API_KEY": "a" * 40, **no_proxy}


def attempt(run: RunDir, first: int, last: int, *kill: str) -> None:
    """As the worker's tracker has it recorded: the same run of wandb each time, in the run's folder."""
    import os

    run.logs.mkdir(parents=True, exist_ok=True)
    tracked = {"WANDB_MODE": "offline", "WANDB_DIR": str(run.logs), "WANDB_SILENT": "true"}
    resumed = {"WANDB_RUN_ID": wandb_run_id(run), "WANDB_RESUME": "allow"}
    words = [sys.executable, "-c", ATTEMPT, str(first), str(last), *kill]
    done = subprocess.run(words, env={**os.environ, **tracked, **resumed, "HOME": str(run.path)}, check=False)
    assert done.returncode == (-9 if kill else 0)


def steps(server: Server, run: RunDir) -> list[int]:
    lines = server.history[wandb_run_id(run)]
    assert sorted(lines) == list(range(len(lines)))
    return [lines[number]["train/global_step"] for number in sorted(lines)]


def test_all_attempts_become_one_curve_and_a_later_one_goes_on_with_it(
    new_run: NewRun, server: Server, account: dict[str, str | None], run_cli: RunCli
) -> None:
    run = new_run("tracking.report_to=[wandb]")
    attempt(run, 0, 1, "1")
    attempt(run, 0, 200, "65536")
    (torn,) = (it.file for it in recordings(run))
    with torn.open("r+b") as stream:
        stream.truncate(torn.stat().st_size - 10)  # in the middle of a record, wherever it was killed
    attempt(run, 200, 202)
    ended = run_cli("sync", env=account)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    name = wandb_run_id(run)
    assert ended.stdout == f"run: 2 uploaded {server.address}/me/proj/runs/{name}\n"
    assert all(it.uploaded for it in recordings(run))
    *whole, last, done = steps(server, run)
    assert (last, done) == (200, 201)
    assert 0 < len(whole) < 200, "the second attempt was not cut short"
    assert whole == list(range(len(whole)))
    attempt(run, 202, 204)
    assert run_cli("sync", "run", env=account).returncode == 0
    assert steps(server, run) == [*whole, 200, 201, 202, 203]
    assert server.resumed == [0, len(whole), len(whole) + 2]


def test_no_key(new_run: NewRun, account: dict[str, str | None], run_cli: RunCli) -> None:
    run = new_run("tracking.report_to=[wandb]")
    attempt(run, 0, 1)
    done = run_cli("sync", env={**account, "WANDB_API_KEY": None})
    assert done.returncode == 3
    assert "No API key" in done.stderr
    assert "wandb login" in done.stderr
    assert not any(it.uploaded for it in recordings(run))
