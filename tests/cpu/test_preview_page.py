"""The page of `data preview --html`, drawn by a real browser: every row, hostile ones as text, found by a search."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft_dist.data import shards
from sft_dist.data.notes import Notes
from sft_dist.files import write_jsonl
from sft_dist.rundir import RunDir
from sft_dist.stages import run_here
from sft_dist.train import rows as batches

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\u2028\u202e{{7*7}} &amp; <!--"
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


class Page(HTMLParser):
    """The rows that a browser drew: (header, [(class, text), ...]), and the names of all elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[tuple[str, list[tuple[str, str]]]] = []
        self.names: list[str] = []
        self.title, self._in, self._kind = "", "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self._in, self._kind = tag, dict(attributes).get("class") or ""
        if tag == "article":
            self.rows.append(("", []))

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "title":
            self.title += data
        elif self.rows and self._in == "header":
            self.rows[-1] = (self.rows[-1][0] + data, self.rows[-1][1])
        elif self.rows and self._in == "span":
            self.rows[-1][1].append((self._kind, data))


def drawn(path: Path, folder: Path, anchor: str = "") -> Page:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", "--dump-dom"]
    done = subprocess.run([*command, f"file://{path}{anchor}"], capture_output=True, text=True, timeout=120, check=True)
    return Page(done.stdout)


@pytest.fixture
def page(call_cli: Callable[..., int], tmp_path: Path) -> Path:
    chats = [
        ("Hi", "Hello!"),
        ("Hostile?", HOSTILE),
        ("Long?", "word " * 2000),
        *((f"Number {n}?", f"{n}.") for n in range(60)),
    ]
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in chats
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    path = tmp_path / "page.html"
    arguments = (f"data.train={tmp_path / 'rows.jsonl'}", "data.max_length=64", "--html", path, "--samples", "1000")
    assert call_cli("data", "preview", "smoke", *arguments) == 0
    return path


def test_nothing_in_the_file_is_fetched_or_markup_of_a_row(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:|//)", text)
    assert "default-src 'none'" in text
    assert Page(text).names.count("script") == 2 and "img" not in Page(text).names


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_draws_the_worst_rows_first_and_hostile_ones_as_text(page: Path, tmp_path: Path) -> None:
    found = drawn(page, tmp_path / "profile")
    assert found.title == "63 rows of smoke, as the model sees them"
    assert "img" not in found.names
    assert len(found.rows) == 50, "the first fifty, the others on request"
    header, tokens = found.rows[0]
    assert re.search(r"rows\.jsonl:3 .* \d,\d{3} beyond max_length", header)
    kinds = [kind for kind, _ in tokens]
    assert kinds.count("cut") > 100 and "trained" in kinds and "boundary" in kinds
    hostile = next(tokens for header, tokens in found.rows if "rows.jsonl:2" in header)
    text = "".join(text for _, text in hostile)
    assert "</script><script>document.title='owned'</script>" in text
    assert "\\u2028\\u202e{{7*7}}\u00b7&amp;\u00b7<!--" in text


def test_the_page_is_readable_on_paper_and_in_the_dark(page: Path) -> None:
    style = re.search(r"<style>(.*?)</style>", page.read_text(encoding="utf-8"), re.S)
    assert style is not None
    screen, _, paper = style[1].partition("@media print")
    assert "color-scheme: light dark" in screen, "fields and buttons follow the scheme"
    assert "max-height: none" in paper, "a row that scrolls is cut off on paper"
    assert "print-color-adjust: exact" in paper, "what is trained is told by its ground"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_search_finds_rows_and_marks_are_right(page: Path, tmp_path: Path) -> None:
    found = drawn(page, tmp_path / "profile", "#Number%2017?")
    assert [re.search(r":(\d+)", header).group(1) for header, _ in found.rows] == ["21"]  # type: ignore[union-attr]
    ((_, tokens),) = found.rows
    assert "".join(text for kind, text in tokens if "trained" in kind) == "17.<|im_end|>"
    assert [text for kind, text in tokens if kind == "boundary trained"] == ["<|im_end|>"]
    assert [text for kind, text in tokens if kind == "boundary"] == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]


# --- which rows, and how ---------------------------------------------------------------------------------------------


def chat(*turns: str, **answer: Any) -> dict[str, Any]:
    messages = [{"role": ("user", "assistant")[n % 2], "content": words} for n, words in enumerate(turns)]
    messages[-1] |= answer
    return {"messages": messages}


