"""The figure of Hessian spectra: `landscape --parts=spectrum`."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.reporting.figures import COLORS
from experiments.reporting.measure_plots import Found, panels, save
from lpa_jax.diagnostics import SpectralQuadrature

_COLUMNS = 4
_POINTS = 600
# Of the Gaussians, in units of asinh(lambda / linear): a factor of 1.3 far from zero.
_WIDTH = 0.25
# Below this, densities are those of the Gaussians' tails.
_FLOOR = 1e-8


def spectra(found: Found, path: pathlib.Path) -> None:
    r"""Log density of the eigenvalues, a panel a method, the first method's behind the others.

    Eigenvalues of methods differ by orders of magnitude and most of them are near zero, so they are
    shown by u = asinh(lambda / linear), which is lambda within `linear` and its logarithm beyond;
    the density is that of u. Bands are standard errors over seeds, over probes with a single seed.
    Lanczos from few steps puts nodes far apart near zero: gaps there say nothing.
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
    columns = min(_COLUMNS, len(curves))
    figure, axes = panels(-(-len(curves) // columns), columns, 2.6, sharey=True)
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
    for axis in axes.flat[len(curves) :]:
        axis.set_visible(False)
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
