"""Intervals and tests: against values worked out by hand or by brute force, the same each time, paired."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from sft_dist.evaluate.intervals import ALL_SWAPS, RESAMPLES, interval, mcnemar, mean, paired_test, perplexity, resample
from sft_dist.evaluate.summary import set_scores


def means(values: list[float]) -> np.ndarray:
    return np.array([[value, 1.0] for value in values])


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 0.0625),
        (9, 1, 0.021484375),
        (1, 9, 0.021484375),
        (5, 5, 1.0),
        (10, 3, 0.0922851),
    ],
)
def test_mcnemar_is_the_exact_binomial_test(gained: int, lost: int, p_value: float) -> None:
    assert mcnemar(gained, lost) == pytest.approx(p_value, abs=5e-5)


def test_mcnemar_of_thousands_of_rows_does_not_overflow() -> None:
    assert 0 < mcnemar(1500, 1700) < 0.001
    assert mcnemar(5000, 0) >= 0


def test_shares_are_tested_by_mcnemar_and_the_rest_by_permutation() -> None:
    before, after = means([0, 0, 1, 0, 0, 0]), means([1, 1, 1, 1, 1, 1])
    assert paired_test(before, after, mean) == ("mcnemar", 0.0625)
    assert paired_test(before, after + np.array([0.5, 0]), mean)[0] == "permutation"


def test_a_permutation_test_of_few_rows_looks_at_every_swap() -> None:
    rng = np.random.default_rng(1)
    before, after = rng.normal(size=7), rng.normal(loc=1, size=7)
    difference = after - before
    signs = [np.mean(np.array(sign) * difference) for sign in itertools.product((1, -1), repeat=7)]
    expected = np.mean([abs(value) >= abs(difference.mean()) - 1e-12 for value in signs])
    assert paired_test(means(list(before)), means(list(after)), mean) == ("permutation", pytest.approx(expected))
    assert 0 < expected < 0.5


def test_a_permutation_test_of_many_rows_comes_near_to_the_normal_one() -> None:
    rng = np.random.default_rng(2)
    before = rng.normal(size=400)
    after = before + rng.normal(loc=0.1, size=400)
    difference = after - before
    z = difference.mean() / math.sqrt((difference**2).mean() / 400)
    expected = math.erfc(abs(z) / math.sqrt(2))
    assert len(before) > ALL_SWAPS
    found = paired_test(means(list(before)), means(list(after)), mean)[1]
    assert found == pytest.approx(expected, abs=0.02)
    assert found == paired_test(means(list(before)), means(list(after)), mean)[1]


def test_swaps_that_come_to_the_same_change_count_in_whatever_order_they_are_summed() -> None:
    """Tenths are not exact in binary: sums of the same rows differ in their last bits, and whole numbers do not."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        before, after = rng.integers(0, 10, size=(2, 9)) * 1.0
        whole = paired_test(means([*before]), means([*after]), mean)[1]
        assert paired_test(means([*(before / 10)]), means([*(after / 10)]), mean)[1] == whole


def test_no_change_is_impossible_by_chance() -> None:
    rows = 10 * ALL_SWAPS
    assert paired_test(means([0.25] * rows), means([0.75] * rows), mean) == ("permutation", pytest.approx(1 / 5001))


def test_rows_that_count_otherwise_than_once_are_not_tested_by_mcnemar() -> None:
    one, other = np.array([[1.0, 1], [0, 0], [0, 1]]), np.array([[0.0, 1], [0, 0], [0, 1]])
    assert paired_test(one, other, mean)[0] == "permutation"


def test_without_a_change_nothing_is_significant() -> None:
    rows = means([0.1, 0.2, 0.9, 0.4])
    assert paired_test(rows, rows, mean) == ("permutation", 1.0)


