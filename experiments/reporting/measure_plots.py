"""Figures of what is measured of trained models: `layer_sweep` and `landscape`."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm

from experiments.reporting import measure_tables
from experiments.reporting import paired as statistics
from experiments.reporting.figures import COLORS, DASHES, write_figure
from experiments.reporting.measure_tables import Values

# method -> seed -> {"values": ..., "errors": ..., curves and maps}
Found = Mapping[str, Mapping[int, Mapping[str, Any]]]

_COLUMNS = 4


def layer_sweep(
    values: Values,
    placed: Mapping[str, Mapping[str, str]],
    baseline: str,
    path: pathlib.Path,
) -> None:
    """A row of panels a method: accuracy, agreement and CKA against the injection point.

    Args:
      values: by placed method.
      placed: method -> layer -> name of the placed method.
      baseline: the method whose accuracy is drawn as a band.
      path: of the figure.
    """
    measures = {
        "accuracy": "accuracy %",
        "agreement": "equal predictions %",
        "error_consistency": "error consistency (kappa)",
        "cka": "CKA of the last hidden layer",
    }
    figure, axes = panels(len(placed), len(measures))
    for row, (method, at) in enumerate(placed.items()):
        layers = list(at)
        references = (layers[0], layers[-1], baseline)
        for axis, (measure, label) in zip(axes[row], measures.items(), strict=True):
            factor = 100 if "%" in label else 1
            if measure == "accuracy":
                series = {method: measure}
                _band(axis, measure_tables.estimate(values, baseline, measure), factor, baseline)
            else:
                series = {f"with the {r} run": f"{measure} {r}" for r in references}
            for i, (name, key) in enumerate(series.items()):
                found = [measure_tables.estimate(values, at[layer], key) for layer in layers]
                means, errors = factor * np.array(found).T
                axis.errorbar(
                    range(len(layers)), means, np.nan_to_num(errors), label=name,
                    color=COLORS[i + 1], marker="o", linestyle=DASHES[i], capsize=3,
                )  # fmt: skip
            axis.set_xticks(range(len(layers)), layers, rotation=30, ha="right")
            axis.set(ylabel=label, title=method, xlabel="injection point")
            axis.grid(alpha=0.3)
    handles = {}
    for axis in axes.flat:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    handles = {label: handle for label, handle in handles.items() if label not in placed}
    figure.legend(
        handles.values(), handles, loc="outside upper center", ncols=len(handles), frameon=False
    )
    save(figure, path)


def bars(found: Found, path: pathlib.Path) -> None:
    """A panel a measure: mean and standard error over seeds of every method."""
    values = {m: {s: one["values"] for s, one in seeds.items()} for m, seeds in found.items()}
    measures, names = measure_tables.measures_of(values), list(values)
    columns = min(_COLUMNS, len(measures))
    height = 0.9 + 0.28 * len(names)
    figure, axes = panels(-(-len(measures) // columns), columns, height, sharey=True)
    for axis, measure in zip(axes.flat, measures, strict=False):
        estimates = [measure_tables.estimate(values, name, measure) for name in names]
        means, errors = np.array(estimates).T
        colors = [color_of(names, name) for name in names]
        axis.barh(
            range(len(names)), means, xerr=np.nan_to_num(errors), color=colors, ecolor="#888888"
        )
        axis.set_yticks(range(len(names)), names)
        axis.set_title(measure, fontsize=9)
        axis.locator_params(axis="x", nbins=4)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    axes.flat[0].invert_yaxis()
    for axis in axes.flat[len(measures) :]:
        axis.set_visible(False)
    save(figure, path)


def lines(found: Found, path: pathlib.Path) -> None:
    """The loss along random lines: means over seeds of the mean over directions."""
    figure, axes = panels(1, 1, 4.0, width=6.0)
    axis = axes[0, 0]
    for method, seeds in found.items():
        # Infinite losses are null in files.
        losses = np.array([one["losses"] for one in seeds.values()], float).mean(axis=1)
        steps = next(iter(seeds.values()))["steps"]
        _curve(axis, steps, losses, color_of(list(found), method), method)
    axis.set_yscale("log")
    axis.set(xlabel="step, in filter norms", ylabel="loss")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, path)


def planes(found: Found, path: pathlib.Path) -> None:
    """Contours of the loss over a plane, one panel a method, with shared levels."""
    one = {method: next(iter(seeds.values())) for method, seeds in found.items()}
    losses = {method: np.array(m["losses"], float) for method, m in one.items()}
    every = np.concatenate([table[np.isfinite(table)] for table in losses.values()])
    low, high = np.log10(np.maximum([every.min(), every.max()], 1e-8))
    levels = np.logspace(low, max(high, low + 1e-3), 16)
    columns = min(_COLUMNS, len(losses))
    figure, axes = panels(-(-len(losses) // columns), columns, 3.2, sharey=True)
    for axis, (method, table) in zip(axes.flat, losses.items(), strict=False):
        steps = one[method]["steps"]
        shown = np.ma.masked_invalid(np.maximum(table.T, levels[0]))
        filled = axis.contourf(steps, steps, shown, levels, norm=LogNorm(), cmap="viridis")
        axis.contour(steps, steps, shown, levels[::3], colors="white", linewidths=0.5)
        axis.plot(0, 0, "+", color="red")
        axis.set(title=f"{method} (seed {next(iter(found[method]))})", aspect="equal")
        axis.set_xlabel("step, in filter norms")
    for axis in axes[:, 0]:
        axis.set_ylabel("step along the other direction")
    for axis in axes.flat[len(losses) :]:
        axis.set_visible(False)
    ticks = levels[::5]
    bar = figure.colorbar(filled, ax=axes, label="loss", ticks=ticks, shrink=0.8)
    bar.ax.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
    bar.ax.minorticks_off()
    save(figure, path)


def amplification(found: Found, path: pathlib.Path) -> None:
    """Heat maps of mean gains, injected at a row's layer and measured at a column's."""
    first = next(iter(next(iter(found.values())).values()))
    layers, probes = first["layers"], list(first["maps"])
    maps = {
        method: {
            probe: np.mean([np.array(one["maps"][probe], float) for one in seeds.values()], axis=0)
            for probe in probes
        }
        for method, seeds in found.items()
    }
    every = np.concatenate([table.ravel() for own in maps.values() for table in own.values()])
    every = every[np.isfinite(every) & (every > 0)]
    norm = LogNorm(every.min(), every.max())
    side = 1.2 + 0.5 * len(layers)
    figure, axes = panels(len(maps), len(probes), side, width=side)
    for row, (method, own) in zip(axes, maps.items(), strict=True):
        for axis, (probe, table) in zip(row, own.items(), strict=True):
            shown = table[:-1, 1:]
            image = axis.imshow(shown, cmap="viridis", norm=norm)
            for (y, x), value in np.ndenumerate(shown):
                if np.isfinite(value):
                    color = "black" if norm(max(value, norm.vmin)) > 0.6 else "white"
                    axis.text(
                        x, y, f"{value:.2g}", ha="center", va="center", fontsize=8, color=color
                    )
            axis.set_xticks(range(len(layers) - 1), layers[1:], rotation=45, ha="right", fontsize=8)
            axis.set_yticks(range(len(layers) - 1), layers[:-1], fontsize=8)
            axis.set_title(f"{method}: {probe}", fontsize=9)
        row[0].set_ylabel("injected at")
    for axis in axes[-1]:
        axis.set_xlabel("measured at")
    label = "mean gain (bound: mean largest singular value)"
    figure.colorbar(image, ax=axes, label=label, shrink=0.7)
    save(figure, path)


def corrupted(found: Found, path: pathlib.Path) -> None:
    """Reliability, and accuracy against severity: the mean of all corruptions, and each."""
    first = next(iter(next(iter(found.values())).values()))
    names, severities = list(first["by_severity"]), first["severities"]
    count = 2 + len(names)
    columns = min(_COLUMNS, count)
    figure, axes = panels(-(-count // columns), columns, 2.6)
    for method, seeds in found.items():
        color, runs = color_of(list(found), method), list(seeds.values())
        means = [np.array([one["reliability"][k] for one in runs], float)
                 for k in ("confidence", "accuracy")]  # fmt: skip
        # Bins without examples in some seed: the mean of the others.
        filled = np.isfinite(means[0]).any(axis=0)
        confidence, accuracy = (np.nanmean(values[:, filled], axis=0) for values in means)
        axes.flat[0].plot(confidence, accuracy, ".-", color=color, label=method)
        tables = 100 * np.array([[one["by_severity"][n] for n in names] for one in runs])
        _curve(axes.flat[1], severities, tables.mean(axis=1), color, method)
        for i in range(len(names)):
            _curve(axes.flat[2 + i], severities, tables[:, i], color, method)
    axes.flat[0].plot([0, 1], [0, 1], color="#666666", linewidth=0.8)
    axes.flat[0].set(title="reliability", xlabel="confidence", ylabel="accuracy")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    for axis, name in zip(axes.flat[1:], ["all corruptions", *names], strict=False):
        axis.set_title(name, fontsize=9)
        axis.set(xlabel="severity", ylabel="accuracy %")
        axis.set_xticks(severities)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    save(figure, path)


def color_of(names: Sequence[str], name: str) -> str:
    """Of a method among the methods of a figure."""
    return COLORS[names.index(name) % len(COLORS)]


def _band(axis, value: statistics.Estimate, factor: float, label: str) -> None:
    axis.axhline(factor * value.mean, color=COLORS[0], linewidth=1, label=label)
    error = np.nan_to_num(value.error)
    low, high = factor * (value.mean - error), factor * (value.mean + error)
    axis.axhspan(low, high, color=COLORS[0], alpha=0.12, linewidth=0)


def _curve(axis, steps, runs: np.ndarray, color: str, label: str) -> None:
    """Mean over runs [runs, steps] with its standard error as a band."""
    mean, error = np.array([statistics.estimate(column) for column in runs.T]).T
    axis.plot(steps, mean, color=color, label=label, marker="." if len(steps) < 8 else "")
    if len(runs) > 1:
        axis.fill_between(steps, mean - error, mean + error, color=color, alpha=0.15, linewidth=0)


def panels(rows: int, columns: int, height: float = 3.2, width: float = 3.2, sharey: bool = False):
    """(figure, axes [rows, columns]); sizes of a panel in inches."""
    return plt.subplots(
        rows,
        columns,
        figsize=(width * columns + 0.8, height * rows + 0.3),
        squeeze=False,
        sharey=sharey,
        layout="constrained",
    )


def save(figure, path: pathlib.Path) -> None:
    """Writes the figure, with the folder that it stands in, and closes it."""
    write_figure(figure, path, dpi=130)
