"""report.html: complete, self-contained, and safe whatever the run directory holds."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from html import unescape
from html.parser import HTMLParser

import pytest

from sft_dist.config.loader import load_config, write_config
from sft_dist.config.schema import Config
from sft_dist.files import append_jsonl, write_json, write_jsonl, write_text
from sft_dist.report.config_text import marked_lines
from sft_dist.report.page import MAX_SAMPLES, write_report
from sft_dist.rundir import RunDir

EVIL = "</script></style><script>alert(1)</script>\"' onload='x' <img src=\"http://evil.example/x\" onerror=alert(1)> {{ 7 * 7 }}"
BIDI = "user\u202egnp.exe\u2066 zero\u200bwidth \x1b[31m \x00 \ud800 end"
LONG = "x" * 10_000
HOSTILE = f"{EVIL} {BIDI} {LONG}"
TAGS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "main",
    "header",
    "nav",
    "section",
    "footer",
    "article",
    "script",
}
TAGS |= {"h1", "h2", "h3", "h4", "p", "div", "span", "b", "a", "ul", "li", "dl", "dt", "dd", "code", "output"}
TAGS |= {"table", "caption", "thead", "tbody", "tr", "th", "td", "figure", "figcaption"}
TAGS |= {"svg", "g", "path", "line", "circle", "rect", "text"}


class Page(HTMLParser):
    """Elements, attributes and text of a page; `raw` holds what style and script elements contain."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"style": [], "script": []}
        self.open = ""
        self.words: list[str] = []
        self.feed(html)
        self.close()
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open = tag

    def handle_endtag(self, tag):
        self.open = ""

    def handle_data(self, data):
        if self.open in self.raw:
            self.raw[self.open].append(data)
        else:
            self.words.append(data)

    def find(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.tags if name == tag and attributes.items() <= found.items()]


@pytest.fixture
def run(tmp_path) -> RunDir:
    (tmp_path / "demo").mkdir()
    return RunDir(tmp_path / "demo")


def report(run: RunDir) -> tuple[str, Page]:
    path = write_report(run)
    assert path == run.report
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def fill(run: RunDir, word: str) -> None:
    """Every file that a report reads, with `word` wherever a text may stand, as a key too."""
    raw = lambda value: json.dumps(value) + "\n"  # noqa: E731  (escaped, as a lone surrogate has no UTF-8)
    write_text(run.status, raw({"state": "failed", "reason": word, "step": 40, "max_steps": 40}))
    name = json.dumps(word.replace("\ud800", ""))
    write_text(run.config, f"model:\n  name: {name}\nrun:\n  name: demo\ntrain:\n  learning_rate: 8.0e-05\n  seed: 1\n")
    write_text(
        run.provenance, raw({"run.name": "default", "train.learning_rate": "cli " + word, "train.seed": "default"})
    )
    write_text(
        run.env,
        raw({"host": word, word: word, "versions": {word: word}, "decisions": [word], "gpus": [{"name": word}]}),
    )
    write_text(
        run.ledger,
        raw(
            {
                "train": {"rows_in": 160, word: word, "sources": [{"source": word, word: 1, "reasons": {word: 3}}]},
                word: {"dropped": {word: 2}},
                "list": [{"a": word}],
            }
        ),
    )
    write_text(run.attempts, raw({"attempt": 1, "start": word, "end": word, word: word, "ended": word}))
    write_text(run.metrics, raw({"step": 1, "loss": 1.0, "time": word, word: word}) + raw({"step": word, "loss": word}))
    part = {"exact_match": 0.0, "label_accuracy": 0.5, "by_category": {word: {"n": 3, "exact_match": 0.0}}}
    score = {"unit": word, "before": 0.5, "after": 1.0, "before_interval": [word, 1], "p_value": word}
    changed = {"index": word, "category": word, "expected": word, "before": word, "after": word}
    inside = {"n": word, "scores": {word: score}}
    sets = {word: {**inside, "first": word, "by_category": {word: inside}, "gains": [changed], "losses": [changed]}}
    write_text(run.scores, raw({"before": part, "after": part, "n": 3, "sets": sets}))
    rows = raw({"kind": "question", "prompt": [{"role": word, "content": word}], "answer": word})
    scored = {"kind": "scored", "index": 0, "category": word, "prompt": word, "expected": word, "answer": word}
    rows += raw({**scored, "exact_match": True, "predicted_label": word, "label_correct": False})
    for side in ("before", "after"):
        write_text(run.eval / f"{side}.jsonl", rows)


