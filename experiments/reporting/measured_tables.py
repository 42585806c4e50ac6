"""Tables of anything that is measured of models: over seeds, and beside a baseline."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiments.reporting import paired, screen, tables

# Anything that is measured of models: method -> seed -> {"values": {measure: value}, ...}.
Found = Mapping[str, Mapping[int, Mapping[str, Any]]]

LEGEND = (
    "Mean ± standard error over seeds; vs: mean ± standard error of the paired difference to the "
    "baseline (same seed, same data). From 5 seeds on, the CSV has 95% bootstrap intervals and "
    "Wilcoxon p-values, Holm-corrected over the methods of a measure. docs/diagnostics.md explains "
    "the measures.\n"
)
# First words of measures that are fractions of the examples.
_SHARES = ("accuracy", "agreement", "ece", "adaptive ece")


def in_words(measure: str) -> str:
    """The name of a measure for readers.

    >>> in_words("normalized lambda1"), in_words("hidden1 worst case")
    ('normalized eigenvalue 1', 'hidden1 worst-case sharpness')
    """
    measure = measure.replace("lambda", "eigenvalue ").replace("average", "average sharpness")
    return measure.replace("worst case", "worst-case sharpness").replace("_", " ")


def values_of(found: Found, part: str = "values") -> pd.DataFrame:
    """What `paired.compare` takes, from what was measured."""
    rows = [
        (method, seed, measure, np.nan if value is None else value)
        for method, seeds in found.items()
        for seed, one in seeds.items()
        for measure, value in one[part].items()
    ]
    return pd.DataFrame(rows, columns=["method", "seed", "measure", "value"])


def compare(found: Found, baseline: str) -> pd.DataFrame:
    """`paired.compare` of what was measured; with the mean of the estimators' errors, if known."""
    values = values_of(found)
    if values.empty:
        return values
    compared = paired.compare(values, baseline).drop(columns=["higher", "each"])
    if all("errors" in one for seeds in found.values() for one in seeds.values()):
        errors = values_of(found, "errors").groupby(["measure", "method"])["value"].mean()
        places = pd.MultiIndex.from_frame(compared[["measure", "method"]])
        compared["estimator_error"] = errors.reindex(places).to_numpy()
    return compared


def markdown(compared: pd.DataFrame, title: str, measures: Sequence[str] | None = None) -> str:
    """Markdown tables of methods by measures: values, and paired differences to the baseline.

    Measures called `PART: NAME` are under a heading PART.

    Args:
      compared: of `compare`.
      title: above the tables.
      measures: those to show, in order; None for all.
    """
    text = [f"## {title}\n"]
    for part, both in _by_part(compared, measures):
        text += [f"### {part}\n"] if part else []
        text += map(tables.markdown_table, both)
    return "\n".join(text)


def show(
    compared: pd.DataFrame, title: str, measures: Sequence[str] | None = None, legend: str = ""
) -> None:
    """Prints the same tables, each transposed where that takes fewer lines, and a legend."""
    screen.show(title)
    for part, both in _by_part(compared, measures):
        if part:
            screen.show(f"\n{part}")
        for table in both:
            screen.show()
            screen.show_table(_shorter(table, screen.width()))
    screen.show(f"\n{legend}" if legend else "")


def _shorter(table: screen.Lines, width: int) -> screen.Lines:
    fitting = screen.fitting(table, width)
    turned = [list(line) for line in zip(*fitting, strict=True)]
    turned[0][0] = turned[0][0].replace("method", "measure")
    return min(fitting, turned, key=lambda lines: screen.table(lines, width).count("\n"))


def _by_part(
    compared: pd.DataFrame, measures: Sequence[str] | None
) -> Iterator[tuple[str, list[screen.Lines]]]:
    by_part: dict[str, list[str]] = {}
    for measure in compared["measure"].unique() if measures is None else measures:
        by_part.setdefault(measure.rpartition(": ")[0], []).append(measure)
    for part, own in by_part.items():
        yield part, _tables(compared, own)


def _tables(compared: pd.DataFrame, measures: Sequence[str]) -> list[screen.Lines]:
    methods, baseline = list(compared["method"].unique()), compared["baseline"].iloc[0]
    others = [method for method in methods if method != baseline]
    columns, differences = {"method": methods}, {f"vs {baseline}": others}
    for measure in measures:
        name = in_words(measure.rpartition(": ")[2])
        cell, rows = text, tables.of_measure(compared, measure, methods)
        if name.startswith(_SHARES):
            name, cell = f"{name} %", tables.percent
        columns[name] = [cell(*row) for row in zip(rows["mean"], rows["se"], strict=True)]
        if baseline in methods and rows["seeds"][baseline]:
            own = rows.loc[others]
            pairs = zip(own["difference"], own["difference_se"], strict=True)
            differences[name] = [cell(*pair, signed=True) for pair in pairs]
    both = [columns, differences] if others and len(differences) > 1 else [columns]
    return [tables.lines_of(table) for table in both]


def class_frame(found: Found) -> pd.DataFrame:
    """What `measurements.geometry` found, one row a method, form, layer and class.

    Means over the seeds that have the class among the images measured, with standard errors.
    """
    rows = [
        (method, form, layer, c, name, value)
        for method, seeds in found.items()
        for one in seeds.values()
        for form, layers in one["classes"].items()
        for layer, measures in layers.items()
        for name, numbers in measures.items()
        for c, value in enumerate(numbers)
    ]
    by = ["method", "geometry", "layer", "class"]
    frame = pd.DataFrame(rows, columns=[*by, "measure", "value"])
    frame["value"] = frame["value"].astype(float)
    records = []
    for place, own in frame.groupby(by, sort=False):
        known = {name: rows.dropna() for name, rows in own.groupby("measure", sort=False)["value"]}
        record = dict(zip(by, place, strict=True)) | {"seeds": len(known["norm_ratio"])}
        for name, numbers in known.items():
            record |= zip((name, f"{name}_se"), paired.estimate(numbers), strict=True)
        records.append(record)
    return pd.DataFrame.from_records(records)


def text(mean: float, error: float, signed: bool = False) -> str:
    """A number and its standard error; empty if unknown.

    >>> text(0.01234, 0.00345), text(2.0, float("nan"), signed=True)
    ('0.01234±0.0034', '+2')
    """
    mean_text = tables.number(mean, "{:+.4g}" if signed else "{:.4g}")
    return mean_text if np.isnan(error) else f"{mean_text}±{error:.2g}"
