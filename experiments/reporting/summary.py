"""From the results of runs to one table: numbers first, then text, Markdown, CSV and LaTeX."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from experiments.methods.names import ERM
from experiments.reporting import paired as statistics
from experiments.reporting.paired import Comparison, Estimate, estimate
from experiments.reporting.tables import csv_text, latex_table, markdown_table  # noqa: F401

# Results of the runs of every method, one a seed; each has at least "seed" and "accuracy", and
# "group_accuracy" where classes (many, medium, few) or domains are told apart.
Results = Mapping[str, Sequence[Mapping[str, Any]]]

UNKNOWN = Estimate(float("nan"), float("nan"))
NOT_COMPARED = Comparison(UNKNOWN, *[float("nan")] * 3, pairs=0, higher=0)


class Row(NamedTuple):
    """One method.

    Attributes:
      method: its name.
      seeds: those that count.
      accuracy: over seeds, a fraction.
      comparison: to the baseline; None for the baseline itself or without common seeds.
      p_holm: the comparison's p-value, corrected for all comparisons of the table.
      groups: accuracy of each group, for those that every run of the method reports.
      seconds: mean wall time of a run; NaN if unknown.
    """

    method: str
    seeds: tuple[int, ...]
    accuracy: Estimate
    comparison: Comparison | None
    p_holm: float
    groups: Mapping[str, Estimate]
    seconds: float


class Summary(NamedTuple):
    """All methods of one setting.

    Attributes:
      rows: one a method.
      baseline: the method that the others are compared to.
      groups: names of the groups that appear in any row.
    """

    rows: tuple[Row, ...]
    baseline: str
    groups: tuple[str, ...]


def summarize(results: Results, baseline: str = ERM) -> Summary:
    """Every statistic of a table; differences to the baseline are paired by seed."""
    comparisons = {
        method: None if method == baseline else compare(results, method, baseline)
        for method in results
    }
    tested = [method for method, comparison in comparisons.items() if comparison is not None]
    corrected = statistics.holm([comparisons[method].p_value for method in tested])
    p_holm = dict(zip(tested, corrected, strict=True))
    rows = tuple(
        Row(
            method=method,
            seeds=tuple(sorted(run["seed"] for run in runs)),
            accuracy=estimate([run["accuracy"] for run in runs]),
            comparison=comparisons[method],
            p_holm=p_holm.get(method, float("nan")),
            groups=_group_estimates(runs),
            seconds=float(np.mean([run.get("seconds", float("nan")) for run in runs])),
        )
        for method, runs in results.items()
    )
    groups = tuple(dict.fromkeys(name for row in rows for name in row.groups))
    return Summary(rows, baseline, groups)


def compare(results: Results, method: str, other: str) -> Comparison | None:
    """Accuracy(method) - accuracy(other) over common seeds; None without any."""
    return statistics.compare(
        *(
            {run["seed"]: run["accuracy"] for run in results.get(name, ())}
            for name in (method, other)
        )
    )


def paired_difference(results: Results, method: str, other: str) -> Estimate | None:
    """Mean and standard error of the paired difference; None without common seeds."""
    comparison = compare(results, method, other)
    return None if comparison is None else comparison.difference


def _group_estimates(runs: Sequence[Mapping[str, Any]]) -> dict[str, Estimate]:
    """Accuracy by group; a group that some run lacks (or holds null for) is left out."""
    values = [run.get("group_accuracy", {}) for run in runs]
    return {
        name: estimate([run[name] for run in values])
        for name in values[0]
        if all(run.get(name) is not None for run in values)
    }


def title_of(settings: Mapping[str, Any]) -> str:
    """What a reader has to know of the settings to understand a table.

    >>> title_of({"dataset": "digits", "profile": "step", "imbalance": 10.0, "model": "mlp"})
    'digits, step 10:1, mlp, test accuracy'
    """
    parts = [str(settings.get("dataset", "unknown data"))]
    if settings.get("profile", "none") != "none":
        parts.append(f"{settings['profile']} {settings['imbalance']:g}:1")
    if settings.get("per_class"):
        parts.append(f"{settings['per_class']} training images a class")
    if settings.get("model"):
        parts.append(str(settings["model"]))
    return ", ".join([*parts, f"{settings.get('evaluate_on', 'test')} accuracy"])


# The short table of a terminal: at most 120 columns wide.
_TERMINAL_GROUPS = ("many", "medium", "few")
COLUMNS = ("method", "accuracy %", f"vs {ERM}", *(f"{g} %" for g in _TERMINAL_GROUPS), "seconds")


def rows(results: Results) -> list[tuple[str, ...]]:
    """The short table's rows as text, one a method."""
    return [
        (
            row.method,
            row.accuracy.percent(),
            row.comparison.difference.percent(signed=True) if row.comparison else "",
            *(row.groups[g].percent() if g in row.groups else "" for g in _TERMINAL_GROUPS),
            f"{row.seconds:.1f}",
        )
        for row in summarize(results).rows
    ]


