"""Light modules and `--help` work on a login node: none of them may import torch and its company."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import sft_dist

PACKAGE = Path(sft_dist.__file__).parent
HEAVY = ("torch", "transformers", "trl", "datasets", "accelerate", "matplotlib")

# Runs in a fresh interpreter. A finder in front of all others sees each first import of a heavy package, lets it go on,
# and notes which line of ours asked for it, so that a failure names the line to move into a function.
WATCHER = """
import contextlib, importlib, io, json, runpy, sys, traceback
heavy, modules, commands = json.loads(sys.argv[1])
blamed = []

class Watcher:
    def find_spec(self, name, path=None, target=None):
        if name in heavy:
            ours = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack() if "sft_dist" in frame.filename]
            blamed.append(f"{name}, imported by " + (ours[-1] if ours else "another library"))

sys.meta_path.insert(0, Watcher())
report = {}
for module in modules:
    importlib.import_module(module)
    report[module] = {"blamed": blamed[:]}
    blamed.clear()
for command in commands:
    sys.argv = ["sft-dist", *command]
    out, code = io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            runpy.run_module("sft_dist", run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
    report[" ".join(command)] = {"blamed": blamed[:], "code": code, "output": out.getvalue()}
    blamed.clear()
loaded = [name for name in heavy if name in sys.modules]
print(json.dumps({"report": report, "loaded": loaded}))
"""


def light_modules() -> list[str]:
    """The modules that must stay light, as far as they exist."""
    paths = [
        PACKAGE / f"{name}.py"
        for name in (
            "__init__",
            "errors",
            "export",
            "files",
            "logs",
            "process",
            "rundir",
            "stages",
            "cli",
            "cli_data",
            "cli_evaluate",
            "cli_jobs",
            "cli_runs",
            "cli_submit",
            "refs",
        )
    ]
    # A published model's files are compared by a process that starts in a fifth of a second.
    paths += [PACKAGE / "evaluate" / f"{name}.py" for name in ("prove", "tensor_files")]
    for room in ("config", "parallel", "jobs", "report"):
        paths += sorted((PACKAGE / room).rglob("*.py"))
    parts = [path.relative_to(PACKAGE.parent).with_suffix("").parts for path in paths if path.is_file()]
    return [".".join(part for part in names if part != "__init__") for names in parts]


def watch(modules: list[str], commands: list[list[str]], heavy: Sequence[str] = HEAVY) -> dict[str, Any]:
    """What importing the modules and then running the commands brought in, from one fresh interpreter."""
    request = json.dumps([heavy, modules, commands])
    done = subprocess.run([sys.executable, "-c", WATCHER, request], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_importing_a_light_module_imports_nothing_heavy() -> None:
    modules = light_modules()
    assert {"sft_dist", "sft_dist.rundir", "sft_dist.config.schema"} <= set(modules)
    answer = watch(modules, [])
    blamed = {name: seen["blamed"] for name, seen in answer["report"].items() if seen["blamed"]}
    assert not blamed
    assert not answer["loaded"]


def test_commands_that_only_read_import_nothing_heavy() -> None:
    answer = watch([], [["--help"], ["train", "--help"], ["config", "smoke"], ["recipes"], ["schema"], ["status"]])
    failed = {name: seen["output"] for name, seen in answer["report"].items() if seen["code"] != 0}
    assert not failed
    blamed = {name: seen["blamed"] for name, seen in answer["report"].items() if seen["blamed"]}
    assert not blamed
    assert not answer["loaded"]


def test_commands_about_runs_do_without_the_schema(tmp_path: Path) -> None:
    """They are typed again and again while a run goes on, and the schema would take a third of their time."""
    run = tmp_path / "runs" / "demo"
    (run / "logs").mkdir(parents=True)
    (run / "config.yaml").write_text("run: {}\n")
    (run / "status.json").write_text('{"state": "done", "step": 1, "max_steps": 1}')
    (run / "logs" / "rank0.log").write_text("hello\n")
    commands = [["status"], ["status", "--json"], ["status", "demo"], ["logs", "demo"]]
    answer = watch([], commands, heavy=(*HEAVY, "sft_dist.config.schema"))
    assert {name: seen["blamed"] for name, seen in answer["report"].items() if seen["blamed"]} == {}
    assert "hello" in answer["report"]["logs demo"]["output"]
    assert answer["loaded"] == []


def test_the_watcher_sees_a_heavy_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "matplotlib.py").write_text("")
    (tmp_path / "sft_dist_probe.py").write_text("def late():\n    import matplotlib\n\n\nlate()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answer = watch(["sft_dist.errors", "sft_dist_probe"], [])
    assert answer["report"]["sft_dist.errors"]["blamed"] == []
    assert answer["report"]["sft_dist_probe"]["blamed"] == [f"matplotlib, imported by {tmp_path}/sft_dist_probe.py:2"]
    assert answer["loaded"] == ["matplotlib"]
