"""Statistics against slow computations from their definitions, which share no code with them."""

import itertools
import math

import numpy as np
import pytest
from scipy import special

from experiments.reporting import frame, paired

# Differences in thousandths of an accuracy: no ties, ties, zeros, one sign, outlier.
DIFFERENCES = (
    (3, -1, 2, 4, 7),
    (1, 1, 1, -1, 2, 5),
    (0, 0, 5, -3, 3, 3),
    (2, 2, 2, 2, 3, 2, 2, -7),
    (40, 1, 2, 3, 1, 2),
)


def slow_signed_rank_p(values):
    """Share of all 2^n signs whose rank sum is at least as far from the middle; zeros dropped."""
    values = [value for value in values if value]
    ranks = [
        sum(abs(other) < abs(value) for other in values)
        + (1 + sum(abs(other) == abs(value) for other in values)) / 2
        for value in values
    ]
    middle = sum(ranks) / 2

    def distance(signs):
        return abs(sum(rank for rank, up in zip(ranks, signs, strict=True) if up) - middle)

    observed = distance([value > 0 for value in values])
    patterns = list(itertools.product((False, True), repeat=len(ranks)))
    return sum(distance(pattern) >= observed - 1e-9 for pattern in patterns) / len(patterns)


def slow_bca(values, resamples=200_000, level=0.95):
    """Efron (1987): percentiles shifted by the bias z0 and the acceleration a of the jackknife."""
    values = np.asarray(values, float)
    drawn = np.random.default_rng(99).choice(values, (resamples, len(values))).mean(axis=1)
    below = (drawn < values.mean() - 1e-12).mean() + 0.5 * np.isclose(drawn, values.mean()).mean()
    bias = special.ndtri(below)
    left_out = np.array([np.delete(values, i).mean() for i in range(len(values))])
    centred = left_out.mean() - left_out
    acceleration = (centred**3).sum() / (6 * (centred**2).sum() ** 1.5)
    ends = []
    for quantile in ((1 - level) / 2, (1 + level) / 2):
        z = bias + special.ndtri(quantile)
        ends.append(np.quantile(drawn, special.ndtr(bias + z / (1 - acceleration * z))))
    return ends


@pytest.mark.parametrize("thousandths", DIFFERENCES)
def test_mean_error_interval_and_p_value_agree_with_their_definitions(thousandths):
    second = dict.fromkeys(range(len(thousandths)), 0.8)
    first = {seed: (800 + d) / 1000 for seed, d in enumerate(thousandths)}
    found = paired.compare_seeds(first, second)
    mean = sum(thousandths) / len(thousandths)
    variance = sum((d - mean) ** 2 for d in thousandths) / (len(thousandths) - 1)
    assert 1000 * found.difference == pytest.approx(mean)
    assert 1000 * found.difference_se == pytest.approx(math.sqrt(variance / len(thousandths)))
    assert found.p_value == pytest.approx(slow_signed_rank_p(thousandths))
    low, high = slow_bca(thousandths)
    # Resampled means lie on a grid: an end may fall on the neighbouring value.
    step = max(thousandths) / len(thousandths) / 4
    assert 1000 * found.difference_low == pytest.approx(low, abs=step)
    assert 1000 * found.difference_high == pytest.approx(high, abs=step)
    assert found.higher == sum(d > 0 for d in thousandths)


def test_differences_that_are_all_zero_give_no_evidence_and_no_warning():
    seeds = {seed: 0.5 + seed / 10 for seed in range(5)}
    comparison = paired.compare_seeds(seeds, seeds)
    assert comparison == (5, 0.0, 0.0, 0.0, 0.0, 1.0, 0, (0.0,) * 5)


@pytest.mark.parametrize("count", [2, 4, 5])
def test_fewer_than_five_pairs_have_no_interval_and_no_p_value_but_their_own_differences(count):
    values = {seed: 0.5 + seed / 10 for seed in range(count)}
    comparison = paired.compare_seeds(values, dict.fromkeys(values, 0.5))
    tested = comparison[3:6]  # the interval and the p-value
    assert np.isfinite(tested).all() == (count == 5) == np.isfinite(tested).any()
    assert comparison.each == pytest.approx([seed / 10 for seed in range(count)])
    assert comparison.difference_se > 0


def test_one_pair_has_a_difference_but_no_interval_and_no_p_value():
    comparison = paired.compare_seeds({0: 0.75, 1: 0.9}, {0: 0.5})
    assert comparison.difference == 0.25 and comparison.pairs == 1
    assert math.isnan(comparison.difference_low) and math.isnan(comparison.p_value)
    nothing = paired.compare_seeds({0: 0.5}, {1: 0.5})
    assert nothing.pairs == 0 and math.isnan(nothing.difference)


def test_seeds_are_paired_by_name_and_not_by_position():
    comparison = paired.compare_seeds({2: 0.9, 0: 0.5}, {0: 0.4, 2: 0.7, 5: 0.1})
    assert comparison.difference == pytest.approx(0.15) and comparison.pairs == 2


def test_the_bootstrap_interval_is_repeatable_and_close_to_students_with_many_seeds():
    differences = np.random.default_rng(3).normal(0.02, 0.01, 200)
    low, high = paired.bootstrap_interval(differences)
    assert (low, high) == paired.bootstrap_interval(differences)
    half = 1.96 * differences.std(ddof=1) / math.sqrt(200)
    assert low == pytest.approx(differences.mean() - half, abs=2e-4)
    assert high == pytest.approx(differences.mean() + half, abs=2e-4)
    assert paired.bootstrap_interval(np.array([0.01, 0.03])) == (0.01, 0.03)


def test_holm_multiplies_step_by_step_stays_in_order_and_ignores_what_was_not_tested():
    corrected = paired.holm([0.04, 0.001, math.nan, 0.03, 0.6])
    assert corrected[:2] + corrected[3:] == pytest.approx([0.09, 0.004, 0.09, 0.6])
    assert math.isnan(corrected[2]) and paired.holm([]) == []
    assert paired.holm([0.7, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize("seed", range(5))
def test_holm_rejects_what_its_step_down_procedure_rejects(seed):
    """The procedure: from the smallest on, reject while p_(k) <= level / (m - k + 1)."""
    p_values = np.random.default_rng(seed).uniform(0, 0.2, 6) ** 2
    corrected = paired.holm(p_values)
    for level in (0.01, 0.02, 0.05, 0.1):
        rejected = set()
        for k, index in enumerate(np.argsort(p_values)):
            if p_values[index] > level / (len(p_values) - k):
                break
            rejected.add(index)
        assert rejected == {i for i, p in enumerate(corrected) if p <= level}


def test_a_table_pairs_unequal_seeds_on_what_both_have():
    results = {
        "erm": [{"seed": s, "accuracy": 0.5 + 0.01 * s} for s in (0, 1, 2, 5)],
        "lpa": [{"seed": s, "accuracy": 0.6 + 0.02 * s} for s in (5, 1, 7)],
    }
    values, _ = frame.values_of(frame.tidy(results))
    row = paired.compare(values, "erm").set_index("method").loc["lpa"]
    assert row["pairs"] == 2 and row["seeds"] == 3
    assert row["difference"] == pytest.approx((0.62 - 0.51 + 0.70 - 0.55) / 2)
    # Its own mean is over all its seeds, so it need not be the sum.
    assert row["mean"] == pytest.approx(0.6 + 0.02 * 13 / 3)
