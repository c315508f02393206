"""`sft-dist verify`: every checkpoint of a run against its manifest, without torch and without changing anything."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sft_dist.cli import main
from sft_dist.rundir import RunDir
from sft_dist.train.checkpoint import set_aside
from sft_dist.train.manifest import MANIFEST, write_manifest

CONTENT = {"model.safetensors": b"weights" * 100, "optimizer.pt": b"states" * 100, "deep/er/part": b"x" * 64}


def save(run: RunDir, step: int, *, manifest: bool = True) -> Path:
    folder = run.checkpoints / f"checkpoint-{step}"
    for name, content in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    if manifest:
        write_manifest(folder, step, {})
    return folder


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    run.config.write_text("{}")
    return run


@pytest.fixture
def verify(run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`verify("--json")`: exit status, stdout and stderr of the command."""

    def call(*flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sft-dist", "verify", str(run.path), *flags])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return call


def everything(run: RunDir) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def test_whole_checkpoints_get_a_line_each(run: RunDir, verify: Any) -> None:
    for step in (5, 10):
        save(run, step)
    status, out, err = verify()
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "checkpoint-10: complete, 3 files, 0.0013 MiB",
        "checkpoint-5: complete, 3 files, 0.0013 MiB",
        "resume takes checkpoint-10",
    ]


@pytest.mark.parametrize("name", [*CONTENT, MANIFEST])
@pytest.mark.parametrize("harm", ["missing", "empty", "cut"])
def test_a_damaged_file_is_named_and_nothing_is_changed(run: RunDir, verify: Any, name: str, harm: str) -> None:
    save(run, 5)
    path = save(run, 10) / name
    content = path.read_bytes()
    path.unlink()
    if harm != "missing":
        path.write_bytes(b"" if harm == "empty" else content[:-1])
    if (name, harm) == (MANIFEST, "cut"):
        path.write_bytes(content[:-3])  # the last two are a brace and the end of the line
    before = everything(run)
    status, out, err = verify()
    assert status == 5
    assert f"checkpoint-10: damaged: {name} " in out
    assert "checkpoint-5: complete" in out
    assert out.endswith("resume takes checkpoint-5\n")
    assert f"checkpoint-10: {name}" in err
    assert everything(run) == before


def test_an_older_one_that_is_damaged_counts_too(run: RunDir, verify: Any) -> None:
    (save(run, 5) / "optimizer.pt").write_bytes(b"other")
    save(run, 10)
    status, out, _ = verify()
    assert status == 5
    assert out.endswith("resume takes checkpoint-10\n")


def test_as_json(run: RunDir, verify: Any) -> None:
    save(run, 10)
    set_aside(save(run, 20), "optimizer.pt is odd")
    status, out, _ = verify("--json")
    assert status == 0, "what is set aside is no more a checkpoint"
    facts = json.loads(out)
    assert facts["resumes_from"] == "checkpoint-10"
    assert [(it["name"], it["state"], it["step"], it["problem"]) for it in facts["checkpoints"]] == [
        ("checkpoint-10", "complete", 10, None),
        ("torn-checkpoint-20", "set aside", 20, "optimizer.pt is odd"),
    ]


def test_a_save_that_goes_on_is_no_damage(run: RunDir, verify: Any) -> None:
    save(run, 5)
    save(run, 10, manifest=False)
    with run.locked():
        status, out, _ = verify()
    assert status == 0
    assert "checkpoint-10: unfinished" in out
    assert verify()[0] == 5, "nobody will finish it"


def test_a_run_without_checkpoints(run: RunDir, verify: Any) -> None:
    assert verify() == (0, "no checkpoints; resume begins at step 0\n", "")


def test_a_run_that_is_over_has_nothing_to_resume(run: RunDir, verify: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft_dist.evaluate.prove.verdict", lambda _: {"problem": None, "tensor_count": 3})
    status, out, _ = verify()
    assert status == 0
    assert out.startswith("no checkpoints\nmodel: what was trained, 3 tensors")
    save(run, 5)
    assert "resume" not in verify()[1]


def test_it_imports_nothing_heavy(run: RunDir) -> None:
    import subprocess

    save(run, 5)
    heavy = "torch", "transformers", "datasets", "accelerate"
    code = (
        "import sys, sft_dist.cli\n"
        f"sys.argv = ['sft-dist', 'verify', {str(run.path)!r}]\n"
        "try:\n    sft_dist.cli.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        f"loaded = [name for name in {heavy!r} if name in sys.modules]\nassert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
