"""Figures of a comparison of methods."""

import pathlib
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from experiments.reporting import paired, style, tables
from experiments.reporting.frame import Results

# More classes than this have no names on the axis.
MOST_NAMED_CLASSES = 20
# Names of `effect/LAYER/MEASURE/SIGN` in words, with the value where nothing changes and the size
# below which only rounding differs.
_EFFECTS = {
    "loss_change": ("loss change", ", nats", 0.0, 1e-6),
    "norm_ratio": ("norm ratio", "", 1.0, 1e-6),
    "accuracy_change": ("change of training accuracy", ", as a share", 0.0, 1e-6),
}


def accuracy(compared: pd.DataFrame, path: pathlib.Path) -> bool:
    """Mean accuracy with its standard error, one panel for all and one for each group; True.

    Args:
      compared: of `paired.compare`, with the measures accuracy and groups.
      path: of the figure.
    """
    rows = tables.accuracies(compared)
    order = style.by_result(dict(zip(rows["method"], rows["mean"], strict=True)))
    bold = style.highlighted(order)
    groups = tables.groups(compared)
    names = ["accuracy", *groups]
    everything = "all domains" if set(groups) - set(tables.CLASS_GROUPS) else "all classes"
    figure, axes = style.grid_of(len(names), 0.75 + 0.2 * len(order), 2.2, 4, sharey=True)
    for axis, name in zip(axes.flat, names, strict=False):
        values = 100 * tables.of_measure(compared, name, order)[["mean", "se"]]
        for y, (method, mean, error) in enumerate(values.itertuples()):
            color, marker = style.mark_of(method) if method in bold else (style.GREY, "o")
            axis.errorbar(mean, y, xerr=np.nan_to_num(error), color=color, marker=marker,
                          elinewidth=1.4)  # fmt: skip
            axis.annotate(f"{mean:.1f}", (100, y), (6, 0), textcoords="offset points",
                          va="center", fontsize=style.SMALL, color=color)  # fmt: skip
        style.per_cent(axis, np.nanmin(values["mean"] - values["se"].fillna(0)), "x")
        axis.set_title(everything if name == "accuracy" else tables.group_title(name))
        axis.grid(axis="y", visible=False)
    axes.flat[0].set_yticks(range(len(order)), order)
    axes.flat[0].set_ylim(len(order) - 0.5, -0.5)
    style.save(figure, path)
    return True


def differences(compared: pd.DataFrame, label: str, path: pathlib.Path) -> bool:
    """Paired differences with their intervals, or of each seed; False if there are none.

    Args:
      compared: rows of `paired.compare` or `paired.contrasts`, one a line of the figure.
      label: of the axis, without its unit.
      path: of the figure.
    """
    if compared.empty:
        return False
    rows = compared.sort_values("difference", ascending=False)
    bold = style.highlighted(list(rows["method"]))
    figure, (axis,) = _one(6.4, 1.0 + 0.22 * len(rows))
    for y, row in enumerate(rows.itertuples()):
        color, marker = style.mark_of(row.method) if row.method in bold else (style.GREY, "o")
        few = row.pairs < paired.FEWEST_PAIRS
        if few:
            axis.plot(100 * np.array(row.each), np.full(row.pairs, y), "|", color=style.GREY,
                      markersize=8)  # fmt: skip
        else:
            ends = 100 * np.array([row.difference_low, row.difference_high])
            axis.plot(ends, [y, y], color=color)
        filled = not few and row.p_holm < paired.LEVEL
        axis.plot(100 * row.difference, y, marker, color=color,
                  markerfacecolor=color if filled else "white")  # fmt: skip
    style.zero_line(axis, side="x")
    axis.set_yticks(range(len(rows)), rows["method"])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel(f"{label}, percentage points")
    if (rows["pairs"] >= paired.FEWEST_PAIRS).any():
        style.note(figure, "Lines: 95% intervals. Filled: p < 0.05, Holm-corrected.")
    else:
        style.note(figure, "Ticks: the seeds. Too few of them for an interval.")
    style.save(figure, path)
    return True


def per_class_accuracy(results: Results, path: pathlib.Path) -> bool:
    """Accuracy by class, classes in order of training count, means over seeds.

    False if no run has any.
    """
    needed = {"per_class_accuracy", "train_counts"}
    runs = {m: r for m, r in results.items() if all(needed <= set(run) for run in r)}
    if not runs:
        return False
    counts = np.rint(
        np.mean([run["train_counts"] for members in runs.values() for run in members], axis=0)
    ).astype(int)
    order = np.argsort(-counts, kind="stable")
    values = {
        method: 100 * _array([run["per_class_accuracy"] for run in members])[:, order]
        for method, members in runs.items()
    }
    positions = np.arange(len(order))
    figure, (axis,) = _one(max(6.0, min(0.5 * len(order), 10.0)) + 1.2, 3.4)
    curves = {method: (positions, table) for method, table in values.items()}
    _curves(axis, curves, runs, lines=len(order) <= MOST_NAMED_CLASSES)
    if len(order) <= MOST_NAMED_CLASSES:
        axis.set_xticks(positions, [f"{c}\n{counts[c]}" for c in order])
        axis.set_xlabel("class, and its training images")
    else:
        axis.set_xlabel("class, most training images first")
    axis.set_xlim(-0.3, len(order) - 0.7)
    style.per_cent(axis, min(table.mean(axis=0).min() for table in values.values()))
    style.save(figure, path)
    return True


