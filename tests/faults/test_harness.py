"""Tasks of lm-evaluation-harness: scored by it, shown as our sets are, and likelihoods that equal its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sft_dist.config.loader import load_run_config
from sft_dist.errors import ConfigError, PreflightError
from sft_dist.evaluate import harness
from sft_dist.evaluate.compare import Loaded, evaluate_model
from sft_dist.evaluate.likelihood import answer_logprobs, label_logprobs
from sft_dist.files import read_json, read_jsonl
from sft_dist.report.scores import score_lines, sets_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.cpu.conftest import NewRun

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
ROWS = [{"question": f"{n} + 1 =", "choices": [f"{n}", f"{n + 1}", "a dog"], "answer": 1} for n in range(6)]
CHOICE = """task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITTEN = """task: written
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
"""
GROUP = "group: sums\ntask: [easy, hard]\n"


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    files = {name: CHOICE.replace("NAME", name) for name in ("easy", "hard")} | {"written": WRITTEN, "sums": GROUP}
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)), encoding="utf-8")
    return folder


@pytest.fixture
def loaded(tiny_model: Callable[..., Any], tiny_tokens: Callable[..., Any]) -> Loaded:
    return Loaded(tiny_model().eval(), tiny_tokens().tokenizer)


def asking(folder: Path, *names: str, more: str = "") -> str:
    return f"evaluate.harness={{tasks: [{', '.join(names)}], include_path: {folder}{more}}}"


def test_tasks_are_scored_and_shown_as_sets(
    tasks: Path, loaded: Loaded, new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(asking(tasks, "sums", "written"), "evaluate.data.rows=2")
    config = load_run_config(run.config)
    evaluate_model(config, run, loaded, "before")
    evaluate_model(config, run, loaded, "after")
    rows = [row for row in read_jsonl(run.eval / "after.jsonl") if row.get("set") == "sums"]
    assert [row["category"] for row in rows] == ["easy"] * 6 + ["hard"] * 6
    assert rows[0]["prompt"] == "0 + 1 ="
    assert rows[0]["expected"] == "1"
    assert rows[0]["answer"] in ("0", "1", "a dog")
    assert rows[0]["scores"]["acc"] == float(rows[0]["answer"] == "1")
    sets = dict(sets_of(read_json(run.scores) or {}))
    assert list(sets) == ["data", "sums", "written"]
    assert sets["sums"]["n"] == 12
    assert sets["sums"]["first"] == "acc"
    score = sets["sums"]["scores"]["acc"]
    assert score["before"] == score["after"] == round(sum(row["scores"]["acc"] for row in rows) / 12, 6)
    assert score["p_value"] == 1.0
    assert sets["sums"]["by_category"]["hard"]["n"] == 6
    assert [line.score for line in score_lines(sets["written"])] == ["exact_match"]
    monkeypatch.setattr(harness, "_samples", lambda *words: pytest.fail("what has been answered is asked again"))
    evaluate_model(config, run, loaded, "after")


def test_the_training_draws_the_same_numbers_with_and_without(tasks: Path, loaded: Loaded, new_run: NewRun) -> None:
    import torch

    run = new_run(asking(tasks, "easy", more=", limit: 2, num_fewshot: 1"), "evaluate.data=null", "evaluate.labels=[]")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    evaluate_model(load_run_config(run.config), run, loaded, "before")
    assert torch.equal(torch.get_rng_state(), state)
    rows = read_jsonl(run.eval / "before.jsonl")
    assert [row["set"] for row in rows] == ["easy"] * 2
    assert rows[0]["prompt"].count("=") == 2, "one example, and the question"


def test_what_cannot_be_asked_is_said_before_anything_is_trained(tasks: Path, new_run: NewRun) -> None:
    with pytest.raises(ConfigError, match="lm-eval knows no task 'medium'"):
        new_run(asking(tasks, "easy", "medium"), name="unknown")
    with pytest.raises(ConfigError, match="'easy' is also the name of a set"):
        new_run(asking(tasks, "easy"), "evaluate.sets=[{name: easy, data: {task: tickets, rows: 2}}]", name="taken")
    (tasks / "rows.jsonl").unlink()
    with pytest.raises(PreflightError, match="easy cannot be loaded"):
        new_run(asking(tasks, "easy"), name="gone")


def test_likelihoods_are_those_of_the_harness(loaded: Loaded) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    prompts, labels = ["The invoice is wrong:", "Where is my parcel? I ordered it"], ["billing", "delivery of goods"]
    model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=1)
    requests = [
        Instance("loglikelihood", {}, (prompt, f" {label}"), index, ("x", index, 1))
        for index, (prompt, label) in enumerate((prompt, label) for prompt in prompts for label in labels)
    ]
    theirs = [value for value, _ in model.loglikelihood(requests)]
    ours = answer_logprobs(loaded.model, loaded.tokenizer, [p for p in prompts for _ in labels], labels * len(prompts))
    assert [value for value, _ in ours] == pytest.approx(theirs, abs=1e-4)
    means = label_logprobs(loaded.model, loaded.tokenizer, prompts, labels)
    flat = [means[row][label] for row in range(len(prompts)) for label in labels]
    assert flat == pytest.approx([value / count for value, (_, count) in zip(theirs, ours, strict=True)], abs=1e-4)