def text_table(summary: Summary, published: Mapping[str, str] | None = None) -> list[list[str]]:
    """The whole table as text, header first; accuracies in per cent.

    Args:
      summary: the numbers.
      published: figures of others by method, for a last column.
    """
    header = ["method", "seeds", "accuracy %"]
    compared = any(row.comparison for row in summary.rows)
    if compared:
        header += [f"vs {summary.baseline}", "95% interval", "p", "p (Holm)"]
    header += [f"{group} %" for group in summary.groups]
    timed = any(np.isfinite(row.seconds) for row in summary.rows)
    header += ["seconds"] if timed else []
    header += ["published"] if published else []
    lines = [header]
    for row in summary.rows:
        line = [row.method, str(len(row.seeds)), row.accuracy.percent()]
        if compared:
            line += comparison_cells(row.comparison, row.p_holm)
        line += [row.groups[g].percent() if g in row.groups else "" for g in summary.groups]
        line += [_number(row.seconds, "{:.1f}")] if timed else []
        line += [published.get(row.method, "")] if published else []
        lines.append(line)
    return lines


def comparison_cells(comparison: Comparison | None, p_holm: float) -> list[str]:
    """Difference, interval, p-value and corrected p-value as text; empty without a comparison."""
    if comparison is None:
        return ["", "", "", ""]
    return [
        comparison.difference.percent(signed=True),
        comparison.interval(),
        _number(comparison.p_value, "{:.3g}"),
        _number(p_holm, "{:.3g}"),
    ]


def _number(value: float, pattern: str) -> str:
    return "" if np.isnan(value) else pattern.format(value)


def frame(summary: Summary) -> pd.DataFrame:
    """The table with one number a cell: accuracies as fractions, NaN where there is none."""
    records = []
    for row in summary.rows:
        record = {"method": row.method, "seeds": len(row.seeds)}
        record |= _numbers("accuracy", row.accuracy)
        record |= {"baseline": summary.baseline}
        record |= comparison_numbers(row.comparison, row.p_holm)
        for group in summary.groups:
            record |= _numbers(group, row.groups.get(group, UNKNOWN))
        records.append(record | {"seconds_mean": row.seconds})
    return pd.DataFrame.from_records(records)


def comparison_numbers(comparison: Comparison | None, p_holm: float) -> dict[str, float]:
    """The same numbers as fractions, by the names that tables have them under."""
    found = comparison or NOT_COMPARED
    return {
        "pairs": found.pairs,
        **_numbers("difference", found.difference),
        "difference_low": found.low,
        "difference_high": found.high,
        "p_value": found.p_value,
        "p_holm": p_holm,
    }


def _numbers(name: str, value: Estimate) -> dict[str, float]:
    return {f"{name}_mean": value.mean, f"{name}_se": value.error}


def as_csv(results: Results, baseline: str = ERM) -> str:
    """The table of numbers as CSV."""
    return csv_text(frame(summarize(results, baseline)))


def as_markdown(
    results: Results, title: str, baseline: str = ERM, notes: Sequence[str] = ()
) -> str:
    """The table in Markdown under a title, with what its numbers mean and what limits them."""
    table = markdown_table(text_table(summarize(results, baseline)))
    return "\n".join([f"## {title}\n\n{table}", *(f"{line}\n" for line in (LEGEND, *notes))])


LEGEND = (
    "Accuracy: mean +- standard error over seeds. vs: mean and standard error of the paired "
    "difference to the baseline (same seed, same data), in percentage points, with its 95% "
    f"bootstrap interval (BCa, {statistics.RESAMPLES} resamples; too narrow with very few seeds) "
    "and the p-value of Wilcoxon's signed-rank test, as it is and Holm-corrected for the "
    "comparisons of the table; n pairs cannot give less than 2^(1-n). many/medium/few: mean "
    "accuracy of the classes with > 100, 20-100, < 20 training images (by thirds where a group "
    "would be empty). seconds: mean wall time of a run, compilation included in a method's first."
)
