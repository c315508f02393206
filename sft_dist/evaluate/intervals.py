"""How sure a score is, and whether a change is more than chance: paired bootstrap intervals and paired tests.

A score is a function of sums over rows: of [value, 1] for a mean, of what BLEU counts for BLEU. Resampling rows is then a
product of matrices. Everything here gives the same numbers each time for the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Reduce = Callable[[Array], Array]

RESAMPLES, SWAPS, SEED = 2000, 5000, 20251122
# Rows up to which every way to swap them is looked at.
ALL_SWAPS = 12
# Resamples in memory at once, times rows.
AT_ONCE = 4_000_000


def mean(sums: Array) -> Array:
    """sums [..., 2] of values and how many there are -> [...]; not a number where there are none."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def perplexity(sums: Array) -> Array:
    """sums [..., 2] of negative log-likelihoods (natural) and tokens -> [...]."""
    with np.errstate(over="ignore"):
        return np.exp(mean(sums))


def resample(rows: Array) -> Array:
    """[resamples, counts]: what `rows` [rows, counts] sum up to in each bootstrap resample.

    Of as many rows always the same ones are drawn: scores of two models are paired if they stand in the same order.
    """
    return np.concatenate([weights @ rows for weights in _weights(len(rows))])


def interval(values: Array) -> tuple[float, float] | None:
    """The middle 95 % of resampled scores; None if a resample has none."""
    if not np.isfinite(values).all():
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _weights(rows: int) -> Iterator[Array]:
    """How often each row is drawn in each resample, in blocks [resamples, rows]."""
    rng = np.random.default_rng(SEED)
    block = max(1, AT_ONCE // max(1, rows))
    for start in range(0, RESAMPLES, block):
        yield rng.multinomial(rows, np.full(rows, 1 / rows), size=min(block, RESAMPLES - start)).astype(np.float64)


def paired_test(before: Array, after: Array, reduce: Reduce) -> tuple[str, float]:
    """The test's name and its two-sided p value, for two models' counts [rows, counts] of the same rows.

    McNemar's exact test where every row is right or wrong, else a permutation test: how often a change at least as large
    comes about when each row's two answers are swapped at random; of few rows, over all swaps.
    """
    if _binary(before) and _binary(after):
        gained = int(((after[:, 0] == 1) & (before[:, 0] == 0)).sum())
        lost = int(((after[:, 0] == 0) & (before[:, 0] == 1)).sum())
        return "mcnemar", mcnemar(gained, lost)
    return "permutation", _permutation(before, after, reduce)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p value: `gained` and `lost` rows as likely as heads and tails."""
    changed = gained + lost
    tail = sum(math.comb(changed, count) for count in range(min(gained, lost) + 1))
    return min(1.0, float(2 * tail / 2**changed))


def _binary(rows: Array) -> bool:
    return rows.shape[1] == 2 and bool(np.isin(rows[:, 0], (0.0, 1.0)).all() and (rows[:, 1] == 1).all())


def _permutation(before: Array, after: Array, reduce: Reduce) -> float:
    first, second, difference = before.sum(0), after.sum(0), after - before
    observed = abs(float(reduce(second) - reduce(first)))
    if not math.isfinite(observed):
        return 1.0
    # Sums come in another order when rows are swapped.
    least = observed - 1e-9 * max(1.0, observed)
    as_large = total = 0
    for swapped in _swaps(len(before)):
        moved = swapped @ difference
        change = np.abs(reduce(second - moved) - reduce(first + moved))
        as_large += int((change >= least).sum())
        total += len(swapped)
    if len(before) <= ALL_SWAPS:
        return as_large / total
    return (as_large + 1) / (total + 1)  # the swap that was observed is one of them


def _swaps(rows: int) -> Iterator[Array]:
    """Which rows are swapped, in blocks [swaps, rows] of 0 and 1."""
    if rows <= ALL_SWAPS:
        yield ((np.arange(2**rows)[:, None] >> np.arange(rows)) & 1).astype(np.float64)
        return
    rng = np.random.default_rng(SEED)
    block = max(1, AT_ONCE // rows)
    for start in range(0, SWAPS, block):
        yield rng.integers(0, 2, size=(min(block, SWAPS - start), rows)).astype(np.float64)
