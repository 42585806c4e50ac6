"""From the results of runs to one table: mean, standard error, paired difference to ERM."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.methods import ERM

Results = Mapping[str, Sequence[Mapping[str, Any]]]


class Estimate(NamedTuple):
    """A mean over seeds and its standard error (NaN with one seed)."""

    mean: float
    error: float

    def percent(self, signed: bool = False) -> str:
        """For example `78.70 +- 0.32`, in per cent."""
        sign = "+" if signed else ""
        text = f"{100 * self.mean:{sign}.2f}"
        return text if np.isnan(self.error) else f"{text} +- {100 * self.error:.2f}"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of the mean, s / sqrt(n) with the sample standard deviation.

    >>> estimate([0.5, 0.7]).percent()
    '60.00 +- 10.00'
    """
    values = np.asarray(values, np.float64)
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    return Estimate(float(values.mean()), error)


def paired_difference(results: Results, method: str, other: str) -> Estimate | None:
    """Mean over common seeds of accuracy(method) - accuracy(other); None without common seeds."""
    first, second = (
        {result["seed"]: result["accuracy"] for result in results.get(name, ())}
        for name in (method, other)
    )
    seeds = sorted(set(first) & set(second))
    return estimate([first[seed] - second[seed] for seed in seeds]) if seeds else None


def group_estimate(runs: Sequence[Mapping[str, Any]], group: str) -> Estimate | None:
    """Accuracy of many-, medium- or few-shot classes; None where classes are equally large."""
    values = [run["group_accuracy"].get(group) for run in runs]
    return None if None in values else estimate(values)


GROUPS = ("many", "medium", "few")
COLUMNS = ("method", "accuracy %", "vs erm", "many %", "medium %", "few %", "seconds")


def rows(results: Results) -> list[tuple[str, ...]]:
    """The table's rows as text, one a method."""
    table = []
    for method, runs in results.items():
        difference = None if method == ERM else paired_difference(results, method, ERM)
        groups = [group_estimate(runs, group) for group in GROUPS]
        table.append(
            (
                method,
                estimate([run["accuracy"] for run in runs]).percent(),
                "" if difference is None else difference.percent(signed=True),
                *("" if group is None else group.percent() for group in groups),
                f"{np.mean([run['seconds'] for run in runs]):.1f}",
            )
        )
    return table


def as_csv(results: Results) -> str:
    """The table with one number a cell: means and standard errors as fractions."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = ["accuracy", "difference_to_erm", *GROUPS]
    unknown = Estimate(float("nan"), float("nan"))
    writer.writerow(
        ["method", "seeds", *(f"{n}_{k}" for n in names for k in ("mean", "se")), "seconds_mean"]
    )
    for method, runs in results.items():
        estimates = [
            estimate([run["accuracy"] for run in runs]),
            paired_difference(results, method, ERM) or unknown,
            *(group_estimate(runs, group) or unknown for group in GROUPS),
        ]
        numbers = [f"{number:.6g}" for pair in estimates for number in pair]
        seconds = np.mean([run["seconds"] for run in runs])
        writer.writerow([method, len(runs), *numbers, f"{seconds:.3f}"])
    return out.getvalue()


def as_markdown(results: Results, title: str) -> str:
    """The table in Markdown under a title."""
    lines = [f"## {title}", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(results)]
    return "\n".join(lines) + "\n\n" + LEGEND + "\n"


LEGEND = (
    "Accuracy: mean +- standard error over seeds. vs erm: mean and standard error of the paired "
    "difference (same seed, same data). many/medium/few: mean accuracy of the classes with > 100, "
    "20-100, < 20 training images (by thirds where a group would be empty). seconds: mean wall "
    "time of a run, compilation included in a method's first."
)