def test_hostile_content_stays_text(run):
    fill(run, HOSTILE)
    html, page = report(run)
    assert {tag for tag, _ in page.tags} <= TAGS
    attributes = {(tag, name) for tag, found in page.tags for name in found}
    assert not [name for _, name in attributes if name.startswith("on") or name in ("src", "srcset", "style", "action")]
    assert all(link["href"].startswith("#") for link in page.find("a"))
    assert len(page.find("script")) == len(page.find("style")) == 1
    # What is hostile is shown, not dropped: in the prompt, the answers, the ledger, the config and the rest.
    assert page.text.count("<script>alert(1)</script>") > 20
    assert "{{ 7 * 7 }}" in page.text
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200b\x00\x1b\ud800]", html)
    assert "user<U+202E>gnp.exe<U+2066> zero<U+200B>width <U+001B>[31m <U+0000> <U+D800> end" in page.text


def section(html: str, name: str) -> str:
    inside = html.split(f'<section id="{name}">')[1].split("</section>")[0]
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", inside)).split())


def test_how_to_train_it_again(run):
    config = load_config("smoke", ["run.dir=my runs", "run.seed=7", "model.revision=abc"]).config
    write_text(run.config, write_config(config))
    git = {"commit": "0123abcd", "changed_files": "2"}
    resolved = {"plan": "zero2", "world_size": 8, "dtype": "bfloat16"}
    versions = {"torch": "2.13.0", "trl": "1.16.0"}
    write_json(run.env, {"git": git, "versions": versions, "python": "3.11.7", "resolved": resolved})
    write_json(run.ledger, {"key": "9a73fbe2", "train": {"rows": 56}, "eval": {"rows": 8}})
    html, _ = report(run)
    told = section(html, "reproduce")
    assert "Command sft-dist train 'my runs/demo/config.yaml' run.name=demo-again" in told
    assert "Code commit 0123abcd of the repository that the command was typed in, and 2 changed file(s)" in told
    assert "Packages Python 3.11.7: torch==2.13.0 trl==1.16.0" in told
    assert "Model embedded:tiny at abc" in told
    assert "Data hash 9a73fbe2: 56 rows in train, 8 rows in eval" in told
    assert "Seed 7" in told and "Plan zero2 in 8 process(es), bfloat16" in told


def test_the_command_makes_the_same_config_again(run, monkeypatch):
    """What the page says is what one types: the config of the run is read back to the same values, under another name."""
    monkeypatch.chdir(run.path.parent)
    config = load_config("smoke", ["run.dir=.", "run.name=demo", "train.learning_rate=3e-4"]).config
    write_text(run.config, write_config(config))
    told = section(report(run)[0], "reproduce")
    words = shlex.split(re.search(r"Command (sft-dist train .*?-again)", told)[1])
    again = load_config(words[2], words[3:]).config
    assert again == config.model_copy(update={"run": config.run.model_copy(update={"name": "demo-again"})})


@pytest.mark.parametrize("env", [{}, {"git": {}}, {"git": 3, "versions": [1], "resolved": "x"}])
def test_what_is_not_known_is_left_out_of_how_to_reproduce(run, env):
    write_text(run.config, "run:\n  name: demo\n")
    write_json(run.env, env)
    told = section(report(run)[0], "reproduce")
    assert "Command sft-dist train runs/demo/config.yaml run.name=demo-again" in told
    assert "Packages" not in told and "Data" not in told
    assert ("not typed in a git repository" in told) == bool(env)
    assert 'id="reproduce"' not in write_report(RunDir(empty(run))).read_text(encoding="utf-8")


def empty(run):
    folder = run.path.parent / "empty"
    folder.mkdir()
    return folder


def test_the_default_stands_beside_what_was_set(run):
    words = ["train.learning_rate=3e-4", "evaluate.questions=[a, b]", "model.revision=abc", "model.lora={r: 4}"]
    loaded = load_config("smoke", words)
    write_text(run.config, write_config(loaded.config))
    write_json(run.provenance, loaded.provenance)
    told = section(report(run)[0], "config")
    default = Config().train.learning_rate
    assert f"learning_rate: 0.0003 cli (default: {json.dumps(default)})" in told
    assert "revision: abc cli (default: not set)" in told
    assert "questions: cli (default: [])" in told
    assert "- a cli - b" in told, "only the first line says it"
    assert "r: 4 cli (default: model.lora not set)" in told
    assert "seed: 42 cli" not in told


