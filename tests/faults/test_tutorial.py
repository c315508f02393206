"""docs/tutorial.ipynb runs in a kernel from its first cell to its last, with a model that is built on the spot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "tutorial.ipynb"
# Two steps of each training, and few words in each answer: what is tested is that all of it works together.
FEWER = "train.max_steps=2 evaluate.generation.max_new_tokens=4 checkpoint.verify_export=files"


def test_every_cell_runs(
    tmp_path: Path, session_environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    tiny = {"TUTORIAL_MODEL": "embedded:tiny", "TUTORIAL_RUNS": str(tmp_path / "runs"), "TUTORIAL_FIELDS": FEWER}
    for name, value in {
        **session_environment,
        **tiny,
        "IPYTHONDIR": str(tmp_path),
        "JUPYTER_RUNTIME_DIR": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    for name in ("first", "tickets", "extraction", "talks", "rate-2e-5", "rate-3e-4"):
        assert json.loads((tmp_path / "runs" / name / "status.json").read_text())["state"] == "done"
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    said = "".join(output.get("text", "") for output in outputs)
    assert "<|im_start|>assistant" in said
    assert "Q: Calculate 1+1-1" in said
    shown = [output.data for output in outputs if output.output_type in ("display_data", "execute_result")]
    assert any("image/png" in data for data in shown), "the loss curve is no picture"
    coloured = [data["text/html"] for data in shown if "text/html" in data]
    assert any("color" in html and "im_end" in html for html in coloured), "the masks are not in colour"


def test_no_output_is_of_another_version_of_the_cells() -> None:
    """Outputs in the file are those of a run from top to bottom, or none."""
    counts = [
        cell["execution_count"] for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    assert counts in ([None] * len(counts), list(range(1, len(counts) + 1)))
