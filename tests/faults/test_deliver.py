"""`sft-dist export`: a proven copy in a folder, an upload that a stand-in for the Hub holds, and what is refused."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import pytest

from sft_dist.errors import CheckpointError, DiskError
from sft_dist.evaluate.deliver import deliver
from sft_dist.evaluate.prove import prove
from sft_dist.files import read_json
from sft_dist.rundir import RunDir
from sft_dist.stages import run_here

if TYPE_CHECKING:
    from tests.conftest import RunCli
    from tests.cpu.conftest import NewRun, Serve

PLAIN = (
    "train.max_steps=2",
    "evaluate.before=false",
    "evaluate.after=false",
    "evaluate.data=null",
    "evaluate.labels=[]",
)


@pytest.fixture
def done(new_run: NewRun) -> RunDir:
    run = new_run(*PLAIN, "checkpoint.verify_export=files")
    run_here(run)
    return run


class Writable(http.server.ThreadingHTTPServer):
    """As much of the Hub as an upload asks for: weights by LFS, other files in the commit itself.

    `damaged` is a file that it keeps wrongly.
    """

    def __init__(self, token: str = "secret", damaged: str = "") -> None:
        super().__init__(("127.0.0.1", 0), WritableHandler)
        self.token, self.damaged = token, damaged
        self.files: dict[str, bytes] = {
            "model-00001-of-00002.safetensors": b"of an earlier upload",
            "other/model.safetensors": b"of somebody else",
        }
        self.objects: dict[str, bytes] = {}
        self.private = True
        self.asked: list[dict[str, Any]] = []


class WritableHandler(http.server.BaseHTTPRequestHandler):
    server: Writable

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        path = unquote(urlsplit(self.path).path)
        if self.headers.get("authorization") != f"Bearer {self.server.token}":
            return self.answer(401, {"error": "Invalid credentials"})
        if path == "/api/repos/create":
            self.server.asked.append(json.loads(body))
            return self.answer(200, {"url": f"http://{self.headers['host']}/me/tickets", "name": "me/tickets"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            files = [
                {"path": it["path"], "uploadMode": "lfs" if is_large(it["path"]) else "regular", "shouldIgnore": False}
                for it in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if path == "/me/tickets.git/info/lfs/objects/batch":
            put = f"http://{self.headers['host']}/objects"
            wanted = [
                {**it, "actions": {"upload": {"href": f"{put}/{it['oid']}"}}} for it in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": wanted})
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] in ("file", "lfsFile"):
                    large = line["key"] == "lfsFile"
                    content = self.server.objects[value["oid"]] if large else base64.b64decode(value["content"])
                    kept = content + b" " if value["path"] == self.server.damaged else content
                    self.server.files[value["path"]] = kept
                elif line["key"] == "deletedFile":
                    self.server.files.pop(value["path"])
                else:
                    self.server.asked.append(value)
            where = f"http://{self.headers['host']}/me/tickets/commit/{'0' * 40}"
            return self.answer(200, {"commitUrl": where, "commitOid": "0" * 40, "success": True})
        return self.answer(404, {"error": path})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["content-length"]))
        self.server.objects[self.path.removeprefix("/objects/")] = content
        self.answer(200, {})

    def do_GET(self) -> None:
        if re.fullmatch(r"/api/models/me/tickets/tree/[^/]+", urlsplit(self.path).path):
            entries = [self.entry(name, content) for name, content in self.server.files.items()]
            return self.answer(200, entries)
        if re.fullmatch(r"/api/models/me/tickets(/revision/.*)?", urlsplit(self.path).path):
            siblings = [{"rfilename": name} for name in self.server.files]
            return self.answer(
                200,
                {"id": "me/tickets", "sha": "0" * 40, "siblings": siblings, "tags": [], "private": self.server.private},
            )
        return self.answer(404, {"error": self.path})

    def entry(self, name: str, content: bytes) -> dict[str, Any]:
        oid = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        found = {"type": "file", "path": name, "size": len(content), "oid": oid}
        # What git holds of a large file is a pointer to it, and `oid` is the pointer's.
        pointed = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return {**found, "oid": "1" * 40, "lfs": pointed} if is_large(name) else found

    def answer(self, status: int, content: Any) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *words: Any) -> None:
        pass


def is_large(name: str) -> bool:
    return name.endswith(".safetensors")


def online(
    hub: Writable, no_proxy: dict[str, str | None], tmp_path: Path, token: str = "secret"
) -> dict[str, str | None]:
    address = f"http://127.0.0.1:{hub.server_address[1]}"
    return {
        "HF_HUB_OFFLINE": None, "HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1", **no_proxy,
    }  # fmt: skip


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_gets_a_proven_copy(done: RunDir, run_cli: RunCli, tmp_path: Path) -> None:
    target = tmp_path / "models" / "tickets"
    said = run_cli("export", done.path, "--to", target)
    assert (said.returncode, said.stdout.strip()) == (0, str(target)), said.stderr
    assert files_of(target) == files_of(done.model)
    prove(target)
    again = run_cli("export", done.path, "--to", target)
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_a_damaged_model_stays_where_it_is(done: RunDir, run_cli: RunCli, tmp_path: Path) -> None:
    weights = done.model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    said = run_cli("export", done.path, "--to", tmp_path / "there")
    assert said.returncode == 5
    assert "is damaged, and stays where it is" in said.stderr
    assert not (tmp_path / "there").exists()


def test_a_copy_that_arrived_otherwise_is_removed(
    done: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree

    def badly(source: Path, target: Path, **words: Any) -> Path:
        copy(source, target, **words)
        weights = target / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-100] ^= 1
        weights.write_bytes(content)
        return target

    monkeypatch.setattr(shutil, "copytree", badly)
    with pytest.raises(CheckpointError, match="is not what was trained, and is removed"):
        deliver(done, str(tmp_path / "models" / "tickets"))
    assert list((tmp_path / "models").iterdir()) == []


def test_a_run_without_a_model_is_refused(new_run: NewRun, run_cli: RunCli, tmp_path: Path) -> None:
    said = run_cli("export", new_run(*PLAIN).path, "--to", tmp_path / "there")
    assert said.returncode == 5
    assert "has no final model" in said.stderr
    assert "sft-dist resume" in said.stderr


def test_no_room_for_the_copy(done: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(DiskError, match="GB free"):
        deliver(done, str(tmp_path / "there"))
    assert not (tmp_path / "there").exists()


def test_the_hub_holds_what_was_trained(
    done: RunDir, run_cli: RunCli, serve: Serve, no_proxy: dict[str, str | None], tmp_path: Path
) -> None:
    hub = serve(Writable())
    said = run_cli("export", done.path, "--to", "hub:me/tickets", env=online(hub, no_proxy, tmp_path))
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip().endswith("/me/tickets")
    expected = {**files_of(done.model), "other/model.safetensors": b"of somebody else"}
    del expected["PROOF.json"]
    proof = hub.files.pop("PROOF.json")
    assert hub.files == expected, "and no weights of an earlier upload, but what others have put there"
    assert json.loads(proof)["tensors"] == read_json(done.model / "PROOF.json")["tensors"]
    assert hub.asked[0].get("visibility", "private" if hub.asked[0].get("private") else "public") == "private"
    assert "step 2" in hub.asked[1]["summary"]
    assert list(hub.objects.values()) == [(done.model / "model.safetensors").read_bytes()]


@pytest.mark.parametrize("merge", ["true", "false"])
def test_no_row_and_no_folder_of_this_machine_is_uploaded(
    merge: str,
    new_run: NewRun,
    run_cli: RunCli,
    serve: Serve,
    no_proxy: dict[str, str | None],
    tiny_model_dir: Path,
    tmp_path: Path,
) -> None:
    base = shutil.copytree(tiny_model_dir, tmp_path / "secret-place" / "tiny-base")
    run = new_run(*PLAIN, f"model.name={base}", f"model.lora={{r: 2, merge: {merge}}}", "checkpoint.verify_export=full")
    run_here(run)
    rows = read_json(run.model / "PROOF.json")["logits"]["rows"]
    assert rows, "or there is nothing to keep back"
    hub = serve(Writable())
    said = run_cli("export", run.path, "--to", "hub:me/tickets", "--public", env=online(hub, no_proxy, tmp_path))
    assert said.returncode == 0, said.stderr
    texts = {name: content for name, content in hub.files.items() if not is_large(name)}
    assert {"PROOF.json", "README.md", "adapter/adapter_config.json"} <= texts.keys()
    for name, content in texts.items():
        assert b"secret-place" not in content, name
        assert str(rows[0][:8]).encode() not in content and str(rows[0][:8]).replace(" ", "").encode() not in content
    assert "rows" not in str(json.loads(texts["PROOF.json"])["logits"])
    assert b"tiny-base" in texts["README.md"]
    assert json.loads(texts["adapter/adapter_config.json"])["base_model_name_or_path"] == "tiny-base"
    fetched = tmp_path / "fetched"
    for name, content in hub.files.items():
        if not name.startswith(("other/", "model-0")):
            (fetched / name).parent.mkdir(parents=True, exist_ok=True)
            (fetched / name).write_bytes(content)
    assert "not l" in prove(fetched)["stops"], "who fetches it can prove what is there"
    (fetched / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="tokenizer"):
        prove(fetched)


def test_a_public_repository_gets_nothing_by_accident(
    done: RunDir, run_cli: RunCli, serve: Serve, no_proxy: dict[str, str | None], tmp_path: Path
) -> None:
    hub = serve(Writable())
    hub.private = False
    env = online(hub, no_proxy, tmp_path)
    said = run_cli("export", done.path, "--to", "hub:me/tickets", env=env)
    assert said.returncode == 2
    assert "is there and public" in said.stderr
    assert len(hub.files) == 2
    assert run_cli("export", done.path, "--to", "hub:me/tickets", "--public", env=env).returncode == 0


def test_a_model_without_a_proof_stays(done: RunDir, run_cli: RunCli, tmp_path: Path) -> None:
    (done.model / "PROOF.json").unlink()
    said = run_cli("export", done.path, "--to", tmp_path / "there")
    assert said.returncode == 5
    assert "cannot be proven" in said.stderr


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_what_arrived_otherwise_does_not_count(
    file: str, done: RunDir, run_cli: RunCli, serve: Serve, no_proxy: dict[str, str | None], tmp_path: Path
) -> None:
    hub = serve(Writable(damaged=file))
    said = run_cli("export", done.path, "--to", "hub:me/tickets", env=online(hub, no_proxy, tmp_path))
    assert said.returncode == 5
    assert f"{file} is different" in said.stderr


def test_who_may_not_write_is_told_how_to_log_in(
    done: RunDir, run_cli: RunCli, serve: Serve, no_proxy: dict[str, str | None], tmp_path: Path
) -> None:
    env = online(serve(Writable()), no_proxy, tmp_path, token="wrong")
    said = run_cli("export", done.path, "--to", "hub:me/tickets", env=env)
    assert said.returncode == 5
    assert "hf auth login" in said.stderr
    assert "wrong" not in said.stderr, "a token is no word for a screen"
    no_network = {**env, "HF_ENDPOINT": "http://127.0.0.1:9"}
    said = run_cli("export", done.path, "--to", "hub:me/tickets", env=no_network)
    assert said.returncode == 5
    assert "was not uploaded" in said.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--to", "hub:me/tickets"), "HF_HUB_OFFLINE is set"),
        (("--to", "there", "--public"), "--public is for repositories"),
        (("--to", ""), "--to is empty"),
        (("--to", " "), "--to is empty"),
        (("--to", "s3://bucket/x"), "folders and to Hugging Face's Hub only"),
        (("--to", "HUB:me/tickets"), "folders and to Hugging Face's Hub only"),
        (("--to", "hub:"), "--to hub: names no repository"),
        (("--to", "hub:a/b/c"), "--to hub:OWNER/NAME"),
        (("--to", "x" * 5000), "File name too long"),
        (("--to", "{run}/model"), "in the run's own model folder"),
        (("--to", "{run}/model/a/b"), "in the run's own model folder"),
        (("--to", "{run}/status.json/a"), "is a file"),
        (("--to", "{run}"), "exists already"),
    ],
)
def test_what_cannot_be_meant_is_refused(words: tuple[str, ...], said: str, done: RunDir, run_cli: RunCli) -> None:
    before = files_of(done.path)
    found = run_cli("export", done.path, *(word.replace("{run}", str(done.path)) for word in words))
    assert found.returncode == 2
    assert said in " ".join(found.stderr.split())
    assert len(found.stderr) < 1000
    assert files_of(done.path) == before
    assert not Path("s3:").exists()
