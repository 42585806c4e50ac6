"""Figures of what `landscape` and `layer_sweep` measure of trained models."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm

from experiments.reporting import measured_tables, paired, tables
from experiments.reporting.figures import COLORS, DASHES, write_figure
from experiments.reporting.measured_tables import Found
from lpa_jax.diagnostics import SpectralQuadrature

_COLUMNS = 4
_POINTS = 600
# Width of the Gaussians, in units of asinh(lambda / linear): a factor of 1.3 far from zero.
_WIDTH = 0.25
# Below this, densities are those of the Gaussians' tails.
_FLOOR = 1e-8


def layer_sweep(
    compared: pd.DataFrame, placed: Mapping[str, Mapping[str, str]], path: pathlib.Path
) -> None:
    """A row of panels a method: accuracy, agreement and CKA against the injection point.

    Args:
      compared: of `paired.compare`, by placed method; the baseline's accuracy is drawn as a band.
      placed: method -> layer -> name of the placed method.
      path: of the figure.
    """
    baseline = compared["baseline"].iloc[0]
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
                _band(axis, *factor * estimates(compared, measure, [baseline]), baseline)
            else:
                series = {f"with the {r} run": f"{measure} {r}" for r in references}
            for i, (name, key) in enumerate(series.items()):
                means, errors = factor * estimates(compared, key, list(at.values()))
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
    compared, names = over_seeds(found), list(found)
    measures = compared["measure"].unique()
    figure, axes = grid_of(len(measures), 0.9 + 0.28 * len(names), sharey=True)
    for axis, measure in zip(axes.flat, measures, strict=False):
        means, errors = estimates(compared, measure, names)
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
    figure, axes = grid_of(len(losses), 3.2, sharey=True)
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
    ticks = levels[::5]
    bar = figure.colorbar(filled, ax=axes, label="loss", ticks=ticks, shrink=0.8)
    bar.ax.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
    bar.ax.minorticks_off()
    save(figure, path)


def amplification(found: Found, path: pathlib.Path) -> None:
    """Heat maps of mean gains, injected at a row's layer and measured at a column's."""
    first = first_of(found)
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
    first = first_of(found)
    names, severities = list(first["by_severity"]), first["severities"]
    figure, axes = grid_of(2 + len(names), 2.6)
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
    save(figure, path)


def spectra(found: Found, path: pathlib.Path) -> None:
    r"""Log density of the eigenvalues, a panel a method, the first method's behind the others.

    Eigenvalues of methods differ by orders of magnitude and most of them are near zero, so they are
    shown by u = asinh(lambda / linear), which is lambda within `linear` and its logarithm beyond;
    the density is that of u. Bands are standard errors over seeds, over probes with a single seed.
    Lanczos from few steps puts nodes far apart near zero: gaps there have no meaning.
    """
    linear = _linear_range(found)
    quadratures = {
        method: [_quadrature(one, linear) for one in seeds.values()]
        for method, seeds in found.items()
    }
    every = np.concatenate([q.nodes.ravel() for own in quadratures.values() for q in own])
    low, high = np.nanmin(every) - 4 * _WIDTH, np.nanmax(every) + 4 * _WIDTH
    grid = np.linspace(low, high, _POINTS)
    curves = {method: _density(own, grid) for method, own in quadratures.items()}
    top = 2 * max(density.max() for density, _ in curves.values())
    figure, axes = grid_of(len(curves), 2.6, sharey=True)
    first = next(iter(curves))
    for axis, (method, (density, error)) in zip(axes.flat, curves.items(), strict=False):
        if method != first:
            axis.plot(grid, curves[first][0], color="#999999", linewidth=0.9, label=first)
        color = COLORS[5]
        axis.plot(grid, density, color=color, linewidth=1.3, label=method)
        axis.fill_between(
            grid, np.maximum(density - error, _FLOOR), density + error,
            color=color, alpha=0.25, linewidth=0,
        )  # fmt: skip
        axis.axvline(0, color="#666666", linewidth=0.6)
        axis.set_yscale("log")
        axis.set_ylim(_FLOOR, top)
        axis.set_xlim(low, high)
        ticks = _ticks(low, high, linear)
        axis.set_xticks(np.arcsinh(ticks / linear), [_power(t) for t in ticks], fontsize=8)
        axis.set_title(method, fontsize=10)
        axis.set_xlabel("Hessian eigenvalue")
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("density")
    shown = axes.flat[min(1, len(curves) - 1)]
    if len(curves) > 1:
        handle = shown.get_legend_handles_labels()[0][0]
        figure.legend([handle], [f"{first}, for comparison"], loc="outside upper right",
                      frameon=False, fontsize=8)  # fmt: skip
    save(figure, path)


def _linear_range(found: Found) -> float:
    """A power of ten about a hundredth of the smallest method's largest eigenvalue."""
    largest = [
        np.mean([one["values"]["largest"] for one in seeds.values()]) for seeds in found.values()
    ]
    positive = [value for value in largest if value > 0] or [1.0]
    return float(10.0 ** np.floor(np.log10(min(positive)) - 1.5))