def test_the_sources_of_the_rows_are_a_table(run):
    one = {
        "source": "a.jsonl",
        "format": "messages",
        "rows_in": 1200,
        "truncated_rows": 0,
        "dropped_reasons": {"no_answer": 2, "not_json": 1},
        "tokens_in": 4000,
        "length_percentiles": {"50": 3},
    }
    two = {
        "source": "b.csv",
        "format": "text",
        "rows_in": 5,
        "truncated_rows": 0,
        "dropped_reasons": {},
        "weighted_rows": 4,
    }
    ledger = {"key": "abc", "train": {"rows": 1205, "sources": [one, two]}, "eval": {"rows": 9, "sources": [one]}}
    write_json(run.ledger, ledger)
    html, page = report(run)
    data = html[html.index('<section id="data">') :].split("</section>")[0]
    tables = [re.sub(r"\s*<[^>]*>\s*", "|", table) for table in data.split("<table")[1:]]
    assert len(tables) == 3 and "sources" not in tables[0] and "1,205" in tables[0]
    cells = [cell for cell in tables[1].split(">", 1)[1].split("|") if cell]
    assert cells == [
        "Sources: train", "source", "format", "rows in", "dropped reasons", "weighted rows",
        "a.jsonl", "messages", "1,200", "no answer 2, not json 1",
        "b.csv", "text", "5", "-", "4",
    ]  # fmt: skip
    assert "Sources: eval" in tables[2] and "{" not in page.text


@pytest.mark.parametrize("sources", [[], "a", [1], [{}, 2], {"a": 1}, None])
def test_damaged_sources_of_the_rows_are_shown_as_they_are(run, sources):
    write_json(run.ledger, {"train": {"rows": 3, "sources": sources}})
    html, _ = report(run)
    assert html.count("<table") == 1


def test_hostile_folder_name(tmp_path):
    run = RunDir(tmp_path / "<img src=x onerror=alert(1)> \u202e")
    run.path.mkdir()
    run.write_status(state="stopped", reason="SIGTERM")
    _, page = report(run)
    assert not page.find("img")
    assert "sft-dist resume '<img src=x onerror=alert(1)> <U+202E>'" in page.text


def test_long_texts_are_cut_and_may_wrap(run):
    fill(run, LONG)
    _, page = report(run)
    assert "(6,000 more characters)" in page.text
    assert re.search(r"\bbody {[^}]*overflow-wrap: anywhere;", page.raw["style"][0])


def test_a_scored_row_says_its_set_where_there_are_several_and_a_long_expected_answer_has_room(run):
    rows = [
        {"kind": "scored", "set": name, "index": 0, "prompt": name, "expected": expected, "answer": "x"}
        for name, expected in (("letters", "word " * 40), ("tickets", "refund"))
    ]
    run.eval.mkdir()
    for path in (run.eval / "before.jsonl", run.eval / "after.jsonl"):
        write_jsonl(path, rows)
    part = {"n": 1, "first": "exact", "scores": {"exact": {"unit": "share", "before": 0.0, "after": 1.0}}}
    write_json(run.scores, {"sets": {"letters": part, "tickets": part}})
    html, page = report(run)
    assert "<span>letters</span>" in html and "<span>tickets</span>" in html
    assert [len(page.find("div", **{"class": name})) for name in ("answers", "answers three")] == [1, 1]
    write_json(run.scores, {"sets": {"letters": part}})
    assert "<span>letters</span>" not in report(run)[0]


def test_self_contained_under_a_policy_that_allows_only_itself(run):
    fill(run, "plain words")
    html, page = report(run)
    assert not re.search(r"https?:|//\w|url\(|@import|javascript:|<link|<iframe", html.replace("<!doctype html>", ""))
    (policy,) = page.find("meta", **{"http-equiv": "Content-Security-Policy"})
    rules = dict(rule.strip().split(" ", 1) for rule in policy["content"].split(";"))
    for directive, tag in (("script-src", "script"), ("style-src", "style")):
        digest = base64.b64encode(hashlib.sha256("".join(page.raw[tag]).encode()).digest()).decode()
        assert rules[directive] == f"'sha256-{digest}'"
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    first = [tag for tag, _ in page.tags]
    assert first.index("meta") < first.index("style")


def test_sections_and_figures_of_a_finished_run(run):
    fill(run, "words")
    run.write_status(state="done", step=40, max_steps=40)
    write_text(run.attempts, "")
    append_jsonl(run.attempts, {"attempt": 1, "start": "2026-01-02T10:00:00+00:00", "end": "2026-01-02T10:02:31Z"})
    categories = {"refund": {"n": 5, "exact_match": 0.0, "label_accuracy": 0.4}}
    after = {"exact_match": 29 / 30, "label_accuracy": None, "by_category": {"refund": {"n": 5, "exact_match": 1.0}}}
    before = {"exact_match": 0.0, "label_accuracy": 1 / 3, "by_category": categories}
    write_json(run.scores, {"before": before, "after": after, "n": 30})
    _, page = report(run)
    assert [found["id"] for found in page.find("section")] == [
        *("scores", "loss", "samples", "data", "config", "reproduce", "environment", "attempts")
    ]
    assert "demo done" in page.text
    assert "Exact match on 30 held-out rows 0.0% \u2192 96.7%" in page.text
    assert "Steps 40 of 40 Wall time 2 min 31 s" in page.text
    assert "exact match 30 0.0% 96.7% +96.7 - likeliest label right 30 33.3% - - -" in page.text
    assert "refund, exact match 5 0.0% 100.0% +100.0 - refund, likeliest label right 5 40.0% - - -" in page.text
    assert "took 1 2026-01-02 10:00:00 UTC 2026-01-02 10:02:31 UTC 2 min 31 s" in page.text


