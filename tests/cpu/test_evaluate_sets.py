"""Evaluation sets: several metrics side by side, perplexities, and an evaluation that was killed goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_dist.config.loader import load_config, load_run_config
from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError, DataError
from sft_dist.evaluate import compare
from sft_dist.evaluate.compare import Loaded, evaluate_model, load_for
from sft_dist.evaluate.generate import prompt_ids
from sft_dist.evaluate.held_out import held_out_rows, read_held_out
from sft_dist.evaluate.likelihood import answer_logprobs, candidate
from sft_dist.evaluate.sharing import devices_for, worth_it
from sft_dist.files import read_json, read_jsonl
from sft_dist.rundir import RunDir
from sft_dist.train.settle import resolve_here

NewRun = Callable[..., RunDir]
CHAT = [{"role": "user", "content": "Where is my parcel?"}]
PROMPTS = [CHAT, [{"role": "user", "content": "The invoice says 326.00 euros. " * 4}], "2 + 2 ="]
ANSWERS = ["It is on its way.", "Yes", "four, as far as I know"]


@pytest.fixture
def loaded(tiny_model: Callable[..., Any], tiny_tokens: Callable[..., Any]) -> Loaded:
    """The tiny model with loud layers, so that what it says depends on what it reads."""
    model = tiny_model()
    with torch.no_grad():
        for param in model.model.layers.parameters():
            if param.dim() == 2:
                param.mul_(8)
        weight = model.get_input_embeddings().weight
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
        model.lm_head.weight = torch.nn.Parameter(noise * 0.5)
    return Loaded(model.eval(), tiny_tokens().tokenizer)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_an_answers_log_probability_is_that_of_one_pass_from_scratch(loaded: Loaded, batch_size: int) -> None:
    found = answer_logprobs(loaded.model, loaded.tokenizer, PROMPTS, ANSWERS, batch_size)
    for prompt, answer, (logprob, tokens) in zip(PROMPTS, ANSWERS, found, strict=True):
        option = candidate(loaded.tokenizer, prompt, answer)
        assert tokens == len(option.ids) - option.first > 0
        assert option.ids[: option.first] == prompt_ids(loaded.tokenizer, prompt), "the prompt is not counted"
        with torch.no_grad():
            logits = loaded.model(input_ids=torch.tensor([option.ids])).logits[0].float().log_softmax(-1)
        expected = sum(float(logits[i - 1, option.ids[i]]) for i in range(option.first, len(option.ids)))
        assert logprob == pytest.approx(expected, abs=1e-3)
        assert logprob < -0.1


SETS = """
extends: smoke
evaluate:
  data: null
  labels: []
  sets:
    - {name: letters, data: {task: extraction, rows: 5, seed: 2}, metrics: [json, perplexity], max_new_tokens: 3}
    - {name: tickets, data: {task: tickets, rows: 4, seed: 2}, metrics: [label], labels: [LABELS]}
    - {name: sums, data: sums.jsonl, metrics: [numeric, "sums:far", exact]}
