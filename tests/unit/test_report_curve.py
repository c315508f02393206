"""Loss curves: series, thinning, axes, the SVG and loss.png."""

from __future__ import annotations

import json
import math
import re
import struct
import subprocess
import sys

import pytest

from sft_dist.files import append_jsonl, write_text
from sft_dist.report.curve import MAX_POINTS, draw, series, thin, ticks
from sft_dist.report.page import write_report
from sft_dist.report.plot import plot_loss
from sft_dist.rundir import RunDir


def rows(*losses: object) -> list[dict]:
    return [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]


@pytest.fixture
def run(tmp_path) -> RunDir:
    (tmp_path / "demo").mkdir()
    return RunDir(tmp_path / "demo")


def test_values_that_are_no_number_are_gaps():
    values = [1.0, None, math.nan, math.inf, -math.inf, "2", True, 10**400, 2]
    assert [value for _, value in series(rows(*values), "loss")] == [1.0, *[None] * 7, 2.0]


def test_rows_without_the_key_or_a_step_are_left_out():
    events = [{"step": 1, "loss": 1.0}, {"step": 2, "eval_loss": 3.0}, {"loss": 4.0}, {"step": None, "loss": 5.0}]
    assert series(events, "loss") == [(1, 1.0)]
    assert series(events, "eval_loss") == [(2, 3.0)]


def test_a_resumed_attempt_replaces_the_steps_that_were_lost():
    events = [{"step": step, "loss": 1.0} for step in (10, 20, 30, 40)] + [{"step": 40, "eval_loss": 9.0}]
    events += [{"step": 30, "loss": 2.0}, {"step": 35, "loss": 3.0}]
    assert series(events, "loss") == [(10, 1.0), (20, 1.0), (30, 2.0), (35, 3.0)]
    assert series(events, "eval_loss") == []


def test_thinning_keeps_ends_spikes_and_gaps():
    points = [(step, 1.0 + step * 1e-6) for step in range(100_000)]
    points[41_234] = (41_234, 77.0)
    points[70_001] = (70_001, None)
    kept = thin(points)
    assert 900 < sum(value is not None for _, value in kept) <= MAX_POINTS
    assert kept[0] == points[0] and kept[-1] == points[-1]
    assert (41_234, 77.0) in kept and (70_001, None) in kept
    assert kept == sorted(kept, key=lambda point: point[0])


def test_thinning_leaves_few_points_alone():
    points = [(step, float(step)) for step in range(MAX_POINTS)]
    assert thin(points) == points
    assert thin([(1, None), (2, None), (3, 1.0), (4, None), (5, None)]) == [(1, None), (3, 1.0), (4, None)]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 2, [0, 0.5, 1, 1.5, 2]), (0.3, 9.7, [0, 2, 4, 6, 8, 10]), (-1, 1, [-1, -0.5, 0, 0.5, 1]), (0, 1e-7, None)],
)
def test_ticks_are_round_and_cover_the_span(low, high, expected):
    found = ticks(low, high, 5)
    assert found[0] <= low and found[-1] >= high * (1 - 1e-9) and 3 <= len(found) <= 8
    if expected:
        assert found == pytest.approx(expected)


def test_ticks_of_steps_are_whole():
    assert ticks(0, 3, 6, whole=True) == [0, 1, 2, 3]


def test_a_gap_breaks_the_line_and_a_lone_point_is_a_dot():
    curve = draw([*rows(*[1.0] * 70, None, 3.0, None, 1.0, 1.0)])
    (line,) = curve.lines
    assert line.path.count("M") == 2
    assert len(line.dots) == 1  # too many points for a dot each, but nothing else would show this one
    assert len(json.loads(line.values)) == 73


def test_one_point():
    curve = draw(rows(1.25))
    (line,) = curve.lines
    assert line.path == "" and line.dots == (("50.00%", "50.00%"),)
    assert [label for _, label in curve.x_ticks] == ["1"]
    assert curve.summary == "Training loss 1.25 at step 1."


@pytest.mark.parametrize(
    "losses", [(2.0, 2.0), (0.0, 0.0), (-3.0, 5.0), (1e-12, 2e-12), (1e29, -1e29), (1.0, 1.0 + 1e-15), (5e-324, 0.0)]
)
def test_any_range_has_axes_inside_the_box(losses):
    curve = draw(rows(*losses))
    numbers = [
        float(value) for value in re.findall(r"[-\d.e+]+", curve.lines[0].path.replace("M", " ").replace("L", " "))
    ]
    assert len(numbers) == 4 and all(-0.1 <= value <= 1000.1 for value in numbers)
    labels = [label for _, label in curve.y_ticks]
    assert 2 <= len(labels) <= 12


def test_nothing_to_draw():
    assert draw([]) is None
    assert draw(rows(None, math.nan)) is None
    assert draw([{"step": 1, "learning_rate": 1e-5}]) is None


def test_the_report_of_a_long_run_has_at_most_a_thousand_points_a_curve(run):
    events = [json.dumps({"step": step, "loss": 2.0 / (1 + step)}) for step in range(20_000)]
    events += [json.dumps({"step": 19_999, "eval_loss": 0.5})]
    write_text(run.metrics, "\n".join(events) + "\n")
    html = write_report(run).read_text()
    train, evaluation = re.findall(r'data-values="([^"]*)"', html)
    assert 900 < len(json.loads(train)) <= 1000
    assert json.loads(evaluation) == [[19999, 0.5]]
    assert "at most 1,000 points" in html
    assert len(html) < 150_000


def test_a_torn_line_costs_that_line_only(run):
    write_text(
        run.metrics, '{"step": 1, "loss": 1.0}\n{"step": 2, "lo{"step": 3, "loss": NaN}\n{"step": 4, "loss": 0.5}\n'
    )
    html = write_report(run).read_text()
    assert "Training loss 1 at step 1, 0.5 at step 4." in html
    assert "metrics.jsonl: 1 of 3 lines left out" in html


def size(path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", content[16:24])


@pytest.mark.parametrize("losses", [(1.0,), (1.0, None, 0.5), tuple(1 / step for step in range(1, 3000))])
def test_loss_png(run, losses):
    for row in rows(*losses):
        append_jsonl(run.metrics, {**row, "learning_rate": 1e-5})
    append_jsonl(run.metrics, {"step": len(losses), "eval_loss": 0.7})
    assert plot_loss(run) == run.loss_plot
    assert size(run.loss_plot) == (1152, 648)
    assert sorted(path.name for path in run.path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_no_loss_png_without_a_loss(run):
    append_jsonl(run.metrics, {"step": 1, "loss": None, "learning_rate": 1e-5})
    assert plot_loss(run) is None
    assert not run.loss_plot.exists()


@pytest.mark.filterwarnings("error")
def test_a_title_that_is_no_formula(tmp_path):
    run = RunDir(tmp_path / "a$x^{b \u8a13\u7df4 \u202e")
    run.path.mkdir()
    append_jsonl(run.metrics, {"step": 1, "loss": 1.0})
    assert plot_loss(run) == run.loss_plot


def test_the_reading_side_is_light():
    modules = "page, plot, tables, facts"
    code = (
        f"import sys; from sft_dist.report import {modules}\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'accelerate', 'matplotlib', 'rich', 'jinja2', 'yaml'}\n"
        "print(*heavy & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
