"""The model card: what it names, and that no word of the data has a meaning in it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sft_dist.config.loader import load_config
from sft_dist.export import PROOF, is_local, plain, write_card
from sft_dist.rundir import RunDir

HOSTILE = "na|me\n<img src=x onerror=alert(1)> [a](http://b) `c` *d*"


def card(folder: Path, *overrides: str) -> str:
    run = RunDir(folder / "run")
    run.path.mkdir(exist_ok=True)
    config = load_config("smoke", [f"run.dir={folder}", "run.name=run", *overrides]).config
    write_card(run, config, {"torch": "2"}, folder)
    return (folder / "README.md").read_text(encoding="utf-8")


def test_names_from_data_stay_words_in_a_table(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    score = {"before": 0.5, "after": 0.75, "change": 0.25}
    found = {"sets": {HOSTILE: {"n": 3, "scores": {HOSTILE: score, "plain_name": score}}}}
    (tmp_path / "run" / "scores.json").write_text(json.dumps(found), encoding="utf-8")
    text = card(tmp_path)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 4, "no line of it is broken in two"
    assert {line.replace("\\|", "").count("|") for line in table} == {8}, "seven columns each"
    assert "<img" not in text
    assert "&lt;img" in text
    assert not re.search(r"(?<!\\)\]\(http", text), "no link"
    assert "plain_name" in text


@pytest.mark.parametrize("text", ["a|b", "a\nb", "<b>", "`", "\\|", "[x]"])
def test_plain_words_hold_nothing_that_markdown_reads(text: str) -> None:
    found = plain(text)
    assert "\n" not in found and "<" not in found and ">" not in found
    escaped = found.replace("\\\\", "")
    assert all(escaped[place - 1] == "\\" for place, sign in enumerate(escaped) if sign in "|`[]")


def test_the_card_has_the_settings_and_points_to_no_file_that_is_not_there(tmp_path: Path) -> None:
    text = card(
        tmp_path, "run.seed=7", "train.warmup_steps=0.1", "train.weight_decay=0.01", "train.lr_scheduler_type=cosine",
        "train.extra={neftune_noise_alpha: 5}", "model.lora={r: 8, lora_dropout: 0.05, use_rslora: true}",
    )  # fmt: skip
    for words in (
        "seed 7", "AdamW, learning rate 0.005, cosine, warm-up 10 % of the steps", "weight decay 0.01", "8 rows a step",
        "LoRA of rank 8", "dropout 0.05, scaled by the square root of the rank", "neftune_noise_alpha", "plan auto",
    ):  # fmt: skip
        assert words in text
    assert "config.yaml" not in text
    assert "- data: unknown: whoever publishes this model has to say" in text


def test_the_card_names_the_plan_that_the_run_had(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    resolved = {"plan": "zero2", "world_size": 4, "dtype": "bfloat16"}
    (tmp_path / "run" / "env.json").write_text(json.dumps({"resolved": resolved}))
    assert "plan zero2, 4 process(es), bfloat16" in card(tmp_path)


def test_the_card_says_whether_the_model_stops(tmp_path: Path) -> None:
    (tmp_path / PROOF).write_text(json.dumps({"stops": "after 0 of 4 expected answers it goes on"}))
    assert "- after 0 of 4 expected answers it goes on" in card(tmp_path)


@pytest.mark.parametrize("merge", ["true", "false"])
def test_a_base_model_in_a_folder_is_named_without_the_folder(tmp_path: Path, merge: str) -> None:
    base = tmp_path / "secret-place" / "tiny-base"
    base.mkdir(parents=True)
    text = card(tmp_path, f"model.name={base}", f"model.lora={{merge: {merge}}}")
    assert "secret-place" not in text
    assert "`tiny-base` fine-tuned on" in text
    assert "base_model:" not in text


@pytest.mark.parametrize(
    ("name", "local"),
    [("embedded:tiny", False), ("Qwen/Qwen3-8B", False), ("gpt2", False), ("/a/b", True), ("./a", True), ("~/a", True), ("a/b/c", True)],
)  # fmt: skip
def test_folders_are_told_from_names_of_the_hub(name: str, local: bool) -> None:
    assert is_local(name) == local


def test_a_folder_that_looks_like_a_name_of_the_hub_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert is_local("models/base")
