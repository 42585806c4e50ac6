"""Figures of an experiment: accuracy by class and training curves."""

import pathlib
from collections.abc import Sequence

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

from experiments.summary import Results

# Okabe and Ito's palette: distinguishable to colour-blind readers and in grey.
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#F0E442")


def per_class_accuracy(results: Results, path: pathlib.Path) -> None:
    """Bars of test accuracy by class, classes in order of training count, means over seeds."""
    counts = np.asarray(next(iter(results.values()))[0]["train_counts"])
    order = np.argsort(-counts, kind="stable")
    positions = np.arange(len(counts))
    figure, axis = plt.subplots(figsize=(max(7.0, 0.45 * len(counts) + 3), 4.2))
    width = 0.84 / len(results)
    for i, (method, runs) in enumerate(results.items()):
        values = 100 * _array([run["per_class_accuracy"] for run in runs])[:, order]
        error = values.std(axis=0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else None
        offset = (i - (len(results) - 1) / 2) * width
        axis.bar(
            positions + offset,
            values.mean(axis=0),
            width,
            yerr=error,
            label=method,
            color=COLORS[i % len(COLORS)],
            error_kw={"elinewidth": 0.8, "ecolor": "#666666"},
        )
    axis.set_xticks(positions, [f"{c}\n{counts[c]}" for c in order], fontsize=8)
    axis.set(xlabel="class (training images below)", ylabel="accuracy %", ylim=(0, 100))
    _finish(figure, axis, path, legend_columns=len(results))


def training_curves(results: Results, path: pathlib.Path, evaluated_on: str) -> None:
    """Training loss and held-out accuracy over epochs, means over seeds with standard errors."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2))
    panels = (
        ("train/loss", "training loss (perturbed)", 1.0),
        ("evaluation/accuracy", f"{evaluated_on} accuracy %", 100.0),
    )
    for axis, (name, label, factor) in zip(axes, panels, strict=True):
        for i, (method, runs) in enumerate(results.items()):
            records = [[r for r in run["curve"] if r.get(name) is not None] for run in runs]
            epochs = [record["epoch"] for record in records[0]]
            values = factor * _array([[record[name] for record in run] for run in records])
            color = COLORS[i % len(COLORS)]
            axis.plot(epochs, values.mean(axis=0), label=method, color=color, linewidth=1.5)
            if len(values) > 1:
                error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
                low, high = values.mean(axis=0) - error, values.mean(axis=0) + error
                axis.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)
        axis.set(xlabel="epoch", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    _finish(figure, axes[0], path, legend_columns=len(results))


def _array(nested: Sequence) -> np.ndarray:
    """Floats; what JSON holds as null (NaN) becomes NaN."""
    return np.asarray(nested, dtype=np.float64)


def _finish(figure, axis, path: pathlib.Path, legend_columns: int) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=min(legend_columns, 6), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
