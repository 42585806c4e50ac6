"""Figures of an experiment, readable with two methods and with twenty."""

import io
import pathlib
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.reporting import paired, tables
from experiments.reporting.frame import Results
from lpa_jax.files import write_bytes

# Okabe and Ito's palette: distinguishable to colour-blind readers and in grey.
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#F0E442")
DASHES = ("-", "--", ":", "-.")
# More bars than this side by side cannot be told apart: a heat map takes their place.
MOST_BARS = 90
MOST_PRINTED_CLASSES = 20


def accuracy_bars(compared: pd.DataFrame, path: pathlib.Path) -> bool:
    """Mean accuracy with its standard error, one panel for all and one for each group; True.

    Args:
      compared: of `paired.compare`, with the measures accuracy and groups.
      path: of the figure.
    """
    rows = tables.accuracies(compared)
    methods = list(rows["method"])
    colors = np.where(rows["method"] == rows["baseline"], "#999999", COLORS[5])
    names = ["accuracy", *tables.groups(compared)]
    figure, axes = plt.subplots(
        1, len(names), figsize=(2.2 + 2.1 * len(names), 1.3 + 0.3 * len(methods)), sharey=True,
        squeeze=False,
    )  # fmt: skip
    positions = np.arange(len(methods))
    for axis, name in zip(axes[0], names, strict=True):
        of_name = tables.of_measure(compared, name, methods)
        means, errors = 100 * of_name["mean"].to_numpy(), 100 * of_name["se"].fillna(0).to_numpy()
        axis.barh(positions, means, xerr=errors, color=colors, height=0.72,
                  error_kw={"elinewidth": 1.0, "ecolor": "#333333"})  # fmt: skip
        for position, mean, error in zip(positions, means, errors, strict=True):
            if not np.isnan(mean):
                axis.text(mean + error + 2, position, f"{mean:.1f}", va="center", fontsize=8)
        title = "all" if name == "accuracy" else name
        axis.set(title=title, xlabel="accuracy %", xlim=(0, 118), xticks=range(0, 101, 25))
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0][0].set_yticks(positions, methods)
    axes[0][0].invert_yaxis()
    _save(figure, path)
    return True