def _quadrature(one: Mapping[str, Any], linear: float) -> SpectralQuadrature:
    nodes, weights = (np.array(one[name], float) for name in ("nodes", "weights"))
    return SpectralQuadrature(np.arcsinh(nodes / linear), weights)


def _density(own: list[SpectralQuadrature], grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found = [quadrature.density(grid, _WIDTH) for quadrature in own]
    if len(found) == 1:
        return found[0]
    values = np.array([density for density, _ in found])
    return values.mean(axis=0), values.std(axis=0, ddof=1) / np.sqrt(len(values))


def _ticks(low: float, high: float, linear: float) -> np.ndarray:
    """0 and powers of ten on both sides, every second one where there are many."""
    ends = linear * np.sinh(np.abs([low, high]))
    exponents = np.arange(np.log10(linear) + 1, np.log10(max(*ends, 10 * linear)) + 1e-9)
    tens = 10.0 ** exponents[:: 2 if len(exponents) > 4 else 1]
    ticks = np.concatenate([-tens[::-1], [0.0], tens])
    positions = np.arcsinh(ticks / linear)
    return ticks[(positions > low) & (positions < high)]


def _power(value: float) -> str:
    if value == 0:
        return "0"
    sign = "-" if value < 0 else ""
    return f"${sign}10^{{{round(np.log10(abs(value)))}}}$"


def color_of(names: Sequence[str], name: str) -> str:
    """Of a method among the methods of a figure."""
    return COLORS[names.index(name) % len(COLORS)]


def over_seeds(found: Found) -> pd.DataFrame:
    """Means and standard errors of every measure and method, as `paired.compare` gives them."""
    return paired.compare(measured_tables.values_of(found), "", tested=())


def first_of(found: Found) -> Mapping[str, Any]:
    """What was measured of the first method's first seed."""
    return next(iter(next(iter(found.values())).values()))


def estimates(compared: pd.DataFrame, measure: str, methods: Sequence[str]) -> np.ndarray:
    """Means and standard errors of a measure, [2, methods]; NaN where there are none."""
    return tables.of_measure(compared, measure, methods)[["mean", "se"]].to_numpy(float).T


def _band(axis, mean: np.ndarray, error: np.ndarray, label: str) -> None:
    (mean,), (error,) = mean, np.nan_to_num(error)
    axis.axhline(mean, color=COLORS[0], linewidth=1, label=label)
    axis.axhspan(mean - error, mean + error, color=COLORS[0], alpha=0.12, linewidth=0)


def _curve(axis, steps, runs: np.ndarray, color: str, label: str) -> None:
    """Mean over runs [runs, steps] with its standard error as a band."""
    mean, error = np.array([paired.estimate(column) for column in runs.T]).T
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


def grid_of(count: int, height: float, sharey: bool = False):
    """(figure, axes) of so many panels in rows; surplus axes are hidden."""
    columns = min(_COLUMNS, count)
    figure, axes = panels(-(-count // columns), columns, height, sharey=sharey)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, axes


def save(figure, path: pathlib.Path) -> None:
    """Writes the figure and closes it."""
    write_figure(figure, path, dpi=130)