def test_a_bootstrap_interval_of_a_mean_comes_near_to_the_normal_one() -> None:
    values = np.random.default_rng(3).normal(loc=5, scale=2, size=300)
    found = interval(mean(resample(means(list(values)))))
    half = 1.96 * values.std() / math.sqrt(300)
    assert found == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_resamples_are_paired_and_the_same_each_time() -> None:
    values = np.random.default_rng(4).normal(size=50)
    first, second = (mean(resample(means(list(rows)))) for rows in (values, values + 1))
    assert first.shape == (RESAMPLES,)
    assert np.allclose(second - first, 1.0), "two models were resampled differently"
    assert np.array_equal(first, mean(resample(means(list(values)))))
    assert first.std() > 0.05


def test_perplexity_weighs_rows_by_their_tokens() -> None:
    rows = np.array([[10.0, 5.0], [2.0, 20.0]])
    assert float(perplexity(rows.sum(0))) == pytest.approx(math.exp(12 / 25))


def test_rows_without_a_value_do_not_count_and_none_at_all_is_no_score() -> None:
    assert float(mean(np.array([[1.0, 1.0], [0.0, 0.0]]).sum(0))) == 1.0
    assert interval(mean(resample(np.zeros((3, 2))))) is None


# --- a set, before and after -----------------------------------------------------------------------------------------

FIRST = "exact"


def row(index: int, score: float, nll: float, category: str = "a") -> dict:
    scores = {"exact": score, "perplexity": round(math.exp(nll / 2), 6)}
    return {
        "index": index, "category": category, "expected": f"e{index}", "answer": f"{score}", "scores": scores,
        "counts": {"perplexity": [nll, 2.0]},
    }  # fmt: skip


BEFORE = [row(0, 0, 4), row(1, 0, 4), row(2, 1, 2, "b"), row(3, 0, 6, "b")]
AFTER = [row(0, 1, 1), row(1, 1, 1), row(2, 0, 1, "b"), row(3, 0, 1, "b")]


def test_a_set_has_values_intervals_changes_and_tests_in_all_and_by_category() -> None:
    found = set_scores(FIRST, BEFORE, AFTER)
    assert (found["n"], found["first"], set(found["scores"])) == (4, "exact", {"exact", "perplexity"})
    shares = found["scores"]["exact"]
    assert (shares["before"], shares["after"], shares["change"]) == (0.25, 0.5, 0.25)
    assert (shares["test"], shares["p_value"], shares["unit"]) == ("mcnemar", 1.0, "share")
    assert shares["before_interval"] == [0.0, 0.75]
    low, high = shares["change_interval"]
    assert low < 0.25 < high
    whole = found["scores"]["perplexity"]
    assert (whole["before"], whole["after"]) == (round(math.exp(16 / 8), 6), round(math.exp(4 / 8), 6))
    assert (whole["test"], whole["higher_is_better"], whole["p_value"]) == ("permutation", False, 0.125)
    assert {name: part["n"] for name, part in found["by_category"].items()} == {"a": 2, "b": 2}
    assert found["by_category"]["b"]["scores"]["exact"]["after"] == 0.0


def test_the_rows_that_changed_most_are_shown_losses_apart_from_gains() -> None:
    found = set_scores(FIRST, BEFORE, AFTER)
    assert [it["index"] for it in found["gains"]] == [0, 1]
    assert [(it["index"], it["before"], it["after"], it["expected"]) for it in found["losses"]] == [(2, "1", "0", "e2")]
    by_perplexity = set_scores("perplexity", BEFORE, AFTER)
    assert [it["index"] for it in by_perplexity["gains"]] == [3, 0, 1, 2], "lower is better"
    assert by_perplexity["losses"] == []


def test_one_model_alone_has_scores_and_no_change() -> None:
    found = set_scores(FIRST, [], AFTER)
    assert set(found["scores"]["exact"]) == {"unit", "higher_is_better", "after", "after_interval"}
    assert "gains" not in found
    assert set_scores(FIRST, [], []) == {"n": 0, "first": "exact", "scores": {}, "by_category": {}}


def test_only_rows_that_both_models_answered_are_compared() -> None:
    assert set_scores(FIRST, BEFORE, AFTER[1:])["n"] == 3
