"""What several seeds say: means, paired differences, intervals and p-values.

Seeds are pairs: two methods with the same seed saw the same data and the same initial weights, so
methods are compared by the differences within seeds.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.05
CONFIDENCE = 1 - LEVEL
RESAMPLES = 9999
# Up to here the p-value comes from all 2^n signs, ties and zeros included.
EXACT_PAIRS = 13
# Differences of accuracies are fractions of the test set; below this only rounding differs.
RESOLUTION = 1e-9


class Estimate(NamedTuple):
    """A mean over seeds and its standard error (NaN with one seed)."""

    mean: float
    error: float

    def percent(self, signed: bool = False) -> str:
        """For example `78.70 +- 0.32`, in per cent."""
        sign = "+" if signed else ""
        text = f"{100 * self.mean:{sign}.2f}"
        return text if np.isnan(self.error) else f"{text} +- {100 * self.error:.2f}"


class Comparison(NamedTuple):
    """Paired differences of a method to a baseline.

    Attributes:
      difference: their mean and its standard error.
      low: lower end of the 95% bootstrap interval of the mean; NaN with one pair.
      high: upper end.
      p_value: two-sided Wilcoxon signed-rank p-value; NaN with one pair.
      pairs: how many seeds both have.
      higher: in how many of them the method is above the baseline.
    """

    difference: Estimate
    low: float
    high: float
    p_value: float
    pairs: int
    higher: int

    def interval(self) -> str:
        """For example `[+3.88, +6.62]`, in per cent; empty with one pair."""
        return "" if np.isnan(self.low) else f"[{100 * self.low:+.2f}, {100 * self.high:+.2f}]"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of the mean, s / sqrt(n) with the sample standard deviation.

    >>> estimate([0.5, 0.7]).percent()
    '60.00 +- 10.00'
    """
    values = np.asarray(values, np.float64)
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    return Estimate(float(values.mean()), error)


def compare(first: Mapping[Hashable, float], second: Mapping[Hashable, float]) -> Comparison | None:
    """Compares first - second over their common keys (seeds); None without any.

    >>> compare({0: 0.8, 1: 0.9}, {0: 0.7, 1: 0.7, 2: 0.1}).difference.percent(signed=True)
    '+15.00 +- 5.00'
    """
    common = [key for key in first if key in second]
    if not common:
        return None
    differences = np.array([first[key] - second[key] for key in common])
    low, high = bootstrap_interval(differences)
    return Comparison(
        difference=estimate(differences),
        low=low,
        high=high,
        p_value=wilcoxon_p(differences),
        pairs=len(common),
        higher=int((differences > RESOLUTION / 2).sum()),
    )


def bootstrap_interval(differences: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of the mean: bias-corrected and accelerated (Efron, 1987).

    With two values, where the acceleration is not defined, the percentile interval; with equal
    values, that value twice; with one value, NaN: it says nothing about how much seeds differ.

    Args:
      differences: [n] paired differences.
      seed: of the resampling, so that the same results give the same table.

    >>> bootstrap_interval(np.array([0.5, 0.5, 0.5]))
    (0.5, 0.5)
    """
    if len(differences) < 2:
        return float("nan"), float("nan")
    if np.ptp(differences) < RESOLUTION:
        return float(differences[0]), float(differences[0])
    interval = stats.bootstrap(
        (differences,),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        method="BCa" if len(differences) > 2 else "percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def wilcoxon_p(differences: np.ndarray) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test (Wilcoxon, 1945).

    Zeros are dropped, as in the original test. Exact up to 13 pairs, ties included; fewer than 6
    pairs never fall below 0.05 (see `smallest_p`). All zeros but one at most: 1. One pair: NaN,
    nothing can be tested.

    >>> wilcoxon_p(np.array([1.0, 2.0, 3.0, 4.0]))
    0.125
    >>> wilcoxon_p(np.zeros(8))
    1.0
    """
    if len(differences) < 2:
        return float("nan")
    # Without rounding, 0.809 - 0.805 and 0.813 - 0.809 would not tie.
    nonzero = np.round(differences / RESOLUTION) * RESOLUTION
    nonzero = nonzero[nonzero != 0]
    if len(nonzero) < 2:
        return 1.0
    method = "auto"  # exact or, with ties, normal
    if len(nonzero) <= EXACT_PAIRS:
        method = stats.PermutationMethod(n_resamples=2**EXACT_PAIRS)
    return float(stats.wilcoxon(nonzero, method=method).pvalue)


def smallest_p(pairs: int) -> float:
    """The smallest p-value that `wilcoxon_p` can give: all n differences of one sign, 2^(1-n).

    >>> smallest_p(8)
    0.0078125
    """
    return 2.0 ** (1 - pairs)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction for testing several hypotheses (Holm, 1979).

    The k-th smallest of m p-values becomes max over j <= k of min(1, (m - j + 1) p_(j)). NaNs are
    no tests: they stay NaN and do not count.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    p_values = np.asarray(p_values, np.float64)
    adjusted = np.full(len(p_values), np.nan)
    tested = np.flatnonzero(~np.isnan(p_values))
    order = tested[np.argsort(p_values[tested], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(factors * p_values[order]))
    return adjusted.tolist()
