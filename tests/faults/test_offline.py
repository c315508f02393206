"""What nodes without a network need is fetched by `submit`, or named as missing before anything is submitted."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import pytest

if TYPE_CHECKING:
    from tests.conftest import RunCli
    from tests.cpu.conftest import Serve

MODEL, DATASET, HELD_OUT = "lab/tiny", "lab/rows", "lab/questions"
SHA = "0123456789abcdef0123456789abcdef01234567"
FIELDS = (
    f"model.name={MODEL}",
    f"data.train={DATASET}",
    f"evaluate.data={HELD_OUT}",
    "evaluate.labels=[]",
    "run.name=far",
    "train.max_steps=2",
)


class Hub(http.server.ThreadingHTTPServer):
    """As much of the Hub as the libraries ask of it: `models/NAME/FILE` and `datasets/NAME/FILE` below a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.folder = folder

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def entry(self, path: Path) -> dict[str, Any]:
        content = path.read_bytes()
        return {"type": "file", "path": path.name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


class HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if found := re.fullmatch(r"/api/(models|datasets)/(\w+/\w+)(?:/(revision|tree|paths-info)/[^/]+)?(/.*)?", path):
            folder = self.server.folder / found[1] / found[2]
            files = sorted(folder.iterdir()) if folder.is_dir() else []
            if not files:
                self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            elif found[4]:
                self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            elif found[3] in ("tree", "paths-info"):
                asked = set(re.findall(r"[\w.-]+\.\w+", unquote(body.decode())))
                wanted = [file for file in files if found[3] == "tree" or file.name in asked]
                self.answer(200, json.dumps([self.server.entry(file) for file in wanted]).encode())
            else:
                siblings = [{"rfilename": file.name} for file in files]
                facts = {"id": found[2], "sha": SHA, "siblings": siblings, "private": False, "tags": []}
                self.answer(200, json.dumps(facts).encode())
        elif found := re.fullmatch(r"/(datasets/)?(\w+/\w+)/resolve/[^/]+/([\w.-]+)", path):
            file = self.server.folder / (found[1] or "models/") / found[2] / found[3]
            if file.is_file():
                etag = self.server.entry(file)["oid"]
                self.answer(200, file.read_bytes(), {"X-Repo-Commit": SHA, "ETag": f'"{etag}"'})
            else:
                self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA})
        else:
            self.answer(404, b"")

    do_HEAD = do_POST = do_GET

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {
            "content-type": "application/json",
            "content-length": str(len(content)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture
def hub(serve: Serve, tmp_path: Path, tiny_model_dir: Path) -> Hub:
    """A Hub with the tiny model, rows to train on, and rows to score."""
    folder = tmp_path / "hub"
    shutil.copytree(tiny_model_dir, folder / "models" / MODEL)
    for name, count in ((DATASET, 12), (HELD_OUT, 3)):
        (folder / "datasets" / name).mkdir(parents=True)
        rows = [{"prompt": f"{number}?", "completion": f"{number}!"} for number in range(count)]
        (folder / "datasets" / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return serve(Hub(folder))


@pytest.fixture(autouse=True)
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without SLURM is refused before anything is looked for. It refuses whatever it is given."""
    pytest.importorskip("submitit")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


@pytest.fixture
def login(hub: Hub, tmp_path: Path, no_proxy: dict[str, str | None]) -> dict[str, str | None]:
    """The environment of a login node, which has a network and a cache of its own."""
    return {"HF_HUB_OFFLINE": None, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), **no_proxy}


def test_everything_is_fetched_and_the_job_needs_no_network(
    run_cli: RunCli, login: dict[str, str | None], hub: Hub, tmp_path: Path
) -> None:
    done = run_cli("submit", "smoke", *FIELDS, "--local", "--wait", env=login)
    logs = "".join(path.read_text() for path in (tmp_path / "runs" / "far" / "slurm").glob("*_log.err"))
    assert done.returncode == 0, done.stderr + logs
    assert (tmp_path / "hf" / "hub" / "models--lab--tiny" / "snapshots" / SHA / "model.safetensors").is_file()
    assert len((tmp_path / "runs" / "far" / "eval" / "held_out.jsonl").read_text().splitlines()) == 3
    assert (tmp_path / "runs" / "far" / "model" / "DONE").is_file()


@pytest.mark.parametrize(
    ("field", "named"), [("model.name", "lab/none"), ("data.train", "lab/none"), ("evaluate.data", "lab/none")]
)
def test_what_the_hub_has_not_is_named_before_anything_is_submitted(
    run_cli: RunCli, login: dict[str, str | None], tmp_path: Path, field: str, named: str
) -> None:
    done = run_cli("submit", "smoke", *FIELDS, f"{field}={named}", env=login)
    assert done.returncode in (3, 4), done.stderr
    assert named in done.stderr
    assert not (tmp_path / "runs").exists()


def test_weights_that_are_half_there_are_named(run_cli: RunCli, login: dict[str, str | None], hub: Hub) -> None:
    folder = hub.folder / "models" / MODEL
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors").rename(folder / names["a"])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    done = run_cli("submit", "smoke", *FIELDS, env=login)
    assert done.returncode == 3, done.stderr
    assert "of its weights model-00002-of-00002.safetensors is not in" in done.stderr
    assert "hf download" in done.stderr


def test_without_a_network_the_cache_must_have_it(run_cli: RunCli, tmp_path: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = run_cli("submit", "smoke", *FIELDS, env=offline)
    assert done.returncode == 3
    assert "lab/tiny" in done.stderr
    assert "hf download" in done.stderr
