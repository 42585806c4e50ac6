"""Tables of anything that is measured of models: over seeds, and beside a baseline."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiments.reporting import paired as statistics
from experiments.reporting import summary
from experiments.reporting.paired import Estimate

# method -> seed -> measure -> value, None where there is none
Values = Mapping[str, Mapping[int, Mapping[str, float | None]]]

LEGEND = (
    "Mean +- standard error over seeds; vs: mean +- standard error of the paired difference to the "
    "baseline (same seed, same data). The CSV has 95% bootstrap intervals and Wilcoxon p-values, "
    "Holm-corrected over the methods of a measure.\n"
)


def by_seed(values: Values, method: str, measure: str) -> dict[int, float]:
    """The finite values of a measure, by seed."""
    found = {seed: measures.get(measure) for seed, measures in values[method].items()}
    return {seed: value for seed, value in found.items() if value is not None}


def estimate(values: Values, method: str, measure: str) -> Estimate:
    """Mean and standard error over seeds; NaN without any value.

    >>> estimate({"erm": {0: {"trace": 1.0}, 1: {"trace": 3.0}}}, "erm", "trace")
    Estimate(mean=2.0, error=1.0)
    """
    found = list(by_seed(values, method, measure).values())
    return statistics.estimate(found) if found else summary.UNKNOWN


def measures_of(values: Values) -> list[str]:
    """Names of all measures, in order of appearance."""
    found = (name for seeds in values.values() for one in seeds.values() for name in one)
    return list(dict.fromkeys(found))


def frame(values: Values, baseline: str) -> pd.DataFrame:
    """One row a measure and method, numbers only."""
    records = []
    for measure in measures_of(values):
        rows = []
        for method in values:
            found = by_seed(values, method, measure)
            mean, error = estimate(values, method, measure)
            record = {"measure": measure, "method": method, "seeds": len(found)}
            record |= {"mean": mean, "se": error, "baseline": baseline}
            rows.append(record | _compared(values, method, measure, baseline))
        corrected = statistics.holm([row["p_value"] for row in rows])
        records += [row | {"p_holm": p} for row, p in zip(rows, corrected, strict=True)]
    return pd.DataFrame.from_records(records)


def _compared(values, method, measure, baseline) -> dict[str, Any]:
    comparison = None
    if method != baseline and baseline in values:
        pair = (by_seed(values, name, measure) for name in (method, baseline))
        comparison = statistics.compare(*pair)
    found = comparison or summary.NOT_COMPARED
    return {
        "pairs": found.pairs,
        "difference": found.difference.mean,
        "difference_se": found.difference.error,
        "difference_low": found.low,
        "difference_high": found.high,
        "p_value": found.p_value,
    }


def markdown(values: Values, measures: Sequence[str], baseline: str, title: str) -> str:
    """Tables of methods by measures: the values, and the paired differences to the baseline.

    Measures called `PART: NAME` stand under a heading a part.
    """
    parts = [f"## {title}\n"]
    by_part: dict[str, list[str]] = {}
    for measure in measures:
        by_part.setdefault(measure.rpartition(": ")[0], []).append(measure)
    for part, own in by_part.items():
        parts += [f"### {part}\n"] if part else []
        parts += _tables(values, own, baseline)
    return "\n".join(parts)


def _tables(values: Values, measures: Sequence[str], baseline: str) -> list[str]:
    names = {measure: measure.rpartition(": ")[2] for measure in measures}
    lines = [["method", *names.values()]]
    for method in values:
        cells = (text(estimate(values, method, measure)) for measure in measures)
        lines.append([method, *cells])
    parts = [summary.markdown_table(lines)]
    others = [method for method in values if method != baseline]
    shared = [m for m in measures if baseline in values and by_seed(values, baseline, m)]
    if shared and others:
        lines = [[f"vs {baseline}", *(names[measure] for measure in shared)]]
        for method in others:
            compared = (_compared(values, method, measure, baseline) for measure in shared)
            cells = (Estimate(c["difference"], c["difference_se"]) for c in compared)
            lines.append([method, *(text(cell, signed=True) for cell in cells)])
        parts.append(summary.markdown_table(lines))
    return parts


def class_frame(found: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> pd.DataFrame:
    """What `measurements.geometry` found, one row a method, form, layer and class.

    Means over the seeds that have the class among the images measured, with standard errors.
    """
    first = next(iter(next(iter(found.values())).values()))["classes"]
    records = []
    for method, seeds in found.items():
        for form, layers in first.items():
            for layer, measures in layers.items():
                tables = {
                    name: np.array([one["classes"][form][layer][name] for one in seeds.values()],
                                   float)
                    for name in measures
                }  # fmt: skip
                for c in range(len(measures["norm_ratio"])):
                    records.append({"method": method, "geometry": form, "layer": layer, "class": c}
                                   | _class_record(tables, c))  # fmt: skip
    return pd.DataFrame.from_records(records)


def _class_record(tables: Mapping[str, np.ndarray], c: int) -> dict[str, float]:
    record = {"seeds": int(np.isfinite(tables["norm_ratio"][:, c]).sum())}
    for name, table in tables.items():
        known = table[:, c][np.isfinite(table[:, c])]
        mean, error = statistics.estimate(known) if known.size else summary.UNKNOWN
        record |= {name: mean, f"{name}_se": error}
    return record


def text(value: Estimate, signed: bool = False) -> str:
    """For example `0.012 +- 0.0034`; empty if unknown.

    >>> text(Estimate(0.01234, 0.00345)), text(Estimate(2.0, float("nan")), signed=True)
    ('0.01234 +- 0.0034', '+2')
    """
    if np.isnan(value.mean):
        return ""
    mean = f"{value.mean:{'+' if signed else ''}.4g}"
    return mean if np.isnan(value.error) else f"{mean} +- {value.error:.2g}"
