"""Curves: series from log events, thinned for drawing, with axes and SVG coordinates."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sft_dist.report.text import number

MAX_POINTS = 1000
# Title and key in metrics.jsonl, of those that are drawn together and of those that stand alone.
LOSSES = (("Training loss", "loss"), ("Evaluation loss", "eval_loss"))
OTHERS = (
    ("Learning rate", "learning_rate"),
    ("Gradient norm", "grad_norm"),
    ("Tokens per second", "tokens_per_s"),
    ("Model FLOPs utilisation", "mfu"),
    ("Peak memory, GiB", "memory_gib"),
)

Point = tuple[int, float | None]  # step and value; None is a gap
Tick = tuple[str, str]  # position in percent and label


@dataclass(frozen=True)
class Line:
    """One curve in SVG: a path in a 1000 x 1000 box, dots in percent, and [[step, value], ...] as JSON for the hover."""

    name: str
    look: str
    """`train`, `eval`, or `run1` to `run8`: how the style sheet draws it."""
    path: str
    dots: tuple[tuple[str, str], ...]
    values: str


@dataclass(frozen=True)
class Curve:
    """What the template draws; `span` is [step, step, value, value] of the axes as JSON."""

    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    span: str
    summary: str
    thinned: bool


def series(rows: Iterable[dict[str, Any]], key: str) -> list[Point]:
    """The values of `key` by step; a null or non-finite value is a gap.

    Where a resumed attempt goes back to an earlier step, its rows replace those that the lost steps left behind.
    """
    found: list[Point] = []
    for row in rows:
        step = number(row.get("step"))
        if step is None:
            continue
        own = key in row
        # Any row of an earlier step, whatever it logs, shows that the run went back.
        while found and (found[-1][0] > step or (own and found[-1][0] == step)):
            found.pop()
        if own:
            found.append((int(step), number(row[key])))
    return found


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` values (4 or more) that keep the first, the last, and every stretch's lowest, highest and gap."""
    real = [index for index, (_, value) in enumerate(points) if value is not None]
    if len(real) <= limit:
        return _single_gaps(points)
    stretches = limit // 2 - 1
    keep = {real[0], real[-1]}
    for number_ in range(stretches):
        low, high = (len(points) * edge // stretches for edge in (number_, number_ + 1))
        values = [(value, index) for index in range(low, high) if (value := points[index][1]) is not None]
        if values:
            keep |= {min(values)[1], max(values)[1]}
        keep |= {index for index in range(low, high) if points[index][1] is None}
    return _single_gaps([points[index] for index in sorted(keep)])


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart), about `count` of them, from at most `low` to at least `high`."""
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= raw * 0.999)
    if whole:
        step = max(1.0, step)
    return [index * step for index in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def draw(metrics: Sequence[dict[str, Any]], wanted: Sequence[tuple[str, str]] = LOSSES) -> Curve | None:
    """The curves of `wanted`, (title, key in a row), by default the losses; None if no row has a finite value."""
    return draw_together(
        [(name, "eval" if key == "eval_loss" else "train", series(metrics, key)) for name, key in wanted]
    )


def draw_together(full: Sequence[tuple[str, str, Sequence[Point]]]) -> Curve | None:
    """(name, look, points) of each curve on the same axes; those without a finite value are left out."""
    named = [(name, look, thin(points)) for name, look, points in full if any(v is not None for _, v in points)]
    thinned = any(len(points) > MAX_POINTS for _, _, points in full)
    if not named:
        return None
    known = [(step, value) for _, _, points in named for step, value in points if value is not None]
    first, last = _step_span([step for step, _ in known])
    bottom, top = _loss_span([value for _, value in known])
    levels = ticks(bottom, top, 5)
    bottom, top = levels[0], levels[-1]

    def place(step: int, value: float) -> tuple[float, float]:
        return (step - first) / (last - first), (top - value) / (top - bottom)

    lines = []
    for name, look, points in named:
        path, dots = _trace([None if value is None else place(step, value) for step, value in points])
        every_dot = [place(step, value) for step, value in points if value is not None]
        shown = every_dot if len(every_dot) <= 60 else dots
        values = [[step, float(f"{value:.6g}")] for step, value in points if value is not None]
        lines.append(Line(name, look, path, tuple((_pct(x), _pct(y)) for x, y in shown), json.dumps(values)))
    steps = [tick for tick in ticks(first, last, 6, whole=True) if first <= tick <= last]
    return Curve(
        lines=tuple(lines),
        x_ticks=tuple((_pct((tick - first) / (last - first)), _step_label(tick)) for tick in steps),
        y_ticks=tuple((_pct((top - tick) / (top - bottom)), _level_label(tick, levels)) for tick in levels),
        span=json.dumps([first, last, bottom, top]),
        summary="; ".join(_summary(name, points) for name, _, points in named) + ".",
        thinned=thinned,
    )


def _single_gaps(points: Sequence[Point]) -> list[Point]:
    """The same curve with one gap where several follow each other."""
    return [p for i, p in enumerate(points) if p[1] is not None or i == 0 or points[i - 1][1] is not None]


def _trace(places: Sequence[tuple[float, float] | None]) -> tuple[str, list[tuple[float, float]]]:
    """An SVG path that is broken at gaps, and the places that no line reaches because gaps are on both sides."""
    parts: list[str] = []
    alone: list[tuple[float, float]] = []
    for index, place in enumerate(places):
        if place is None:
            continue
        before = places[index - 1] if index else None
        after = places[index + 1] if index + 1 < len(places) else None
        if before is None and after is None:
            alone.append(place)
        else:
            parts.append(f"{'M' if before is None else 'L'}{place[0] * 1000:.1f} {place[1] * 1000:.1f}")
    return "".join(parts), alone


def _step_span(steps: Sequence[int]) -> tuple[float, float]:
    low, high = min(steps), max(steps)
    if low == high:
        return low - 0.5, high + 0.5
    return (0.0 if 0 <= low <= 0.1 * high else float(low)), float(high)


def _loss_span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-300):
        pad = abs(low) * 0.1 or 1.0
        return low - pad, high + pad
    return (0.0 if 0 <= low < 0.5 * high else low), high


def _pct(share: float) -> str:
    return f"{share * 100:.2f}%"


def _step_label(tick: float) -> str:
    whole = round(tick)
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if abs(whole) >= max(size, 10**4):
            return f"{whole / size:g}{letter}"
    return f"{whole:,}"


def _level_label(tick: float, levels: Sequence[float]) -> str:
    gap = levels[1] - levels[0]
    if gap < 1e-5 or max(abs(level) for level in levels) >= 1e6:
        return f"{tick:.4g}"
    return f"{tick:,.{max(0, -math.floor(math.log10(gap) + 1e-9))}f}"


def _summary(name: str, points: Sequence[Point]) -> str:
    values = [(step, value) for step, value in points if value is not None]
    step, value = values[-1]
    low_step, low = min(values, key=lambda point: point[1])
    start = f"{values[0][1]:.4g} at step {values[0][0]:,}, " if len(values) > 1 else ""
    lowest = f" (lowest: {low:.4g} at step {low_step:,})" if low < value else ""
    return f"{name} {start}{value:.4g} at step {step:,}{lowest}"
