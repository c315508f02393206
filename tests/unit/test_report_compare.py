"""Runs side by side, and the list of all."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from sft_dist.cli_runs import write_reports
from sft_dist.errors import ConfigError
from sft_dist.files import append_jsonl, write_json, write_jsonl
from sft_dist.report.compare import MOST, write_comparison, write_index
from sft_dist.rundir import RunDir

EVIL = "<img src=x onerror=alert(1)>"


def make(root: Path, name: str, *, rate: str = "1e-05", loss: float = 1.0, **status: Any) -> RunDir:
    run = RunDir(root / name)
    run.path.mkdir(parents=True)
    run.config.write_text(f"run:\n  name: {name}\nmodel:\n  name: tiny\ntrain:\n  learning_rate: {rate}\n  seed: 1\n")
    append_jsonl(run.metrics, {"step": 1, "loss": 2 * loss, "tokens": 10, "tokens_per_s": 5.0})
    append_jsonl(run.metrics, {"step": 2, "loss": loss, "tokens": 20, "tokens_per_s": 7.0})
    part = {"exact_match": loss / 10, "by_category": {"refund": {"n": 2, "exact_match": loss / 10}}}
    write_json(run.scores, {"before": {"exact_match": 0.0, "by_category": {}}, "after": part, "n": 4})
    run.write_status(**{"state": "done", "step": 2, "max_steps": 2, **status})
    return run


def words(html: str, section: str) -> str:
    """The text of a section."""
    inside = html.split(f'<section id="{section}">')[1].split("</section>")[0]
    return " ".join(re.sub(r"<[^>]*>", " ", inside).split())


def test_what_differs_and_what_came_of_it(tmp_path: Path) -> None:
    runs = [make(tmp_path, "a"), make(tmp_path, "b", rate="2e-05", loss=3.0, state="stopped")]
    html = write_comparison(runs, tmp_path / "c.html").read_text(encoding="utf-8")
    assert words(html, "settings") == "What was set differently a b train.learning_rate 1e-05 2e-05"
    outcome = words(html, "outcome")
    assert "State done stopped" in outcome and "Training loss, last 1 3" in outcome
    assert "Tokens 20 20" in outcome and "Median tokens/s 6 6" in outcome
    scores = words(html, "scores")
    assert "Exact match Run n before after change" in scores
    assert "All rows a 4 0.0% 10.0% +10.0 All rows b 4 0.0% 30.0% +30.0" in scores
    assert "refund a 2 - 10.0% - refund b 2 - 30.0%" in scores
    assert "No two of these runs have scored rows in common" in scores
    assert html.count('data-name="a"') == html.count('data-name="b"') == 2, "loss and speed, on the same axes"
    assert 'class="line-run2" data-name="b" data-values="[[1, 6.0], [2, 3.0]]"' in html.replace("&#34;", '"')


def answered(run: RunDir, right: int, rows: range = range(10), bleu: list[float] | None = None) -> None:
    """The tuned model's answers to so many questions of a set, the first ones of them right."""
    scored = [
        {
            "kind": "scored", "set": "letters", "index": place, "category": None, "prompt": f"question {number}", "expected": "x",
            "answer": "y", "scores": {"exact": float(place < right)} | ({"bleu": 1.0} if bleu else {}),
            **({"counts": {"bleu": bleu}} if bleu else {}),
        }
        for place, number in enumerate(rows)
    ]  # fmt: skip
    write_jsonl(run.eval / "after.jsonl", scored)
    part = {"unit": "share", "after": right / len(rows), "after_interval": [0.1, 0.9]}
    write_json(run.scores, {"sets": {"letters": {"n": len(rows), "first": "exact", "scores": {"exact": part}}}})


def test_tuned_models_are_compared_row_by_row(tmp_path: Path) -> None:
    """Nine of ten against one of ten: eight rows right in one only, by McNemar's exact test 2 / 2**8."""
    one, two = make(tmp_path, "a"), make(tmp_path, "b")
    answered(one, 1)
    answered(two, 9)
    scores = words(write_comparison([one, two], tmp_path / "c.html").read_text(encoding="utf-8"), "scores")
    assert "All rows a 10 - 10.0% [10.0, 90.0]" in scores
    assert (
        "letters: tuned models against that of a, row by row Score Run Rows of both a this run difference p" in scores
    )
    assert re.search(r"Exact match b 10 10\.0% \[\S+ \S+\] 90\.0% \[\S+ \S+\] \+80\.0 \[\S+ \S+\] 0\.0078", scores)
    assert "different questions" not in scores


def test_rows_pair_by_what_was_asked_and_not_by_their_number(tmp_path: Path) -> None:
    one, two = make(tmp_path, "a"), make(tmp_path, "b")
    answered(one, 10, range(10))
    answered(two, 0, range(6, 16))
    scores = words(write_comparison([one, two], tmp_path / "c.html").read_text(encoding="utf-8"), "scores")
    assert "letters: 4 rows are those of both a (10) and b (10); the scores above are of different questions" in scores
    assert "Exact match b 4 100.0%" in scores
    answered(two, 0, range(20, 30))
    scores = words(write_comparison([one, two], tmp_path / "c.html").read_text(encoding="utf-8"), "scores")
    assert "0 rows are those of both" in scores and "row by row" not in scores


def test_the_first_run_is_what_several_are_compared_with(tmp_path: Path) -> None:
    runs = [make(tmp_path, name) for name in "abc"]
    for run, right in zip(runs, (1, 5, 9), strict=True):
        answered(run, right)
    scores = words(write_comparison(runs, tmp_path / "c.html").read_text(encoding="utf-8"), "scores")
    assert "Exact match b 10 10.0%" in scores and "Exact match c 10 10.0%" in scores


