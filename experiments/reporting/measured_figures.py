"""Figures of what `landscape` and `layer_sweep` measure of trained models."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm

from experiments.reporting import measured_tables, paired, style, tables
from experiments.reporting.measured_tables import Found
from lpa_jax.diagnostics import SpectralQuadrature

_POINTS = 600
_TENTHS = [mantissa * 10.0**exponent for exponent in range(-6, 7) for mantissa in (1, 2, 5)]
# Width of the Gaussians, in units of asinh(lambda / linear): a factor of 1.3 far from zero.
_WIDTH = 0.25
# Below this, densities are those of the Gaussians' tails.
_FLOOR = 1e-8
_FLATNESS = (
    "Further left is flatter. If perturbed activations lead to flat minima, the methods with the "
    "best accuracy have the smallest eigenvalues, trace and sharpness; compare the normalised ones "
    "between methods, since scaling weights changes the others. No such order refutes it."
)
_LINE = (
    "The wider the valley, the flatter the minimum along random directions of equal filter norm. "
    "Flatness explains accuracy only if the more accurate methods have the wider valleys."
)
_AMPLIFICATION = (
    "A gain of 2 doubles a perturbation's norm on its way from the row's layer to the column's. If "
    "LPA finds the directions that later layers amplify, its gains are above those of random "
    "directions and near the bound; gains like random ones refute it."
)
_SPECTRUM = (
    "Mass far to the right is sharp curvature, mass left of 0 negative curvature. If a method is "
    "flat, its curve ends left of the first method's; the same ends refute it."
)


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
        "agreement": "same predictions %",
        "error_consistency": "error consistency (kappa)",
        "cka": "CKA of the last hidden layer",
    }
    figure, axes = style.panels(len(placed), len(measures), 2.5, 2.9)
    handles = {}
    for row, (method, at) in zip(axes, placed.items(), strict=True):
        layers = list(at)
        references = (layers[0], layers[-1], baseline)
        for axis, (measure, label) in zip(row, measures.items(), strict=True):
            factor = 100 if "%" in label else 1
            if measure == "accuracy":
                series = {method: (measure, *style.mark_of(method))}
                handles[baseline] = _band(axis, *factor * estimates(compared, measure, [baseline]))
            else:
                looks = zip(references, (style.RED, style.GREEN, style.INK), "^so", strict=True)
                series = {f"with the {r} run": (f"{measure} {r}", *look) for r, *look in looks}
            for name, (key, color, marker) in series.items():
                means, errors = factor * estimates(compared, key, list(at.values()))
                handles[name] = axis.errorbar(range(len(layers)), means, np.nan_to_num(errors),
                                              color=color, marker=marker)  # fmt: skip
            style.ticks(axis, layers)
            if "%" in label:
                lowest = min(np.nanmin(np.array(line.get_ydata(), float)) for line in axis.lines)
                style.per_cent(axis, lowest, label="")
            axis.set(xlabel="injection point")
            axis.set_title(label)
        row[0].set_ylabel(method)
    style.legend(figure, handles)
    style.save(figure, path)


def flatness(found: Found, path: pathlib.Path) -> None:
    """A panel a measure: mean and standard error over seeds of every method."""
    compared, names = over_seeds(found), list(found)
    measures = compared["measure"].unique()
    figure, axes = style.grid_of(len(measures), 0.6 + 0.2 * len(names), 2.4, 4, sharey=True)
    for axis, measure in zip(axes.flat, measures, strict=False):
        means, errors = estimates(compared, measure, names)
        for y, (name, mean, error) in enumerate(zip(names, means, errors, strict=True)):
            color, marker = style.mark_of(name)
            axis.errorbar(mean, y, xerr=np.nan_to_num(error), color=color, marker=marker)
        positive = means[np.isfinite(means)]
        if len(positive) and positive.min() > 0 and positive.max() > 20 * positive.min():
            style.log(axis, "x")
        else:
            style.plain(axis, "x", 3)
        axis.set_yticks(range(len(names)), names)
        axis.set_title("loss, nats" if measure == "loss" else measured_tables.in_words(measure))
        axis.grid(axis="y", visible=False)
    axes.flat[0].set_ylim(len(names) - 0.5, -0.5)
    style.note(figure, _FLATNESS)
    style.save(figure, path)


def lines(found: Found, path: pathlib.Path) -> None:
    """The loss along random lines: means over seeds of the mean over directions."""
    figure, axes = style.panels(1, 1, 3.6, 5.4)
    axis, ends = axes[0, 0], {}
    for method, seeds in found.items():
        # Infinite losses are null in files.
        losses = np.array([one["losses"] for one in seeds.values()], float).mean(axis=1)
        steps = next(iter(seeds.values()))["steps"]
        ends[method] = (_curve(axis, steps, losses, method), style.mark_of(method)[0])
    style.log(axis)
    axis.set(xlabel="step, in filter norms", ylabel="loss, nats", xlim=(steps[0], steps[-1]))
    style.label_ends(axis, ends)
    style.note(figure, _LINE)
    style.save(figure, path)


def planes(found: Found, path: pathlib.Path) -> None:
    """Contours of the loss over a plane, one panel a method, with shared levels."""
    one = {method: next(iter(seeds.values())) for method, seeds in found.items()}
    losses = {method: np.array(m["losses"], float) for method, m in one.items()}
    every = np.concatenate([table[np.isfinite(table)] for table in losses.values()])
    low, high = np.log10(np.maximum([every.min(), every.max()], 1e-8))
    levels = np.logspace(low, max(high, low + 1e-3), 16)
    figure, axes = style.grid_of(len(losses), 2.7, 2.6, 4, sharey=True, sharex=True)
    for axis, (method, table) in zip(axes.flat, losses.items(), strict=False):
        steps = one[method]["steps"]
        shown = np.ma.masked_invalid(np.maximum(table.T, levels[0]))
        filled = axis.contourf(steps, steps, shown, levels, norm=LogNorm(), cmap="viridis")
        axis.contour(steps, steps, shown, levels[::3], colors="white", linewidths=0.5)
        axis.plot(0, 0, "+", color=style.RED)
        axis.set(title=f"{method} (seed {next(iter(found[method]))})", aspect="equal")
        axis.set_xlabel("step, in filter norms")
        axis.grid(visible=False)
    for axis in axes[:, 0]:
        axis.set_ylabel("step, other direction")
    ticks = levels[::5]
    bar = figure.colorbar(filled, ax=axes, label="loss, nats", ticks=ticks, shrink=0.8)
    bar.ax.set_yticks(ticks, [style.number(float(f"{tick:.2g}")) for tick in ticks])
    bar.ax.minorticks_off()
    style.note(figure, _LINE)
    style.save(figure, path)


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
    side = 1.0 + 0.42 * len(layers)
    figure, axes = style.panels(len(maps), len(probes), side, side, sharex=True, sharey=True)
    for row, (method, own) in zip(axes, maps.items(), strict=True):
        for axis, table in zip(row, own.values(), strict=True):
            shown = table[:-1, 1:]
            image = axis.imshow(shown, cmap="viridis", norm=norm)
            for (y, x), value in np.ndenumerate(shown):
                if np.isfinite(value):
                    color = "black" if norm(max(value, norm.vmin)) > 0.6 else "white"
                    axis.text(
                        x, y, _short(value), ha="center", va="center", fontsize=7, color=color
                    )
            axis.set_xticks(range(len(layers) - 1), layers[1:], rotation=45, ha="right",
                            rotation_mode="anchor")  # fmt: skip
            axis.set_yticks(range(len(layers) - 1), layers[:-1])
            axis.grid(visible=False)
        row[0].set_ylabel(f"{method}\ninjected at")
    for axis, probe in zip(axes[0], probes, strict=True):
        axis.set_title(probe)
    for axis in axes[-1]:
        axis.set_xlabel("measured at")
    bar = figure.colorbar(image, ax=axes, label="mean gain", shrink=0.7)
    ticks = [tick for tick in _TENTHS if norm.vmin <= tick <= norm.vmax]
    bar.ax.set_yticks(ticks, list(map(style.number, ticks)))
    bar.ax.minorticks_off()
    style.note(figure, f"Bound: mean largest singular value. {_AMPLIFICATION}")
    style.save(figure, path)


def _short(gain: float) -> str:
    """At most four characters where that is possible."""
    return f"{gain:.0f}" if gain >= 10 else f"{gain:.2g}"


def corrupted(found: Found, path: pathlib.Path) -> None:
    """Reliability, and accuracy against severity: the mean of all corruptions, and each."""
    first = first_of(found)
    names, severities = list(first["by_severity"]), first["severities"]
    figure, axes = style.grid_of(2 + len(names), 2.1, 2.5, 4)
    handles, lowest = {}, 100.0
    for method, seeds in found.items():
        color, marker = style.mark_of(method)
        runs = list(seeds.values())
        means = [100 * np.array([one["reliability"][k] for one in runs], float)
                 for k in ("confidence", "accuracy")]  # fmt: skip
        # Bins without examples in some seed: the mean of the others.
        filled = np.isfinite(means[0]).any(axis=0)
        confidence, accuracy = (np.nanmean(values[:, filled], axis=0) for values in means)
        (handles[method],) = axes.flat[0].plot(confidence, accuracy, marker, linestyle="-",
                                               color=color, markersize=3)  # fmt: skip
        percent = 100 * np.array([[one["by_severity"][n] for n in names] for one in runs])
        _curve(axes.flat[1], severities, percent.mean(axis=1), method)
        for i in range(len(names)):
            _curve(axes.flat[2 + i], severities, percent[:, i], method)
        lowest = min(lowest, percent.mean(axis=0).min())
    axes.flat[0].plot([0, 100], [0, 100], color=style.GREY, linewidth=0.8)
    axes.flat[0].set(title="reliability", xlabel="confidence %", ylabel="accuracy %",
                     xlim=(0, 100), ylim=(0, 100))  # fmt: skip
    for i, name in enumerate(["all corruptions", *names], 1):
        axis = axes.flat[i]
        axis.set(title=name.replace("_", " "), xlabel="severity")
        axis.set_xticks(severities)
        style.per_cent(axis, lowest, label="accuracy %" if i % 4 == 0 else "")
    style.legend(figure, handles)
    style.save(figure, path)


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
    figure, axes = style.grid_of(len(curves), 2.3, 2.9, 4, sharey=True, sharex=True)
    first = next(iter(curves))
    for axis, (method, (density, error)) in zip(axes.flat, curves.items(), strict=False):
        if method != first:
            (behind,) = axis.plot(grid, curves[first][0], color=style.GREY, linewidth=0.9)
        color = style.mark_of(method)[0]
        axis.plot(grid, density, color=color)
        axis.fill_between(
            grid, np.maximum(density - error, _FLOOR), density + error,
            color=color, alpha=0.2, linewidth=0,
        )  # fmt: skip
        style.zero_line(axis, side="x")
        style.log(axis)
        axis.set(ylim=(_FLOOR, top), xlim=(low, high), xlabel="Hessian eigenvalue")
        ticks = _ticks(low, high, linear)
        axis.set_xticks(np.arcsinh(ticks / linear), list(map(style.number, ticks)))
        axis.set_title(method, color=color)
    for axis in axes[:, 0]:
        axis.set_ylabel("density")
    if len(curves) > 1:
        style.legend(figure, {f"{first}, for comparison": behind})
    style.note(figure, _SPECTRUM)
    style.save(figure, path)


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


def over_seeds(found: Found) -> pd.DataFrame:
    """Means and standard errors of every measure and method, as `paired.compare` gives them."""
    return paired.compare(measured_tables.values_of(found), "", tested=())


def first_of(found: Found) -> Mapping[str, Any]:
    """What was measured of the first method's first seed."""
    return next(iter(next(iter(found.values())).values()))


def estimates(compared: pd.DataFrame, measure: str, methods: Sequence[str]) -> np.ndarray:
    """Means and standard errors of a measure, [2, methods]; NaN where there are none."""
    return tables.of_measure(compared, measure, methods)[["mean", "se"]].to_numpy(float).T


def _band(axis, mean: np.ndarray, error: np.ndarray):
    (mean,), (error,) = mean, np.nan_to_num(error)
    axis.axhspan(mean - error, mean + error, color=style.INK, alpha=0.12, linewidth=0)
    return axis.axhline(mean, color=style.INK, linewidth=1)


def _curve(axis, steps, runs: np.ndarray, method: str) -> float:
    """Mean over runs [runs, steps] with its standard error as a band; its last value."""
    mean, error = np.array([paired.estimate(column) for column in runs.T]).T
    color, marker = style.mark_of(method)
    axis.plot(steps, mean, color=color, marker=marker if len(steps) < 8 else "", markersize=3)
    if len(runs) > 1:
        axis.fill_between(steps, mean - error, mean + error, color=color, alpha=0.13, linewidth=0)
    return float(mean[-1])
