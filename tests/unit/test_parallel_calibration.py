"""The planner against what was measured on GPUs (benchmarks/results/plans-h200x2.json)."""

from __future__ import annotations

import json

import pytest

from sft_dist.parallel.calibration import RESULTS, Point, points

POINTS = points()
COMPILED = [point for point in POINTS if point.layers == "compiled" and point.part == "speed"]


def named(point: Point) -> str:
    return f"{point.plan}-{point.part}-{point.layers}"


@pytest.mark.parametrize("point", [point for point in POINTS if point.calibrated], ids=named)
def test_peak_memory_is_within_a_tenth(point: Point) -> None:
    assert point.predicted_peak_gib == pytest.approx(point.peak_gib, rel=0.1)


def test_every_plan_but_zero3_is_calibrated() -> None:
    assert {point.plan for point in COMPILED} == {"single", "ddp", "zero1", "zero2", "fsdp2"}
    assert [point.plan for point in POINTS if point.layers == "eager"] == ["single"]


@pytest.mark.parametrize("point", [point for point in POINTS if point.checkpoint_gib], ids=named)
def test_checkpoints_are_as_large_as_predicted(point: Point) -> None:
    assert point.predicted_checkpoint_gib == pytest.approx(point.checkpoint_gib, rel=0.01)


def test_the_order_of_plans_by_speed() -> None:
    timed = [point for point in POINTS if point.speed and point.predicted_speed]
    by_measured = sorted(timed, key=lambda point: point.speed or 0)
    assert by_measured == sorted(timed, key=lambda point: point.predicted_speed or 0)
    assert [named(point) for point in by_measured][-2:] == ["ddp-speed-compiled", "single-speed-compiled"]


def test_speeds_are_those_that_the_constants_were_fitted_to() -> None:
    for point in COMPILED:
        assert point.speed is not None
        assert point.predicted_speed == pytest.approx(point.speed, rel=0.05)


def test_the_equality_of_plans_is_on_record_as_the_texts_say() -> None:
    arms = json.loads((RESULTS.parent / "plans-h200x2-equal.json").read_text(encoding="utf-8"))["arms"]
    assert {arm["plan"] for arm in arms} == {"single", "ddp", "zero2", "zero3", "fsdp2"}
    last = [arm["losses"][-1] for arm in arms]
    apart = max(max(step) - min(step) for step in zip(*(arm["losses"] for arm in arms), strict=True))
    text = " ".join((RESULTS.parents[1] / "README.md").read_text(encoding="utf-8").split())
    assert f"end between {min(last):.4f} and {max(last):.4f}" in text
    assert f"more than {apart:.1e} apart".replace("e-03", "e-3") in text