def training_curves(results: Results, path: pathlib.Path, evaluated_on: str) -> bool:
    """Training loss and held-out accuracy over epochs, means over seeds with standard errors.

    False if no run has curves.
    """
    panels = (("train/loss", 1.0), ("evaluation/accuracy", 100.0))
    curves = [{m: c for m in results if (c := curve_of(results[m], name))} for name, _ in panels]
    if not any(curves):
        return False
    figure, axes = style.panels(1, 2, 3.2, 3.9)
    for axis, found, (_, factor) in zip(axes.flat, curves, panels, strict=True):
        if not found:
            axis.set_visible(False)
            continue
        scaled = {method: (at, factor * values) for method, (at, values) in found.items()}
        _curves(axis, scaled, results)
        style.epochs(axis, max(at[-1] for at, _ in found.values()))
    axes[0, 0].set_ylabel("training loss (perturbed), nats")
    if all((values > 0).all() for _, values in curves[0].values()):
        style.log(axes[0, 0])
    if curves[1]:
        lowest = min(100 * np.median(values) for _, values in curves[1].values())
        style.per_cent(axes[0, 1], lowest - 15, label=f"{evaluated_on} accuracy %")
    style.save(figure, path)
    return True


def effect_curves(results: Results, path: pathlib.Path) -> bool:
    """What the perturbations do over epochs: every `effect/*` scalar, one panel each.

    False if no run has any.
    """
    names = sorted(
        {
            name
            for runs in results.values()
            for run in runs
            for record in run.get("curve", ())
            for name in record
            if name.startswith("effect/")
        }
    )
    curves = {n: {m: c for m in results if (c := curve_of(results[m], n))} for n in names}
    curves = {name: found for name, found in curves.items() if found}
    if not curves:
        return False
    figure, axes = style.grid_of(len(curves), 2.2, 3.3, sharex=True)
    for axis, (name, found) in zip(axes.flat, curves.items(), strict=False):
        title, still, smallest = effect_title(name)
        axis.set_title(title)
        seen = {
            method: (at, values) for method, (at, values) in found.items()
            if np.abs(values.mean(axis=0) - still).max() > smallest
        }  # fmt: skip
        _curves(axis, seen, results)
        style.epochs(axis, max(at[-1] for at, _ in found.values()))
        style.plain(axis)
        style.zero_line(axis, still)
        if not seen:
            style.say(axis, f"no change above {style.number(smallest)}")
            axis.set_yticks([])
    for axis in axes[:-1].flat:
        axis.set_xlabel("")
    style.save(figure, path)
    return True


def effect_title(name: str) -> tuple[str, float, float]:
    r"""Title of `effect/LAYER/MEASURE/SIGN`, its value without any change, and the resolution.

    >>> effect_title("effect/hidden1/loss_change/positive")[0]
    'loss change of positive classes\nat hidden1, nats'
    """
    _, layer, measure, *rest = [*name.split("/"), ""]
    words, unit, still, smallest = _EFFECTS.get(measure, (measure.replace("_", " "), "", 0.0, 1e-6))
    sign = " ".join(filter(None, rest))
    of = f" of {sign} classes" if sign else ""
    return f"{words}{of}\nat {layer}{unit}", still, smallest


def curve_of(runs: Sequence[Mapping], name: str) -> tuple[list[int], np.ndarray] | None:
    """Epochs in which all runs recorded a value, and the values [runs, epochs, ...], or None."""
    records = [
        {r["epoch"]: r[name] for r in run.get("curve", ()) if r.get(name) is not None}
        for run in runs
    ]
    epochs = sorted(set(records[0]).intersection(*records))
    return (epochs, _array([[record[e] for e in epochs] for record in records])) if epochs else None


def _one(width: float, height: float):
    figure, axes = plt.subplots(figsize=(width, height), squeeze=False, layout="constrained")
    return figure, axes[0]


def _curves(axis, curves: Mapping, results: Results, lines: bool = True) -> None:
    """A line a method, the mean over runs [runs, points], named at its end."""
    ends = {}
    for method, mark in style.marks(_sorted(results, curves)).items():
        at, values = curves[method][0], curves[method][1]
        mean = values.mean(axis=0)
        few = len(at) < 12 and lines
        axis.plot(at, mean, **mark | {"marker": mark["marker"] if few else ""})
        if mark["color"] != style.PALE:
            ends[method] = (mean[-1], mark["color"])
            if len(values) > 1:
                error = _error(values)
                axis.fill_between(at, mean - error, mean + error, color=mark["color"], alpha=0.13,
                                  linewidth=0)  # fmt: skip
    style.label_ends(axis, ends)


def _sorted(results: Results, methods: Mapping) -> list[str]:
    """Methods from the best accuracy to the worst."""
    return style.by_result(
        {m: np.mean([run.get("accuracy", np.nan) for run in results[m]]) for m in methods}
    )


def _error(values: np.ndarray) -> np.ndarray:
    """Standard error over the first axis."""
    return np.array([paired.estimate(column).error for column in values.T])


def _array(nested: Sequence) -> np.ndarray:
    """Floats; what JSON holds as null (NaN) becomes NaN."""
    return np.asarray(nested, dtype=np.float64)