@pytest.fixture
def rows_on_page(call_cli: Callable[..., int], tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """`rows_on_page(rows, "--samples", "5")` makes a page of these rows; returns what it holds of each, and its text."""

    def make(rows: list[Any], *arguments: str) -> list[dict[str, Any]]:
        write_jsonl(tmp_path / "rows.jsonl", rows)
        path = tmp_path / "page.html"
        source = (f"data.train={tmp_path / 'rows.jsonl'}", "data.eval_size=0", "train.eval_strategy=no")
        assert call_cli("data", "preview", "smoke", *source, *arguments, "--html", path) == 0
        data = re.search('<script type="application/json" id="data">(.*?)</script>', path.read_text(encoding="utf-8"))
        assert data is not None
        found: list[dict[str, Any]] = json.loads(data[1])
        return found

    return make


def text_of(row: dict[str, Any], kinds: str) -> str:
    return "".join(text for kind, text in row["tokens"] if kind in kinds)


def test_the_worst_of_all_rows_are_on_the_page_whatever_their_place(
    rows_on_page: Callable[..., Any], tmp_path: Path
) -> None:
    rows = [chat(f"Number {n}?", f"{n}.") for n in range(1000)]
    rows[950] = chat("Long?", "word " * 200)
    rows[970] = chat("why " * 100, "lost")
    rows[980] = chat("What is neither long nor cut, but longer than most?", "It is this one here, I think.")
    found = rows_on_page(rows, "data.max_length=64", "--samples", "6")
    assert len(found) == 6
    cut, left_out, longest = (
        next(row for row in found if f"rows.jsonl:{line}" in row["where"]) for line in (951, 971, 981)
    )
    assert (cut["length"], cut["cut"] > 100, "word" in text_of(cut, "c")) == (64, True, True)
    assert "nothing of its answer is within max_length" in left_out["where"]
    assert (left_out["trained"], left_out["length"], "lost" in text_of(left_out, "c")) == (0, 64, True)
    assert left_out["badness"] > cut["badness"] > longest["badness"]
    assert "Left out: nothing to train on 1." in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_each_order_has_its_leaders_among_the_rows() -> None:
    """Twelve rows of one document each but for the last of two, and one of which nothing is left."""
    length = np.array([10, 10, 10, 99, 10, 10, 10, 10, 10, 10, 10, 5, 6])
    trained = np.array([5, 5, 1, 50, 5, 5, 5, 5, 5, 5, 5, 2, 3])
    cut, unknown = np.zeros(14, dtype=np.int64), np.zeros(14, dtype=np.int64)
    cut[5], unknown[7], cut[13] = 4, 9, 1
    sizes = np.array([1] * 11 + [2])
    notes = Notes(np.arange(14), cut, unknown, np.array([13]), np.arange(13), length, trained, sizes)
    assert notes.leading(100, None)[0] == 12 and sorted(notes.leading(100)) == list(range(13))
    padding = np.zeros(12, dtype=np.int64)
    padding[9] = 8
    # First of each order: worst (and least trained), cut, longest, unknown; then the second ones that are new.
    assert notes.leading(6) == [12, 5, 3, 7, 2, 11]
    assert 9 in notes.leading(6, padding) and 9 not in notes.leading(6)


def test_packed_rows_are_shown_with_their_documents(rows_on_page: Callable[..., Any]) -> None:
    rows = [chat(f"Number {n}?", f"{n}.") for n in range(40)]
    found = rows_on_page(rows, "data.max_length=128", "data.packing=true", "--samples", "1000")
    begins = [text for row in found for kind, text in row["tokens"] if kind == "d"]
    assert sorted(int(re.search(r"jsonl:(\d+)$", text)[1]) for text in begins) == list(range(1, 41))  # type: ignore[index]
    assert sum(row["documents"] for row in found) == 40 and max(row["documents"] for row in found) > 2
    for row in found:
        documents = "".join(f"\0{text}\0" if kind == "d" else text for kind, text in row["tokens"]).split("\0")[1:]
        for head, shown in zip(documents[::2], documents[1::2], strict=True):
            line = int(head.rsplit(":", 1)[1])
            assert f"Number\u00b7{line - 1}?" in shown and f"{line - 1}.<|im_end|>" in shown


def test_weights_stand_before_what_they_are_of(rows_on_page: Callable[..., Any]) -> None:
    found = rows_on_page([chat("Hi", "Hello!", weight=0.5), chat("Hi", "Bye!"), chat("Hi", "Oh!", weight=2)])
    shown = [text_of(row, "xtB") for row in found]
    assert shown == ["\u00d70.5Hello!<|im_end|>", "Bye!<|im_end|>", "\u00d72Oh!<|im_end|>"]


def test_padding_is_what_a_row_gets_in_the_first_epoch(
    rows_on_page: Callable[..., Any], new_run: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = (
        "model.attn_implementation=sdpa",
        "train={global_batch_size: 4, per_device_train_batch_size: 2, max_steps: 6, eval_strategy: no}",
    )
    rows = [chat(f"Number {n}?", f"{n}" * (1 + 7 * n % 19)) for n in range(21)]
    found = rows_on_page(rows, *settings, "--samples", "1000")
    got: dict[str, int] = {}
    collate = batches.Collator.__call__

    def noting(self: Any, given: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(self, given)
        for row, mask in zip(given, batch["attention_mask"], strict=True):
            got.setdefault(str(row["input_ids"]), int((mask == 0).sum()))
        return batch

    monkeypatch.setattr(batches.Collator, "__call__", noting)
    quiet = "evaluate={before: false, after: false, labels: [], data: null}"
    run = new_run(
        f"data.train={tmp_path / 'rows.jsonl'}", "data.eval_size=0", "train.eval_strategy=no", *settings, quiet
    )
    run_here(run)
    filling = [padding for ids, padding in got.items() if ids.count(",") == 0]
    assert len(filling) == 1 and len(got) == 22
    assert sorted(row["padding"] for row in found) == sorted(padding for ids, padding in got.items() if "," in ids)
    assert len({row["padding"] for row in found}) > 4
    for row in found:
        assert ([kind for kind, _ in row["tokens"]][-1] == "p") == (row["padding"] > 0)


def test_rows_that_cannot_be_used_do_not_stand_in_the_way(rows_on_page: Callable[..., Any], tmp_path: Path) -> None:
    bad: list[Any] = [{"messages": []}, {"messages": [{"role": "boss", "content": "x"}]}] * 20
    found = rows_on_page([*bad, chat("Hi", "Hello!")])
    assert [row["where"].rsplit(":", 1)[1] for row in found] == ["41"]
    assert "Left out: no answer 20, unknown role 20." in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_where_all_answers_are_lost_the_page_shows_them(rows_on_page: Callable[..., Any], tmp_path: Path) -> None:
    found = rows_on_page([chat("why " * 100, f"lost {n}") for n in range(9)], "data.max_length=64", "--samples", "5")
    assert len(found) == 5
    assert all("left out: nothing of its answer is within max_length" in row["where"] for row in found)
    assert (found[3]["trained"], found[3]["length"], "lost\u00b73" in text_of(found[3], "c")) == (0, 64, True)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "data.train: none of the 9 rows has an answer within data.max_length 64 tokens" in text


def test_the_terminal_says_what_is_lost_of_a_row_and_why(
    call_cli: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    refusing = tmp_path / "refusing.jinja"
    refusing.write_text(
        "{% for m in messages %}{% if m.content == 'No' %}{{ raise_exception('I take no No') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    )
    rows = [chat("Hi", "Hello!"), chat("Long?", "word " * 100), chat("why " * 100, "lost"), chat("No", "No")]
    write_jsonl(tmp_path / "rows.jsonl", rows)

    def said(row: int, *more: str) -> str:
        arguments = (f"data.train={tmp_path / 'rows.jsonl'}", "data.max_length=64", "--row", str(row), *more)
        assert call_cli("data", "preview", "smoke", *arguments) == 0
        return " ".join(capsys.readouterr().out.split())

    assert "cut off" not in said(1) and "left out" not in said(1)
    cut = re.search(r"(\d+) tokens beyond max_length 64 are cut off, (\d+) of them trained ones", said(2))
    assert cut is not None and int(cut[2]) + 1 == int(cut[1]) > 50, "all but the line's end"
    split = said(2, "data.packing=true", "data.packing_overflow=split")
    assert "tokens beyond max_length 64 become further documents" in split
    assert "left out: nothing of its answer is within max_length" in said(3)
    assert "I take no No" in said(4, f"model.chat_template={refusing}")


def test_rows_in_the_cache_are_not_made_again(
    rows_on_page: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [chat(f"Again {n}?", f"{n}.") for n in range(9)]
    first = rows_on_page(rows)
    monkeypatch.setattr(shards.ShardMaker, "make", None)
    assert rows_on_page(rows) == first


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_draws_documents_padding_and_weights(
    rows_on_page: Callable[..., Any], call_cli: Callable[..., int], tmp_path: Path
) -> None:
    rows = [chat(f"Number {n}?", f"{n}." * n, weight=0.25) for n in range(1, 9)]
    rows_on_page(rows, "data.packing=true", "data.max_length=128")
    tokens = [token for _, tokens in drawn(tmp_path / "page.html", tmp_path / "profile").rows for token in tokens]
    assert [kind for kind, _ in tokens].count("document") == [kind for kind, _ in tokens].count("weight") == 8
    rows_on_page(rows, "model.attn_implementation=sdpa", "train.per_device_train_batch_size=4")
    found = drawn(tmp_path / "page.html", tmp_path / "profile")
    padded = [(header, tokens) for header, tokens in found.rows if "of padding" in header]
    assert padded and all(tokens[-1][0] == "padding" for _, tokens in padded)
