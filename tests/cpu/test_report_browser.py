"""report.html in a real browser: the curves answer the pointer, and a part of them can be looked at closely."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

from sft_dist.files import write_json, write_jsonl
from sft_dist.report.compare import MOST, write_comparison, write_index
from sft_dist.report.page import write_report
from sft_dist.rundir import RunDir

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

# Does what a hand would do to the first curve, and puts what it then sees into the page's title.
HAND = """
const svg = document.querySelector("figure.curve svg");
const box = svg.getBoundingClientRect();
const point = (kind, share) => svg.dispatchEvent(new PointerEvent(kind, {clientX: box.left + share * box.width, clientY: box.top + 5}));
const seen = () => ({
  reading: document.querySelector("figure.curve output").textContent,
  view: svg.querySelector("g[data-values] svg").getAttribute("viewBox").split(" ").map(Number),
  steps: [...svg.querySelectorAll(".step text")].map((text) => text.textContent),
  levels: [...svg.querySelectorAll(".level text")].map((text) => text.textContent),
});
const all = {before: seen()};
point("pointermove", 0.5); all.hover = seen();
point("pointerdown", 0.5); point("pointermove", 0.75); point("pointerup", 0.75); all.zoomed = seen();
svg.dispatchEvent(new MouseEvent("dblclick")); all.back = seen();
document.title = JSON.stringify(all);
"""


# Puts what is wider than its place into the page's title: the page itself, what lies beyond its edge, what would have to scroll.
MEASURE = """
const wide = document.documentElement.clientWidth;
const name = (one) => one.tagName + "." + one.className + " " + one.textContent.trim().slice(0, 40);
const colour = (one, which) => getComputedStyle(one)[which].match(/[0-9.]+/g).map(Number);
document.title = JSON.stringify({
  wide, page: document.documentElement.scrollWidth,
  scroll: [...document.querySelectorAll(".scroll")].map((one) => [one.scrollWidth, one.clientWidth]),
  beyond: [...document.querySelectorAll("main *")].filter((one) => !one.closest("svg") && !one.parentElement.closest(".scroll"))
    .filter((one) => one.getBoundingClientRect().right > wide + 1).map(name),
  page_colour: colour(document.body, "backgroundColor"),
  card: colour(document.querySelector("section"), "backgroundColor"),
  text: colour(document.body, "color"),
  quiet: colour(document.querySelector(".quiet, .note, footer"), "color"),
  ms: performance.now(),
});
"""


# Where the columns of the score tables stand.
SCORES = """
const left = (one) => { const range = document.createRange(); range.selectNodeContents(one); return Math.round(range.getBoundingClientRect().left); };
document.title = JSON.stringify({tables: [...document.querySelectorAll("#scores .numbers")].map((table) => ({
  edge: table.parentElement.getBoundingClientRect().right,
  after: [...table.querySelectorAll("td.after")].map((cell) => cell.getBoundingClientRect().right),
  begins: [...table.querySelectorAll("tr > :first-child")].map(left),
}))});
"""


def browse(page: Path, folder: Path, *flags: str) -> str:
    """The page as the browser has it in the end."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", "--dump-dom"]
    command += ["--hide-scrollbars", *flags]
    done = subprocess.run([*command, f"file://{page}"], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def look(html: str, folder: Path, *flags: str, script: str = MEASURE, width: int | None = None) -> dict[str, Any]:
    """What `script` saw in the page; with `width` in a frame that is so wide, since a window has a least width."""
    # The page's own policy lets no other script in.
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html) + f"<script>{script}</script>"
    page = folder / "looked-at.html"
    if width is not None:
        html = (
            f'<iframe style="width: {width}px; height: 800px; border: 0" srcdoc="{escape(html)}"></iframe><script>addEventListener('
            '"load", () => { document.title = frames[0].document.title; })</script>'
        )
    page.write_text(f"<title></title>{html}" if width is not None else html, encoding="utf-8")
    title = re.search(r"<title>(.*?)</title>", browse(page, folder / "profile", *flags), re.S)
    assert title is not None
    seen: dict[str, Any] = json.loads(unescape(title[1]))
    return seen


def full_run(root: Path, name: str = "demo") -> RunDir:
    """A run with wide tables: two sets of scores with intervals, and attempts with many columns."""
    run = RunDir(root / name)
    run.path.mkdir()
    run.config.write_text(f"run:\n  name: {name}\nmodel:\n  name: embedded:tiny\n", encoding="utf-8")
    write_jsonl(run.metrics, [{"step": step, "loss": 1.0 / step, "grad_norm": 1.0} for step in range(1, 50)])
    score = {"unit": "points", "before": 12.345, "after": 23.456, "change": 11.111, "p_value": 0.00123}
    score |= {f"{side}_interval": [10.0, 25.0] for side in ("before", "after", "change")}
    scores = dict.fromkeys(("a_rather_long_name_of_a_score_of_yours", "bleu", "chrf"), score)
    changed = {"index": 1, "category": "c" * 30, "expected": "word " * 30, "before": "x" * 200, "after": "word " * 60}
    part = {"n": 1000, "first": "bleu", "scores": scores, "by_category": {"refund": {"n": 10, "scores": scores}}}
    part |= {"gains": [{**changed, "score_before": 0.1, "score_after": 0.9}], "losses": []}
    write_json(run.scores, {"sets": {"data": part, "letters": part}})
    facts = {f"field_{number}": "value-without-a-gap-" + "x" * number for number in range(12)}
    write_jsonl(
        run.attempts,
        [{"attempt": 1, "start": "2026-11-22T10:00:00+00:00", "end": "2026-11-22T11:00:00+00:00", **facts}],
    )
    run.write_status(state="done", step=49, max_steps=49)
    return run


