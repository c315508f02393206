"""`sft-dist check`: what a run would prove before it starts, without a run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CallCli = Callable[..., int]


def test_a_config_that_would_start_leaves_no_run(
    tmp_path: Path, tiny_model_dir: Path, call_cli: CallCli, capsys: Any
) -> None:
    assert call_cli("check", "smoke", f"run.dir={tmp_path / 'runs'}") == 0
    said = capsys.readouterr().out
    for area in ("plan", "run", "packages", "model", "data", "training", "evaluation"):
        assert f"ok       {area}:" in said
    assert "56 rows prepared" in said
    assert not (tmp_path / "runs").exists()


def test_findings_as_json_end_with_the_problem(
    tmp_path: Path, tiny_model_dir: Path, call_cli: CallCli, capsys: Any
) -> None:
    taken = tmp_path / "runs" / "smoke"
    taken.mkdir(parents=True)
    assert call_cli("check", "smoke", f"run.dir={tmp_path / 'runs'}", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [it["fix"] for it in found if it["area"] == "run"] == ["another run.name, or --overwrite"]
    assert call_cli("check", "smoke", f"run.dir={tmp_path}", "data.max_length=40", "--json") == 4
    captured = capsys.readouterr()
    assert json.loads(captured.out)[-1]["level"] == "problem"
    assert "within data.max_length 40 tokens" in captured.err
    assert list(taken.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "status", "words"),
    [
        ("train.extra.loss_type=foo", 2, "loss_type"),
        ("model.name=/nowhere/model", 3, "/nowhere/model"),
        ("evaluate.data=/nowhere/rows.jsonl", 4, "/nowhere/rows.jsonl"),
        ("container={runtime: docker, image: never-built-by-anybody}", 3, "container"),
    ],
)
def test_the_first_problem_ends_it(
    override: str, status: int, words: str, tmp_path: Path, tiny_model_dir: Path, call_cli: CallCli, capsys: Any
) -> None:
    assert call_cli("check", "smoke", f"run.dir={tmp_path}", override) == status
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_no_room_for_a_checkpoint(
    tmp_path: Path, tiny_model_dir: Path, call_cli: CallCli, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft_dist.train import disk

    monkeypatch.setattr(disk, "_of_disk", lambda folder: disk.Free(1000, None, "this disk"))
    assert call_cli("check", "smoke", f"run.dir={tmp_path}", "checkpoint.save_strategy=epoch") == 3
    assert "a checkpoint takes" in capsys.readouterr().err


def test_a_job_is_proven_for_the_gpus_of_its_nodes(
    tmp_path: Path, tiny_model_dir: Path, call_cli: CallCli, capsys: Any
) -> None:
    assert (
        call_cli("check", "smoke", f"run.dir={tmp_path}", "slurm.nodes=2", "slurm.gpus_per_node=h100:4", "--slurm") == 0
    )
    said = capsys.readouterr().out
    assert "the optimizer keeps float32 master weights" in said
    assert "tokenizer and weights are here" in said
    assert "ok       training:" in said, "this machine has no such GPU, and need not"


def damaged(model: Path, folder: Path, break_it: Callable[[Path], Any]) -> str:
    """A copy of the model with something done to it, as an override."""
    shutil.copytree(model, folder)
    break_it(folder)
    return f"model.name={folder}"


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda f: [p.unlink() for p in f.glob("tokenizer*")], ["no tokenizer.json in it", "set model.tokenizer"]),
        (
            lambda f: os.truncate(f / "model.safetensors", 3000),
            ["model.safetensors: ", "copy or save them there again"],
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}'),
            ["model-2.safetensors is not there"],
        ),
    ],
)
def test_a_model_whose_files_no_run_could_load(
    break_it: Callable[[Path], Any],
    words: list[str],
    tmp_path: Path,
    tiny_model_dir: Path,
    call_cli: CallCli,
    capsys: Any,
) -> None:
    name = damaged(tiny_model_dir, tmp_path / "model", break_it)
    assert call_cli("train", "smoke", f"run.dir={tmp_path / 'runs'}", name) == 3
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert "Traceback" not in said
    assert not (tmp_path / "runs").exists(), "no run is left of it"


def test_a_file_that_no_run_reads_is_none_of_its_business(
    tmp_path: Path, tiny_model_dir: Path, call_cli: CallCli, capsys: Any
) -> None:
    """Some models come with their weights a second time, which need not be fetched: git-lfs leaves a few words then."""
    name = damaged(
        tiny_model_dir, tmp_path / "model", lambda f: (f / "consolidated.safetensors").write_text("version 1")
    )
    assert call_cli("check", "smoke", f"run.dir={tmp_path / 'runs'}", name) == 0
    assert "tokenizer and weights are to be had" in capsys.readouterr().out


def test_weights_of_other_shapes_than_the_config_says(
    tmp_path: Path, tiny_model_dir: Path, call_cli: CallCli, capsys: Any
) -> None:
    def other_shapes(folder: Path) -> None:
        told = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**told, "intermediate_size": 96}))

    name = damaged(tiny_model_dir, tmp_path / "model", other_shapes)
    assert call_cli("train", "smoke", f"run.dir={tmp_path / 'runs'}", name) == 3
    assert "other shapes than its config.json says" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("attention", "status"), [("flash", 3), ("flash_attention_2", 3), ("eager", 0), ("sft_dist_varlen", 0)]
)
def test_an_attention_that_the_model_cannot_have_here(
    attention: str, status: int, tmp_path: Path, tiny_model_dir: Path, call_cli: CallCli, capsys: Any
) -> None:
    fields = [f"run.dir={tmp_path / 'runs'}", f"model.attn_implementation={attention}"]
    assert call_cli("check", "smoke", *fields) == status
    if status:
        said = capsys.readouterr().err
        assert f"error: model.attn_implementation is '{attention}'" in said and "set auto, sdpa or eager" in said


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_place_where_no_run_can_be(
    command: str, tmp_path: Path, tiny_model_dir: Path, call_cli: CallCli, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    assert call_cli(command, "smoke", f"run.dir={tmp_path / 'file'}") == 3
    assert f"{tmp_path / 'file'} is a file, not a folder" in capsys.readouterr().err
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # the tests may run as root
    assert call_cli(command, "smoke", f"run.dir={tmp_path / 'runs'}") == 3
    captured = capsys.readouterr()
    assert f"{tmp_path} cannot be written to\n  choose another run.dir" in captured.err
    assert "would lie in" not in captured.out
