"""Statistics over seeds: means, paired differences, intervals and p-values.

Two methods with the same seed saw the same data and the same initial weights, so methods are
compared by their differences within seeds.
"""

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from lpa_jax import checks

LEVEL = 0.05
CONFIDENCE = 1 - LEVEL
RESAMPLES = 9999
# With fewer seeds there is no interval and no p-value; tables give the difference of each seed.
FEWEST_PAIRS = 5
# Up to here the p-value comes from all 2^n signs, ties and zeros included.
EXACT_PAIRS = 13
# Differences of accuracies are fractions of the test set; below this only rounding differs.
RESOLUTION = 1e-9
# Two methods: the difference is that of the first minus the second.
Pair = tuple[str, str]


class Estimate(NamedTuple):
    """A mean over seeds and its standard error (NaN with one seed)."""

    mean: float
    error: float


class Comparison(NamedTuple):
    """Paired differences of a method to another.

    Attributes:
      pairs: number of seeds that both have.
      difference: mean of their differences.
      difference_se: its standard error.
      difference_low: lower end of its 95% bootstrap interval; NaN with fewer than 5 pairs.
      difference_high: upper end.
      p_value: two-sided Wilcoxon signed-rank p-value; NaN with fewer than 5 pairs.
      higher: number of pairs in which the first method is above the second.
      each: the difference of every seed.
    """

    pairs: int
    difference: float
    difference_se: float
    difference_low: float
    difference_high: float
    p_value: float
    higher: int
    each: tuple[float, ...]


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and its standard error s / sqrt(n), s the sample standard deviation; NaN without any.

    >>> estimate([1.0, 3.0])
    Estimate(mean=2.0, error=1.0)
    """
    values = np.asarray(values, np.float64)
    mean = float(values.mean()) if len(values) else float("nan")
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    return Estimate(mean, error)


def compare_seeds(first: Mapping[Hashable, float], second: Mapping[Hashable, float]) -> Comparison:
    """Compares first - second over their common keys (seeds); all NaN without any.

    >>> compare_seeds({0: 0.75, 1: 1.0}, {0: 0.5, 1: 0.25, 2: 0.1})[:3]
    (2, 0.5, 0.25)
    """
    common = [key for key in first if key in second]
    differences = np.array([first[key] - second[key] for key in common])
    tested = differences if len(common) >= FEWEST_PAIRS else differences[:0]
    higher = int((differences > RESOLUTION / 2).sum())
    numbers = (*estimate(differences), *bootstrap_interval(tested), wilcoxon_p(tested))
    return Comparison(len(common), *numbers, higher, tuple(differences.tolist()))


def bootstrap_interval(differences: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of the mean: bias-corrected and accelerated (Efron, 1987).

    With two values, where the acceleration is not defined, the percentile interval; with equal
    values, that value twice; with fewer than two values, NaN.

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
    from scipy import stats  # see wilcoxon_p

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
    pairs never fall below 0.05 (see `smallest_p`). With at most one value that is not zero: 1.
    With fewer than two pairs: NaN.

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
    from scipy import stats  # a fifth of the time that an experiment takes to start

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

    The k-th smallest of m p-values becomes max over j <= k of min(1, (m - j + 1) p_(j)). NaNs
    stay NaN and do not count.

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


def by_seed(values: pd.DataFrame) -> dict[tuple[str, str], dict[int, float]]:
    """(measure, method) -> seed -> value; numbers that are NaN are left out."""
    known = values.dropna(subset="value")
    return {
        key: dict(zip(own["seed"], own["value"], strict=True))
        for key, own in known.groupby(["measure", "method"], sort=False)
    }


def compare(
    values: pd.DataFrame, baseline: str, tested: Collection[str] | None = None
) -> pd.DataFrame:
    """Means of all methods, and their paired differences to the baseline.

    Args:
      values: one row a number, with the columns method, seed, measure and value; NaN is no value.
      baseline: method that the others are compared to, over the seeds that both have.
      tested: measures whose differences are computed; None for all.

    Returns:
      One row a measure and method: measure, method, seeds (their number), mean, se, baseline,
      pairs, difference, difference_se, difference_low, difference_high (95% bootstrap interval),
      p_value, higher (pairs in which the method is above the baseline), each (the differences of
      the seeds) and p_holm, which is corrected over the methods of a measure. Without common seeds
      pairs is 0, the rest NaN.

    Example:
      >>> rows = [("erm", 0, "trace", 1.0), ("erm", 1, "trace", 3.0), ("lpa", 1, "trace", 5.0)]
      >>> values = pd.DataFrame(rows, columns=["method", "seed", "measure", "value"])
      >>> compare(values, "erm")[["method", "seeds", "mean", "se", "pairs", "difference"]]
        method  seeds  mean   se  pairs  difference
      0    erm      2   2.0  1.0      0         NaN
      1    lpa      1   5.0  NaN      1         2.0
    """
    found = by_seed(values)
    records = []
    for measure in values["measure"].unique():
        rows = []
        for method in values["method"].unique():
            own = found.get((measure, method), {})
            mean, error = estimate(list(own.values()))
            row = {"measure": measure, "method": method, "seeds": len(own)}
            row |= {"mean": mean, "se": error, "baseline": baseline}
            skipped = method == baseline or (tested is not None and measure not in tested)
            other = {} if skipped else found.get((measure, baseline), {})
            rows.append(row | compare_seeds(own, other)._asdict())
        corrected = holm([row["p_value"] for row in rows])
        records += [row | {"p_holm": p} for row, p in zip(rows, corrected, strict=True)]
    return pd.DataFrame.from_records(records)


def parse_pairs(texts: Sequence[str]) -> tuple[Pair, ...]:
    """Pairs of methods from the flag --compare.

    Raises:
      ValueError: a text is not METHOD:METHOD with two different methods, or a pair comes twice.

    Example:
      >>> parse_pairs(["lpa:lpl", "logit_adjusted+lpa:logit_adjusted"])
      (('lpa', 'lpl'), ('logit_adjusted+lpa', 'logit_adjusted'))
    """
    pairs = []
    for text in texts:
        first, colon, second = (part.strip() for part in text.partition(":"))
        if not colon or not first or not second or ":" in second or first == second:
            raise ValueError(f"--compare must name pairs METHOD:METHOD, got {text!r}")
        pairs.append((first, second))
    for pair in pairs:
        # (b, a) is the same test as (a, b): counting it twice would only weaken the others.
        if pairs.count(pair) + pairs.count(pair[::-1]) > 1:
            raise ValueError(f"--compare must name each pair once, got {':'.join(pair)!r} twice")
    return tuple(pairs)


def check_methods(flag: str, names: Iterable[str], methods: Collection[str]) -> None:
    """Raises ValueError for a method that has no run."""
    for name in names:
        if name not in methods:
            known = ", ".join(sorted(methods))
            raise ValueError(
                f"--{flag} must name methods with runs ({known}), got {name!r}"
                f"{checks.nearest(name, methods)}"
            )


def contrasts(values: pd.DataFrame, pairs: Sequence[Pair]) -> tuple[pd.DataFrame, list[str]]:
    """Accuracy of one method minus that of another, for pairs named beforehand.

    Args:
      values: as `compare` takes them.
      pairs: of methods.

    Returns:
      One row a pair with common seeds, with the columns of `compare` from pairs on; method is
      "FIRST - SECOND", and p_holm is corrected over these pairs alone. And a line for each pair
      that is left out.
    """
    found, rows, left_out = by_seed(values), [], []
    for pair in pairs:
        name, absent = " - ".join(pair), [m for m in pair if ("accuracy", m) not in found]
        comparison = compare_seeds(*(found.get(("accuracy", method), {}) for method in pair))
        if absent:
            left_out.append(f"{name}: no run of {' or '.join(absent)} in this setting.")
        elif not comparison.pairs:
            left_out.append(f"{name}: no common seed.")
        else:
            rows.append({"method": name} | comparison._asdict())
    corrected = holm([row["p_value"] for row in rows])
    rows = [row | {"p_holm": p} for row, p in zip(rows, corrected, strict=True)]
    return pd.DataFrame.from_records(rows), left_out
