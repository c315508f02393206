"""The page of `data preview --html`, drawn by a real browser: every row, hostile ones as text, found by a search."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sft_dist.files import write_jsonl

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
        ("Long?", "word " * 200),
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
    assert "rows.jsonl:3" in header and "beyond max_length" in header
    kinds = [kind for kind, _ in tokens]
    assert kinds.count("cut") > 100 and "trained" in kinds and "boundary" in kinds
    hostile = next(tokens for header, tokens in found.rows if "rows.jsonl:2" in header)
    text = "".join(text for _, text in hostile)
    assert "</script><script>document.title='owned'</script>" in text
    assert "\\u2028\\u202e{{7*7}}\u00b7&amp;\u00b7<!--" in text


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_search_finds_rows_and_marks_are_right(page: Path, tmp_path: Path) -> None:
    found = drawn(page, tmp_path / "profile", "#Number%2017?")
    assert [re.search(r":(\d+)", header).group(1) for header, _ in found.rows] == ["21"]  # type: ignore[union-attr]
    ((_, tokens),) = found.rows
    assert "".join(text for kind, text in tokens if "trained" in kind) == "17.<|im_end|>"
    assert [text for kind, text in tokens if kind == "boundary trained"] == ["<|im_end|>"]
    assert [text for kind, text in tokens if kind == "boundary"] == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
