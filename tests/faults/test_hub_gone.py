"""The Hub goes away while a run is under way: by then all that the run needs is here, and it asks for nothing any more."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sft_dist.files import read_jsonl
from sft_dist.rundir import RunDir
from tests.faults.test_offline import DATASET, MODEL, Hub, HubHandler

if TYPE_CHECKING:
    from tests.conftest import RunCli
    from tests.cpu.conftest import Serve

FIELDS = (
    f"model.name={MODEL}",
    f"data.train={DATASET}",
    "data.eval_size=4",
    "train.max_steps=4",
    "checkpoint.save_strategy=steps",
    "checkpoint.save_steps=2",
    "evaluate.before=false",
    "evaluate.labels=[]",
    # The base is read once more for the merge, after the training.
    "model.lora={r: 4}",
)


class Leaving(Hub):
    """Goes away once the weights were fetched and what transformers asks for right after them."""

    def __init__(self, folder: Path, how: str) -> None:
        super().__init__(folder)
        self.RequestHandlerClass, self.how = LeavingHandler, how
        self.weights, self.gone, self.over = threading.Event(), threading.Event(), threading.Event()
        self.asked_in_vain: list[str] = []

    def leave(self) -> None:
        self.gone.set()
        if self.how == "refuses":
            threading.Thread(target=lambda: (self.shutdown(), self.server_close())).start()


class LeavingHandler(HubHandler):
    server: Leaving

    def do_GET(self) -> None:
        if self.server.gone.is_set():
            self.server.asked_in_vain.append(f"{self.command} {self.path}")
            if self.server.how == "silent":
                self.server.over.wait(600)
            self.answer(503, b"")
            return
        super().do_GET()
        if self.command == "GET" and self.path.endswith("model.safetensors"):
            self.server.weights.set()
        elif self.server.weights.is_set() and self.command == "GET" and self.path.endswith("generation_config.json"):
            self.server.leave()

    do_HEAD = do_POST = do_GET


@pytest.mark.parametrize("how", ["refuses", "fails", "silent"])
def test_a_run_that_has_its_weights_needs_no_hub(
    how: str, run_cli: RunCli, serve: Serve, tmp_path: Path, tiny_model_dir: Path, no_proxy: dict[str, str | None]
) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "hub" / "models" / MODEL)
    (tmp_path / "hub" / "datasets" / DATASET).mkdir(parents=True)
    rows = "".join(f'{{"prompt": "{number}?", "completion": "{number}!"}}\n' for number in range(24))
    (tmp_path / "hub" / "datasets" / DATASET / "train.jsonl").write_text(rows)
    hub = serve(Leaving(tmp_path / "hub", how))
    online = {"HF_HUB_OFFLINE": None, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), **no_proxy}
    try:
        first = run_cli("train", "smoke", "run.name=first", *FIELDS, env=online)
        assert hub.gone.is_set(), first.stderr
        assert first.returncode == 0, first.stderr
        assert hub.asked_in_vain == [], "the end of the run depends on the Hub"
        second = run_cli("train", "smoke", "run.name=second", *FIELDS, env=online)
        assert second.returncode == 0, second.stderr
    finally:
        hub.over.set()
    assert second.stderr.count("looking in the local cache only") == 1
    assert hub.asked_in_vain == ([] if how == "refuses" else ["HEAD /"]), "it was asked again after it had not answered"
    losses = []
    for name in ("first", "second"):
        run = RunDir(tmp_path / "runs" / name)
        assert (run.model / "DONE").is_file()
        losses.append([(row["step"], row["loss"]) for row in read_jsonl(run.metrics) if "loss" in row])
    assert [step for step, _ in losses[0]] == [1, 2, 3, 4]
    assert losses[0] == losses[1]