""".replace("LABELS", "refund, delivery, technical, billing, account, cancellation")


@pytest.fixture
def run_of_sets(tmp_path: Path, tiny_model_dir: Path) -> RunDir:
    """A run whose config has three sets; the working directory holds the rows and the function of the last one."""
    from sft_dist.stages import new_run

    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(3)]
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Path("sums.py").write_text("def far(answer, expected, row):\n    return 7\n", encoding="utf-8")
    Path("sets.yaml").write_text(SETS, encoding="utf-8")
    return new_run(load_config("sets.yaml", [f"run.dir={tmp_path / 'runs'}"]))


def test_sets_are_asked_and_scored_each_by_its_metrics_before_and_after(loaded: Loaded, run_of_sets: RunDir) -> None:
    run, config = run_of_sets, load_run_config(run_of_sets.config)
    assert config.evaluate.sets[2].data.path == str(Path("sums.jsonl").resolve()), "found from anywhere"
    assert [len(read_held_out(run, name)) for name in ("letters", "tickets", "sums", "data")] == [5, 4, 3, 0]
    asked: list[int] = []
    real = loaded.model.generate

    def spy(**kwargs: Any) -> torch.Tensor:
        output: torch.Tensor = real(**kwargs)
        asked.append(output.shape[1] - kwargs["input_ids"].shape[1])
        return output

    loaded.model.generate = spy
    evaluate_model(config, run, loaded, "before")
    assert asked == [3, 8], "the labels' set asks for no answers; a set may have its own longest answer"
    with torch.no_grad():
        loaded.model.lm_head.weight.mul_(0.9)
    evaluate_model(config, run, loaded, "after")
    sets = read_json(run.scores)["sets"]
    assert {name: (part["n"], part["first"]) for name, part in sets.items()} == {
        "letters": (5, "json_all"), "tickets": (4, "label"), "sums": (3, "numeric"),
    }  # fmt: skip
    assert {"json_all", "json_valid", "json_fields", "json.order", "perplexity"} <= set(sets["letters"]["scores"])
    assert set(sets["sums"]["scores"]) == {"numeric", "far", "exact"}
    assert sets["sums"]["scores"]["far"]["after"] == 7.0
    change = sets["letters"]["scores"]["perplexity"]
    assert change["before"] != change["after"]
    low, high = change["change_interval"]
    assert low <= change["change"] <= high
    assert sum(part["n"] for part in sets["tickets"]["by_category"].values()) == 4
    rows = read_jsonl(run.eval / "after.jsonl")
    letters = [row["counts"]["perplexity"] for row in rows if row["set"] == "letters"]
    whole = math.exp(sum(nll for nll, _ in letters) / sum(tokens for _, tokens in letters))
    assert change["after"] == pytest.approx(whole, rel=1e-5)
    (first, *_) = [row for row in rows if row["set"] == "tickets"]
    assert first["answer"] is None
    assert first["scores"] == {"label": float(first["predicted_label"] == first["expected"])}


def test_rows_that_a_sets_metric_cannot_use_are_refused_before_the_run(
    tmp_path: Path, tiny_model_dir: Path, tiny_tokens: Callable[..., Any]
) -> None:
    tickets = "{name: t, data: {task: tickets, rows: 2}, metrics: [METRIC]}"
    tokenizer = tiny_tokens().tokenizer
    for metric, error, words in (
        ("json", DataError, "task tickets, row 1: the expected answer is no JSON object"),
        ("nowhere:at_all", ConfigError, "nowhere:at_all cannot be imported"),
    ):
        config = load_config("smoke", [f"evaluate.sets=[{tickets.replace('METRIC', metric)}]"]).config
        with pytest.raises(error, match=words):
            held_out_rows(config, tokenizer)
    wrong = "evaluate.sets=[{name: t, data: {task: tickets, rows: 2}, metrics: [label], labels: [refund, maybe]}]"
    with pytest.raises(DataError, match="not one of labels of the set t"):
        held_out_rows(load_config("smoke", [wrong]).config, tokenizer)


def of_answers(metric: str, *answers: str) -> Config:
    rows = "".join(json.dumps({"prompt": "q", "completion": answer}) + "\n" for answer in answers)
    Path("rows.jsonl").write_text(rows, encoding="utf-8")
    return load_config("smoke", [f"evaluate.sets=[{{name: t, data: rows.jsonl, metrics: [{metric}]}}]"]).config


@pytest.mark.parametrize(
    ("metric", "answers"),
    [("bleu", ("refund", "yes it is")), ("rouge", ("!!", "\U0001f600")), ("json", ('{"a": NaN}',) * 2)],
)
def test_a_metric_by_which_no_answer_could_be_right_is_refused(
    metric: str, answers: tuple[str, ...], tiny_model_dir: Path, tiny_tokens: Callable[..., Any]
) -> None:
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    with pytest.raises(ConfigError, match=f"the set t: by the metric {metric} the expected answer itself does not"):
        held_out_rows(of_answers(metric, *answers), tiny_tokens().tokenizer)


def test_rows_that_cannot_be_right_are_counted_once(
    tiny_model_dir: Path, tiny_tokens: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    tokenizer = tiny_tokens().tokenizer
    held_out_rows(of_answers("rouge", "!!", "yes", "??"), tokenizer)
    (said,) = [record.getMessage() for record in caplog.records if "full marks" in record.getMessage()]
    assert "the set t" in said and "in 2 of 3 rows" in said
    caplog.clear()
    held_out_rows(of_answers("bleu", "yes", "a long answer of seven whole words"), tokenizer)
    assert not caplog.records, "a corpus is scored as a whole, and short answers among longer ones count their words"


@pytest.mark.parametrize(
    "sampling", [(), ("evaluate.generation.do_sample=true", "evaluate.generation.temperature=3.0")]
)
def test_an_evaluation_that_was_killed_goes_on_and_ends_as_if_it_had_not_been(
    loaded: Loaded, new_run: NewRun, sampling: tuple[str, ...]
) -> None:
    options = ("evaluate.data.rows=9", "evaluate.generation.batch_size=2", "evaluate.questions=[Hello]", *sampling)
    whole, broken = (new_run(*options, name=name) for name in ("whole", "broken"))
    config = load_run_config(whole.config)
    evaluate_model(config, whole, loaded, "before")
    real, calls = loaded.model.generate, []

    def dies(**kwargs: Any) -> torch.Tensor:
        calls.append(kwargs["input_ids"].shape[0])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(**kwargs)

    loaded.model.generate = dies
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(config, broken, loaded, "before")
    assert not (broken.eval / "before.jsonl").exists()
    with (broken.eval / "asked-before.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"key": "torn')
    torch.manual_seed(99)
    evaluate_model(config, broken, loaded, "before")
    assert calls == [1, 2, 2, 2, 2, 2, 1], "one question and five batches, of which the third was asked twice"
    assert read_jsonl(broken.eval / "before.jsonl") == read_jsonl(whole.eval / "before.jsonl")
    assert read_json(broken.scores) == read_json(whole.scores)
    evaluate_model(config, broken, loaded, "before")
    assert len(calls) == 7, "what has been answered is asked again"
    evaluate_model(config, broken, loaded, "before", again=True)
    assert len(calls) == 13


def test_the_answers_of_another_model_are_not_taken_for_those_of_this_one(loaded: Loaded, new_run: NewRun) -> None:
    run = new_run("evaluate.data.rows=2", "evaluate.labels=[]")
    config = load_run_config(run.config)
    calls: list[int] = []
    real = loaded.model.generate
    loaded.model.generate = lambda **kwargs: calls.append(1) or real(**kwargs)
    for done in ("2026-01-01", "2026-01-01", "2026-01-02"):
        run.model.mkdir(exist_ok=True)
        (run.model / "DONE").write_text(done, encoding="utf-8")
        evaluate_model(config, run, loaded, "after")
    assert len(calls) == 2
    evaluate_model(
        config.model_copy(
            update={
                "evaluate": config.evaluate.model_copy(
                    update={"generation": config.evaluate.generation.model_copy(update={"max_new_tokens": 2})}
                )
            }
        ),
        run,
        loaded,
        "after",
    )
    assert len(calls) == 3, "a longer answer was taken for a shorter one"


def test_several_processes_answer_what_one_would(new_run: NewRun, caplog: pytest.LogCaptureFixture) -> None:
    """Each a share of the batches; what one that fails leaves out is asked by the one that scores."""
    options = (
        "evaluate.data.rows=9",
        "evaluate.generation.batch_size=1",
        "evaluate.questions=[Hello, Bye]",
        "evaluate.sets=[{name: likely, data: {task: tickets, rows: 5}, metrics: [perplexity]}]",
        "evaluate.generation.do_sample=true",
    )
    alone, shared, failing = (new_run(*options, name=name) for name in ("alone", "shared", "failing"))
    config = load_run_config(alone.config)
    loaded = load_for(config, alone, resolve_here(config), "before")
    evaluate_model(config, alone, loaded, "before")
    calls: list[int] = []
    real = loaded.model.generate
    loaded.model.generate = lambda **kwargs: calls.append(1) or real(**kwargs)  # type: ignore[method-assign,func-returns-value]
    evaluate_model(config, shared, loaded, "before", devices=("", ""))
    assert len(calls) == 6, "one of two questions and five of nine rows"
    failing.config.write_text("no config\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "update_scores", lambda run: None)
        evaluate_model(config, failing, loaded, "before", devices=("", ""))
    assert len(calls) == 6 + 11
    assert "ended with exit status 2; what it left is asked here" in caplog.text
    for run in (shared, failing):
        assert read_jsonl(run.eval / "before.jsonl") == read_jsonl(alone.eval / "before.jsonl")
        assert [path.name for path in run.eval.glob("asked*")] == ["asked-before.jsonl"]
    assert read_json(shared.scores) == read_json(alone.scores)


def test_one_process_answers_where_more_would_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("smoke", ["evaluate.generation.batch_size=4"]).config
    assert worth_it(("0", "1", "2"), config, 31) == ()
    assert worth_it(("0", "1", "2"), config, 32) == ("0", "1")
    assert worth_it(("0",), config, 1000) == ()
    here = resolve_here(config)
    gpu = replace(here, layout=replace(here.layout, use_cpu=False))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-ab")
    assert devices_for(config, gpu) == ("3", "GPU-ab")
    assert devices_for(load_config("smoke", ["parallel.plan=single"]).config, gpu) == ()
    assert devices_for(config, resolve_here(config)) == ()