def test_the_step_of_a_run_that_was_killed_is_that_of_its_last_row(run):
    fill(run, "words")
    run.write_status(state="failed", step=5, max_steps=40)
    write_jsonl(run.metrics, [{"step": 7, "loss": 1.0}])
    assert "Steps 7 of 40" in report(run)[1].text


def test_only_values_that_were_set_are_marked(run):
    fill(run, "words")
    html, page = report(run)
    marked = re.findall(r'<div class="row set"><code>(.*?)</code><span class="source">(.*?)</span>', html)
    assert marked == [("  learning_rate: 8.0e-05", f"cli words (default: {Config().train.learning_rate})")]
    assert html.count('<div class="row"><code>') == 6
    assert "1 line is marked" in page.text


def test_marks_cover_lists_blocks_and_one_line_values():
    text = "a:\n  x:\n  - 1\n  - 2\n  y: null\n  z: |\n    one\n    two\n  w: [1,\n    2]\n  v: 3\n"
    provenance = {"a.x": "file f", "a.y": "default", "a.z": "cli", "a.w": "recipe r"}
    marks = ["", *["file f"] * 3, "", *["cli"] * 3, *["recipe r"] * 2, ""]
    assert [mark for _, mark in marked_lines(text, provenance)] == marks
    assert [line for line, _ in marked_lines("{ no: yaml", provenance)] == ["{ no: yaml"]


def scored_row(index: int, *, right: bool, answer: str) -> dict:
    prompt = [{"role": "system", "content": "Sort."}, {"role": "user", "content": f"request {index}"}]
    row = {"kind": "scored", "index": index, "category": None, "prompt": prompt, "expected": "refund", "answer": answer}
    return {**row, "exact_match": right, "predicted_label": None, "label_correct": None, "label_logprobs": None}


def test_changed_rows_come_first_and_thirty_are_shown(run):
    for index in range(40):
        better = index >= 38
        append_jsonl(run.eval / "before.jsonl", scored_row(index, right=index == 37, answer="hm"))
        append_jsonl(run.eval / "after.jsonl", scored_row(index, right=better, answer="refund" if better else "hm"))
    html, page = report(run)
    assert len(page.find("article")) == MAX_SAMPLES == 30
    assert re.findall(r"request \d+", page.text)[:4] == ["request 37", "request 38", "request 39", "request 0"]
    assert "1 became wrong 2 became right 37 stayed wrong" in page.text
    assert "10 more rows in eval/before.jsonl" in page.text
    assert page.text.count("Sort.") == 1  # a system message that all share stands once
    assert html.count("&#10003; right") == 1 + 2 and html.count("&#10007; wrong") == 29 + 28


def test_each_set_has_its_scores_with_intervals_and_what_changed_most(run):
    fill(run, "words")
    score = {
        "unit": "share", "before": 0.25, "after": 1.0, "change": 0.75, "before_interval": [0.125, 0.375],
        "after_interval": [1.0, 1.0], "change_interval": [0.5, 0.875], "p_value": 0.00001,
    }  # fmt: skip
    gain = {"index": 7, "category": "refund", "expected": "yes", "before": "no", "after": "yes", "score_before": 0.0}
    data = {"n": 36, "first": "json_all", "scores": {"bleu": {"unit": "points", "after": 56.78}, "json_all": score}}
    letters = {"n": 4, "first": "exact", "scores": {"exact": score}, "gains": [gain], "losses": []}
    write_json(run.scores, {"sets": {"letters": letters, "data": data}})
    html, page = report(run)
    assert "JSON, all fields on 36 held-out rows 25.0% \u2192 100.0%" in page.text, "evaluate.data's set comes first"
    line = "36 25.0% [12.5, 37.5] 100.0% [100.0, 100.0] +75.0 [50.0, 87.5] <0.0001"
    assert f"data Score n before after change p JSON, all fields {line} BLEU 36 - 56.8" in page.text
    assert "Largest gains row category expected before after 7 refund yes no yes" in page.text
    assert "Largest losses" not in page.text
    assert html.count('class="bar"') == 1
