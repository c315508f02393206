"""loss.png: the loss curve as a picture."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from sft_dist.files import write_bytes
from sft_dist.report.curve import Point, series, thin
from sft_dist.report.facts import read_facts
from sft_dist.report.text import visible
from sft_dist.rundir import RunDir


def plot_loss(run: RunDir) -> Path | None:
    """Draw training loss, evaluation loss and learning rate to loss.png; None if no loss was logged."""
    facts = read_facts(run)
    curves = {key: thin(series(facts.metrics, key)) for key in ("loss", "eval_loss", "learning_rate")}
    if not any(value is not None for key in ("loss", "eval_loss") for _, value in curves[key]):
        return None
    # The font that comes with matplotlib does not have every letter that a folder's name may have.
    title = visible(facts.name).encode("ascii", "backslashreplace").decode()
    write_bytes(run.loss_plot, _draw(title, curves))
    return run.loss_plot


def _draw(title: str, curves: dict[str, list[Point]]) -> bytes:
    # Without pyplot there is no global state and no display to find.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _line(axes, curves["loss"], "#0f766e", "training loss", marker=_dots(curves["loss"]))
    _line(axes, curves["eval_loss"], "#1f2933", "evaluation loss", marker=_dots(curves["eval_loss"]), linestyle="--")
    axes.set_title(title if len(title) <= 80 else f"{title[:77]}...", parse_math=False)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines["top"].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    if any(value is not None for _, value in curves["learning_rate"]):
        rate = axes.twinx()
        _line(rate, curves["learning_rate"], "#b8c0c8", "learning rate", linewidth=1.2)
        rate.set_ylabel("learning rate", color="#7b8794")
        rate.tick_params(axis="y", colors="#7b8794")
        rate.set_ylim(bottom=0)
        rate.spines["top"].set_visible(False)
        handles, labels = [a + b for a, b in zip((handles, labels), rate.get_legend_handles_labels(), strict=True)]
        axes.set_zorder(rate.get_zorder() + 1)
        axes.patch.set_visible(False)
    axes.legend(handles, labels, frameon=False)
    picture = io.BytesIO()
    canvas.print_figure(picture, format="png", dpi=144)
    return picture.getvalue()


def _line(axes: Any, points: list[Point], color: str, label: str, **style: Any) -> None:
    if any(value is not None for _, value in points):
        values = [math.nan if value is None else value for _, value in points]
        axes.plot([step for step, _ in points], values, color=color, label=label, markersize=3.5, **style)


def _dots(points: list[Point]) -> str:
    """A marker where points are few: one that is alone, or between gaps, has no line to show it."""
    return "o" if len(points) <= 60 else ""