def pages(tmp_path: Path) -> dict[str, str]:
    """A report, a comparison of as many runs as it takes, and the list."""
    runs = [full_run(tmp_path, f"run-with-a-long-name-{number}") for number in range(MOST)]
    paths = {
        "report": write_report(runs[0]),
        "comparison": write_comparison(runs, tmp_path / "c.html"),
        "list": write_index(runs, tmp_path / "index.html"),
    }
    return {name: path.read_text(encoding="utf-8") for name, path in paths.items()}


def test_nothing_is_cut_off_on_paper(tmp_path: Path) -> None:
    """The print rules on a sheet of A4 between its margins, which is 718 pixels wide."""
    for name, html in pages(tmp_path).items():
        seen = look(html.replace("@media print", "@media all"), tmp_path, width=718)
        assert seen["wide"] == 718
        assert len(seen["scroll"]) >= 1
        assert [pair for pair in seen["scroll"] if pair[0] > pair[1]] == [], name
        assert (seen["page"], seen["beyond"]) == (718, []), name


def test_a_phone_shows_what_scores_became(tmp_path: Path) -> None:
    """Without a hand that moves the table: what follows is the change, which is in the two before it."""
    html = write_report(full_run(tmp_path)).read_text(encoding="utf-8")
    for table in look(html, tmp_path, script=SCORES, width=390)["tables"]:
        assert max(table["after"]) <= table["edge"]
        assert len(set(table["begins"])) == 1, "the words of the first column stand below each other"


def test_a_phone_shows_the_whole_page(tmp_path: Path) -> None:
    """Tables scroll in their own place; nothing else is wider than the screen."""
    for name, html in pages(tmp_path).items():
        seen = look(html, tmp_path, width=390)
        assert (seen["wide"], seen["page"], seen["beyond"]) == (390, 390, []), name


@pytest.mark.parametrize(("scheme", "dark"), [(0, True), (1, False)], ids=["dark", "light"])
def test_text_can_be_read_in_both_schemes(scheme: int, dark: bool, tmp_path: Path) -> None:
    """Contrast of 4.5 and more, as WCAG asks of text."""
    html = write_report(full_run(tmp_path)).read_text(encoding="utf-8")
    seen = look(html, tmp_path, f"--blink-settings=preferredColorScheme={scheme}")
    assert (sum(seen["page_colour"][:3]) < 128) == dark
    for text in ("text", "quiet"):
        for ground in ("page_colour", "card"):
            assert contrast(seen[text], seen[ground]) >= 4.5, (text, ground)


def contrast(one: list[float], other: list[float]) -> float:
    def luminance(colour: list[float]) -> float:
        parts = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (it / 255 for it in colour[:3])]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def test_hover_zoom_and_back(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "demo")
    run.path.mkdir()
    write_jsonl(run.metrics, [{"step": step, "loss": 1000.0 / step, "grad_norm": 1.0} for step in range(100, 201)])
    html = write_report(run).read_text(encoding="utf-8")
    seen = look(html, tmp_path, script=HAND)
    assert seen["hover"]["reading"] == "step 150: Training loss 6.667"
    assert seen["before"]["view"] == seen["hover"]["view"] == [0, 0, 1000, 1000]
    left, _, wide, tall = seen["zoomed"]["view"]
    assert (round(left), round(wide)) == (500, 250), "from step 150 to 175"
    assert tall < 500, "the values of these steps fill the height"
    assert (seen["zoomed"]["steps"][0], seen["zoomed"]["steps"][-1]) == ("150", "175")
    assert all(5.5 < float(level) < 6.9 for level in seen["zoomed"]["levels"])
    assert seen["back"] == {**seen["before"], "reading": seen["back"]["reading"]}


def test_a_long_run_is_a_small_page_that_opens_at_once(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """A hundred thousand log events."""
    run = RunDir(tmp_path / "long")
    run.path.mkdir()
    keys = ("loss", "grad_norm", "learning_rate", "tokens_per_s", "mfu", "memory_gib")
    rows = [{"step": step, **dict.fromkeys(keys, 1.0 + (step * 7919 % 1000) / 1000)} for step in range(1, 100_001)]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(run)
    assert page.stat().st_size < 2**20
    drawn = browse(page, tmp_path / "profile")
    assert len(re.findall(r'<figure class="curve"', drawn)) == 6
    seen = look(page.read_text(encoding="utf-8"), tmp_path)
    # The bar is two seconds on an idle machine; this one may be busy.
    record_property("milliseconds_until_open", seen["ms"])
    assert seen["ms"] < 10_000
