"""report.html of runs that are unfinished, partial or damaged."""

from __future__ import annotations

import json
import re

import pytest

from sft_dist.errors import SftDistError
from sft_dist.files import append_jsonl, write_json, write_text
from sft_dist.report.page import write_report
from sft_dist.rundir import RunDir


@pytest.fixture
def run(tmp_path) -> RunDir:
    (tmp_path / "demo").mkdir()
    return RunDir(tmp_path / "demo")


def report(run: RunDir) -> str:
    """The page's text; markup, style and script are taken out."""
    html = write_report(run).read_text(encoding="utf-8")
    bare = re.sub("<[^>]*>", " ", re.sub("<(style|script)>.*?</\\1>", "", html, flags=re.DOTALL))
    return " ".join(bare.split())


def fill(run: RunDir) -> None:
    """Every file that a report reads, each with a word of its own."""
    run.write_status(state="failed", reason="words of status", step=4)
    write_text(run.config, "model:\n  name: words of config\n")
    write_json(run.provenance, {"model.name": "words of provenance"})
    write_json(run.env, {"host": "words of env"})
    write_json(run.scores, {"after": {"exact_match": 0.5, "by_category": {"words of scores": {"exact_match": 0.5}}}})
    write_json(run.ledger, {"train": {"words of ledger": 2}})
    append_jsonl(run.attempts, {"attempt": 1, "ended": "words of attempts"})
    append_jsonl(run.metrics, {"step": 1, "loss": 1.0})
    append_jsonl(run.eval / "after.jsonl", {"kind": "question", "prompt": "q", "answer": "words of eval"})


@pytest.mark.parametrize("state", ["queued", "running", "stopped", "failed", "done", "<b>odd</b>", None])
def test_a_run_that_has_only_a_state(run, state):
    write_text(run.status, json.dumps({"state": state, "reason": "node went away"}))
    text = report(run)
    assert "No loss was logged." in text
    assert "Scores" not in text and "Config" not in text
    assert ("node went away" in text) == (state in ("stopped", "failed"))


def test_an_empty_directory(run):
    assert "demo unknown" in report(run)


DEEP = "[" * 1_500
FILES = ["status", "env", "scores", "ledger", "provenance", "attempts", "metrics", "config"]
SHOWN = {"metrics": "Training loss 1 at step 1"}


@pytest.mark.parametrize("name", FILES)
def test_any_file_may_be_missing(run, name):
    fill(run)
    getattr(run, name).unlink()
    text = report(run)
    for other in FILES:
        # Where a value came from shows beside the config only.
        there = other != name and not (other == "provenance" and name == "config")
        assert (SHOWN.get(other, f"words of {other}") in text) == there
    assert "could not" not in text and "holds no" not in text


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", ["", "null\n", "[1, 2]\n", '{"step": \n', '"text"\n', DEEP, "\0\n: [", "1e999"])
def test_any_file_may_be_damaged(run, name, content):
    fill(run)
    path = getattr(run, name)
    # PyYAML looks at every bracket of a line once more for each that follows.
    path.write_text("\n".join(DEEP) if (name, content) == ("config", DEEP) else content)
    text = report(run)
    assert "words of eval" in text
    # Any text may stand in a config; the other files are named if they are not what they must be.
    assert (f"{path.relative_to(run.path)}" in text) == bool(content and name != "config")


@pytest.mark.parametrize("odd", [None, 3, "text", [], [1], {}, {"before": 1}, True])
def test_any_value_may_have_another_type(run, odd):
    fields = (
        "state",
        "step",
        "max_steps",
        "reason",
        "updated",
        "before",
        "after",
        "n",
        "versions",
        "decisions",
        "train",
    )
    for name in ("status", "env", "scores", "ledger", "provenance"):
        write_json(getattr(run, name), dict.fromkeys(fields, odd))
    write_json(
        run.scores, {"before": {"exact_match": odd, "by_category": {"a": odd}}, "after": {"by_category": odd}, "n": odd}
    )
    append_jsonl(run.metrics, dict.fromkeys(("step", "loss", "eval_loss", "time", "tokens"), odd))
    append_jsonl(run.attempts, dict.fromkeys(("attempt", "start", "end"), odd))
    for kind in ("question", "scored", odd):
        fields = (
            "index",
            "category",
            "prompt",
            "expected",
            "answer",
            "exact_match",
            "predicted_label",
            "label_correct",
        )
        append_jsonl(run.eval / "after.jsonl", {**dict.fromkeys(fields, odd), "kind": kind})
        append_jsonl(run.eval / "before.jsonl", {"kind": kind, "prompt": [odd, {"role": odd, "content": odd}]})
    assert "from the run directory alone" in report(run)


def test_one_side_of_an_evaluation(run):
    row = {"kind": "scored", "index": 0, "prompt": "p", "expected": "refund", "answer": "refund", "exact_match": True}
    append_jsonl(run.eval / "after.jsonl", row)
    write_json(run.scores, {"after": {"exact_match": 1.0, "label_accuracy": None, "by_category": {}}, "n": 1})
    text = report(run)
    assert "not asked" in text
    assert "Exact match on 1 held-out row 100.0%" in text


def test_an_answer_with_a_line_separator_is_one_row(run):
    append_jsonl(run.eval / "after.jsonl", {"kind": "question", "prompt": "q", "answer": "one\u2028two"})
    text = report(run)
    assert "one&lt;U+2028&gt;two" in text
    assert "left out" not in text


def test_a_missing_directory_is_an_error_and_is_not_made(tmp_path):
    with pytest.raises(SftDistError, match="no run directory"):
        write_report(RunDir(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


def test_wall_time_counts_attempts_and_an_open_end(run):
    append_jsonl(run.attempts, {"attempt": 1, "start": "2026-01-01T00:00:00+00:00", "end": "2026-01-01T01:00:00+00:00"})
    append_jsonl(run.attempts, {"attempt": 2, "start": "2026-01-02T00:00:00+00:00", "end": None})
    append_jsonl(run.metrics, {"time": "2026-01-02T00:30:00+00:00", "step": 5, "loss": 1.0})
    assert "Wall time 1 h 30 min" in report(run)