def test_rows_that_do_not_fit_together_are_not_tested(tmp_path: Path) -> None:
    one, two = make(tmp_path, "a"), make(tmp_path, "b")
    answered(one, 1, bleu=[1.0, 2.0])
    answered(two, 1, bleu=[1.0])
    html = write_comparison([one, two], tmp_path / "c.html").read_text(encoding="utf-8")
    assert "row by row" not in words(html, "scores")


def test_the_plan_is_the_one_that_was_taken(tmp_path: Path) -> None:
    runs = [make(tmp_path, "a"), make(tmp_path, "b")]
    for run in runs:
        run.config.write_text(run.config.read_text() + "parallel:\n  plan: auto\n")
    write_json(runs[0].env, {"resolved": {"plan": "zero2"}})
    html = write_comparison(runs, tmp_path / "c.html").read_text(encoding="utf-8")
    assert "Plan zero2 auto" in words(html, "outcome")


def test_the_same_config_is_said_to_be_so(tmp_path: Path) -> None:
    runs = [make(tmp_path / "one", "a"), make(tmp_path / "two", "a")]
    html = write_comparison(runs, tmp_path / "c.html").read_text(encoding="utf-8")
    assert "Nothing: the configs are the same" in words(html, "settings")
    assert "<title>a (1) and a (2)" in html


@pytest.mark.parametrize("count", [1, MOST + 1])
def test_one_run_and_too_many_are_refused(count: int, tmp_path: Path) -> None:
    runs = [make(tmp_path, f"run{number}") for number in range(count)]
    with pytest.raises(ConfigError, match="two to 8"):
        write_comparison(runs, tmp_path / "c.html")
    assert not (tmp_path / "c.html").exists()


def test_hostile_words_and_damaged_files_stay_text(tmp_path: Path) -> None:
    good, bad = make(tmp_path, "a"), RunDir(tmp_path / f"b {EVIL}".replace("/", ""))
    bad.path.mkdir()
    bad.config.write_text("{ no: yaml")
    bad.scores.write_text("[]")
    bad.metrics.write_text('{"step": 1, "loss": "x"}\nno json\n')
    write_json(bad.status, {"state": EVIL})
    for html in (
        write_comparison([good, bad], tmp_path / "c.html").read_text(encoding="utf-8"),
        write_index([good, bad], tmp_path / "index.html").read_text(encoding="utf-8"),
    ):
        assert "<img" not in html and "&lt;img src=x" in html
        assert "default-src &#39;none&#39;" in html


def test_the_list_links_to_reports_that_are_there_latest_first(tmp_path: Path) -> None:
    old, new = make(tmp_path, "old"), make(tmp_path, "new")
    write_json(old.status, {"state": "failed", "updated": "2026-01-01T00:00:00+00:00"})
    (new.path / "report.html").write_text("x")
    html = write_index([old, new], tmp_path / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'<th scope="row">(.*?)</th>', html) == ['<a href="new/report.html">new</a>', "old"]
    assert "Exact match: 0.0% to 10.0%" in html
    assert "2 runs" in html and ">2 of 2<" in html


def test_a_list_elsewhere_links_to_the_runs_and_names_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFT_DIST_RUNS", str(tmp_path / "runs"))
    run = make(tmp_path / "runs", "a b".replace(" ", "-"))
    run.report.write_text("x")
    page = write_reports([], index=True, out=tmp_path / "pages" / "all.html")
    html = page.read_text(encoding="utf-8")
    (link,) = re.findall(r'<a href="([^"]*)"', html)
    assert (page.parent / link).resolve() == run.report
    assert f'<p class="eyebrow">{tmp_path / "runs"}</p>' in html


def test_an_empty_folder_has_a_list_too(tmp_path: Path) -> None:
    assert "There are no runs here." in write_index([], tmp_path / "index.html").read_text(encoding="utf-8")


def test_what_the_command_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_DIST_RUNS", str(tmp_path))
    for name in ("a", "b"):
        make(tmp_path, name)
    assert write_reports(["a", "b"], index=False, out=None).resolve() == tmp_path / "compare-a-b.html"
    assert write_reports([], index=True, out=None) == tmp_path / "index.html"
    assert write_reports(["a", "b"], index=False, out=tmp_path / "x.html") == tmp_path / "x.html"
    assert (tmp_path / "x.html").is_file()


@pytest.mark.parametrize(
    ("names", "index", "out", "said"),
    [
        ([], False, None, "no run was named"),
        (["a"], True, None, "runs were named"),
        (["a"], False, Path("x"), "--out is for"),
        (["nobody"], False, None, "no run named"),
        (["a", "a"], False, None, "a is named twice"),
        (["a", "b"], False, Path(), r"--out \. is a folder"),
        ([], True, Path(), r"--out \. is a folder"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    names: list[str], index: bool, out: Path | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFT_DIST_RUNS", str(tmp_path))
    for name in "ab":
        make(tmp_path, name)
    with pytest.raises(ConfigError, match=said):
        write_reports(names, index=index, out=out)


def test_a_run_that_may_not_be_read_does_not_keep_the_others_from_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of another user's in a shared runs folder: `report --index` ended with its name."""
    runs = [RunDir(tmp_path / name) for name in ("mine", "theirs")]
    for run in runs:
        run.path.mkdir()
        run.status.write_text('{"state": "done"}')
    is_file = Path.is_file

    def kept(path: Path) -> bool:
        if path.parent.name == "theirs":
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", kept)
    page = write_index(runs, tmp_path / "index.html").read_text()
    assert "mine" in page
    assert "theirs" in page