def differences(compared: pd.DataFrame, label: str, path: pathlib.Path) -> bool:
    """Paired differences with their intervals; False if there are none.

    Args:
      compared: rows of `paired.compare` or `paired.contrasts`, one a line of the figure.
      label: of the axis, without its unit.
      path: of the figure.
    """
    if compared.empty:
        return False
    figure, axis = plt.subplots(figsize=(7, 1.6 + 0.3 * len(compared)))
    for position, row in enumerate(compared.itertuples()):
        ends = 100 * np.array([row.difference_low, row.difference_high])
        axis.plot(ends, [position, position], color=COLORS[5], linewidth=1.6)
        face = COLORS[5] if row.p_holm < paired.LEVEL else "white"
        axis.plot(100 * row.difference, position, "o", color=COLORS[5], markersize=6,
                  markerfacecolor=face)  # fmt: skip
    axis.axvline(0, color="#666666", linewidth=1)
    axis.set_yticks(range(len(compared)), compared["method"])
    axis.set_ylim(len(compared) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel(f"{label}, percentage points\n(95% interval; filled: p < 0.05, Holm-corrected)")
    _save(figure, path)
    return True


def per_class_accuracy(results: Results, path: pathlib.Path) -> bool:
    """Accuracy by class, classes in order of training count, means over seeds.

    Bars with standard errors, or a heat map where there are too many; False if no run has any.
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
    names = [f"{c}\n{counts[c]}" for c in order]
    if len(runs) * len(counts) > MOST_BARS:
        _class_map({method: v.mean(axis=0) for method, v in values.items()}, names, path)
    else:
        _class_bars(values, names, path)
    return True


def _class_bars(values: Mapping[str, np.ndarray], names: Sequence[str], path: pathlib.Path) -> None:
    positions = np.arange(len(names))
    figure, axis = plt.subplots(figsize=(max(7.0, 0.45 * len(names) + 3), 4.2))
    width = 0.84 / len(values)
    for i, (method, accuracies) in enumerate(values.items()):
        error = _error(accuracies) if len(accuracies) > 1 else None
        offset = (i - (len(values) - 1) / 2) * width
        axis.bar(
            positions + offset,
            accuracies.mean(axis=0),
            width,
            yerr=error,
            label=method,
            color=COLORS[i % len(COLORS)],
            error_kw={"elinewidth": 0.8, "ecolor": "#666666"},
        )
    axis.set_xticks(positions, names, fontsize=8)
    axis.set(xlabel="class (training images below)", ylabel="accuracy %", ylim=(0, 100))
    _finish(figure, axis, path)


def _class_map(means: Mapping[str, np.ndarray], names: Sequence[str], path: pathlib.Path) -> None:
    few = len(names) <= MOST_PRINTED_CLASSES
    width = 0.55 * len(names) if few else 0.12 * len(names)
    figure, axis = plt.subplots(figsize=(max(7.0, width + 4), 1.9 + 0.3 * len(means)))
    table = np.stack(list(means.values()))
    image = axis.imshow(table, aspect="auto", cmap="viridis", vmin=0, vmax=100)
    axis.set_yticks(range(len(means)), list(means))
    if few:
        axis.set_xticks(range(len(names)), names, fontsize=8)
        axis.set_xlabel("class (training images below)")
        for (y, x), value in np.ndenumerate(table):
            color = "black" if value > 60 else "white"
            axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
    else:
        axis.set_xlabel("class, most training images first")
    figure.colorbar(image, ax=axis, label="accuracy %")
    _save(figure, path)


def training_curves(results: Results, path: pathlib.Path, evaluated_on: str) -> bool:
    """Training loss and held-out accuracy over epochs, means over seeds with standard errors.

    False if no run has curves.
    """
    panels = (
        ("train/loss", "training loss (perturbed)", 1.0),
        ("evaluation/accuracy", f"{evaluated_on} accuracy %", 100.0),
    )
    curves = [{m: c for m in results if (c := curve_of(results[m], name))} for name, *_ in panels]
    if not any(curves):
        return False
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2))
    for axis, found, (_, label, factor) in zip(axes, curves, panels, strict=True):
        _draw_curves(axis, found, list(results), factor)
        axis.set(xlabel="epoch", ylabel=label)
    if all((values > 0).all() for _, values in curves[0].values()):
        axes[0].set_yscale("log")
    _finish(figure, axes[0], path)
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
    columns = min(3, len(curves))
    lines = -(-len(curves) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(max(7.0, 3.7 * columns), 2.5 * lines + 0.8), squeeze=False
    )
    for axis, (name, found) in zip(axes.flat, curves.items(), strict=False):
        _draw_curves(axis, found, list(results), 1.0)
        axis.set_title(name.removeprefix("effect/"), fontsize=9)
        axis.set_xlabel("epoch", fontsize=8)
        # Where a perturbation changes nothing.
        axis.axhline(1.0 if "norm_ratio" in name else 0.0, color="#666666", linewidth=0.8)
    for axis in axes.flat[len(curves) :]:
        axis.set_visible(False)
    shown = [method for method in results if any(method in found for found in curves.values())]
    handles = [_line_style(list(results), method) for method in shown]
    lines = [plt.Line2D([], [], **handle) for handle in handles]
    _finish(figure, axes[0, 0], path, legend=(lines, shown))
    return True


def curve_of(runs: Sequence[Mapping], name: str) -> tuple[list[int], np.ndarray] | None:
    """Epochs in which all runs recorded a value, and the values [runs, epochs, ...], or None."""
    records = [
        {r["epoch"]: r[name] for r in run.get("curve", ()) if r.get(name) is not None}
        for run in runs
    ]
    epochs = sorted(set(records[0]).intersection(*records))
    return (epochs, _array([[record[e] for e in epochs] for record in records])) if epochs else None


def _line_style(methods: Sequence[str], method: str) -> dict:
    i = methods.index(method)
    return {
        "color": COLORS[i % len(COLORS)],
        "linestyle": DASHES[i // len(COLORS) % len(DASHES)],
        "linewidth": 1.5,
    }


def _draw_curves(axis, curves: Mapping, methods: Sequence[str], factor: float) -> None:
    for method, (epochs, values) in curves.items():
        style = _line_style(methods, method)
        mean = factor * values.mean(axis=0)
        axis.plot(epochs, mean, label=method, marker="." if len(epochs) == 1 else "", **style)
        if len(values) > 1:
            error = factor * _error(values)
            axis.fill_between(
                epochs, mean - error, mean + error, color=style["color"], alpha=0.15, linewidth=0
            )
    axis.grid(alpha=0.3)


def _error(values: np.ndarray) -> np.ndarray:
    """Standard error over the first axis."""
    return np.array([paired.estimate(column).error for column in values.T])


def _array(nested: Sequence) -> np.ndarray:
    """Floats; what JSON holds as null (NaN) becomes NaN."""
    return np.asarray(nested, dtype=np.float64)


def _finish(figure: Figure, axis, path: pathlib.Path, legend=None) -> None:
    """Adds a legend above the panels, in as many lines as it needs, and saves."""
    handles, labels = legend or axis.get_legend_handles_labels()
    width, height = figure.get_size_inches()
    longest = max((len(label) for label in labels), default=1)
    columns = max(1, min(len(labels), int(width / (0.085 * longest + 0.55))))
    inches = 0.12 + 0.2 * -(-len(labels) // columns)
    figure.set_size_inches(width, height + inches)
    figure.legend(handles, labels, loc="upper center", ncols=columns, frameon=False, fontsize=9)
    _save(figure, path, top=1 - inches / (height + inches))


def _save(figure: Figure, path: pathlib.Path, top: float = 1.0) -> None:
    figure.tight_layout(rect=(0, 0, 1, top))
    write_figure(figure, path, dpi=150)


def write_figure(figure: Figure, path: pathlib.Path, dpi: int) -> None:
    """Writes a figure whole, and never through a link to somewhere else; closes it.

    Args:
      figure: to write.
      path: whose suffix is the format: .png, or .svg, whose bytes depend on nothing but the figure.
      dpi: pixels per inch; an SVG has none.
    """
    content = io.BytesIO()
    suffix = path.suffix.removeprefix(".")
    metadata = {"Date": None} if suffix == "svg" else None
    with plt.rc_context({"svg.hashsalt": "lpa_jax", "svg.fonttype": "none"}):
        figure.savefig(content, format=suffix, dpi=dpi, metadata=metadata)
    write_bytes(path, content.getvalue())
    plt.close(figure)
