"""Figures of what perturbations do to classes: over layers, over epochs, class by class."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from experiments.reporting.figures import COLORS, DASHES, curve_of
from experiments.reporting.frame import Results
from experiments.reporting.measured_figures import (
    color_of,
    estimates,
    first_of,
    over_seeds,
    panels,
    save,
)
from experiments.reporting.measured_tables import Found
from lpa_jax import diagnostics

# Name of a measure in files, its label, and where a perturbation changes nothing.
MEASURES = {
    "norm_ratio": ("norm ratio", 1.0),
    "loss_change": ("loss change", 0.0),
    "cosine": ("cosine to the class mean", 0.0),
    "radius": ("radius used", None),
}
_SIGNS = ((1, "positive", COLORS[4], "^"), (-1, "negative", COLORS[5], "v"),
          (0, "neutral", "#999999", "o"))  # fmt: skip
# Loss changes within this are drawn on a line, beyond it by their logarithm.
_LINEAR_LOSS = 1e-3


def every_form(found: Found, path: pathlib.Path) -> None:
    """The figure over layers, and beside it, NAME_FORM.png, one a form of LPA with its classes."""
    over_layers(found, path)
    for form in first_of(found)["classes"]:
        by_class(found, form, path.with_name(f"{path.stem}_{form}{path.suffix}"))


def over_layers(found: Found, path: pathlib.Path) -> None:
    """Norm ratio and loss change of each sign group, and their correlation, over layers.

    One row for each form of LPA; means and standard errors over seeds of every method.
    """
    compared, methods = over_seeds(found), list(found)
    first = first_of(found)
    layers, forms = first["layers"], list(first["classes"])
    columns = {
        f"{name} {sign}": f"{MEASURES[name][0]}, {sign} classes"
        for name in ("norm_ratio", "loss_change", "cosine")
        for sign in ("positive", "negative")
    } | {"correlation": "correlation of the two over classes"}
    figure, axes = panels(len(forms), len(columns), 2.8)
    for row, form in zip(axes, forms, strict=True):
        for axis, (measure, label) in zip(row, columns.items(), strict=True):
            series = [
                estimates(compared, f"{form} at {layer}: {measure}", methods) for layer in layers
            ]
            for i, method in enumerate(methods):
                means, errors = np.array(series)[:, :, i].T
                axis.errorbar(
                    np.arange(len(layers)) + 0.04 * (i - len(methods) / 2), means,
                    np.nan_to_num(errors), label=method, color=color_of(methods, method),
                    linestyle=DASHES[i // len(COLORS) % len(DASHES)], marker=".", linewidth=1.2,
                )  # fmt: skip
            axis.axhline(1.0 if "norm" in measure else 0.0, color="#666666", linewidth=0.8)
            if "loss" in measure:
                _log_of_losses(axis)
            if measure == "correlation":
                axis.set_ylim(-1.05, 1.05)
            axis.set_xticks(range(len(layers)), layers, rotation=40, ha="right", fontsize=8)
            axis.set_title(f"{form}: {label}", fontsize=8)
            axis.grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    save(figure, path)


def _log_of_losses(axis) -> None:
    low, high = axis.dataLim.intervaly
    # On a logarithmic axis a margin is a factor; a side without data ends at zero.
    axis.set_ylim(1.5 * min(low, 0.0), 1.5 * max(high, 0.0))
    axis.set_yscale("symlog", linthresh=_LINEAR_LOSS)
    axis.tick_params(axis="y", labelsize=8)


def by_class(found: Found, form: str, path: pathlib.Path) -> None:
    """Loss change against norm ratio, a point a class and seed, a panel a method and layer."""
    layers = first_of(found)["layers"]
    figure, axes = panels(len(found), len(layers), 2.2, width=2.6)
    for row, (method, seeds) in zip(axes, found.items(), strict=True):
        for axis, layer in zip(row, layers, strict=True):
            classes = {
                name: np.array([one["classes"][form][layer][name] for one in seeds.values()], float)
                for name in ("norm_ratio", "loss_change", "sign")
            }
            for sign, label, color, marker in _SIGNS:
                chosen = np.sign(np.nan_to_num(classes["sign"])) == sign
                axis.plot(
                    classes["norm_ratio"][chosen], classes["loss_change"][chosen], marker,
                    color=color, markersize=4, alpha=0.7, label=label if chosen.any() else None,
                )  # fmt: skip
            axis.axvline(1, color="#666666", linewidth=0.8)
            axis.axhline(0, color="#666666", linewidth=0.8)
            axis.set_title(f"{method}, {layer}", fontsize=9)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel(f"norm ratio ({form})", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("loss change")
    axes[0, 0].legend(fontsize=8)
    save(figure, path)


def swept(
    compared: pd.DataFrame, placed: Mapping[str, Mapping[str, str]], path: pathlib.Path
) -> None:
    """Norm ratio and loss change of each sign group, and their correlation, by injection point.

    Args:
      compared: of `paired.compare`, of a layer sweep, by placed method.
      placed: method -> layer -> name of the placed method.
      path: of the figure: a row of panels a method, means and standard errors over seeds.
    """
    columns = {
        "norm ratio": {f"norm_ratio {sign}": sign for _, sign, *_ in _SIGNS},
        "loss change": {f"loss_change {sign}": sign for _, sign, *_ in _SIGNS},
    }
    correlation = "correlation of loss and norm"
    swept_names = [name for at in placed.values() for name in at.values()]
    if np.isfinite(estimates(compared, correlation, swept_names)).any():
        columns["correlation over classes"] = {correlation: "all"}  # some run logged its classes
    styles = {sign: (color, marker) for _, sign, color, marker in _SIGNS} | {
        "all": ("#000000", ".")
    }
    figure, axes = panels(len(placed), len(columns), 2.6)
    for row, (method, at) in zip(axes, placed.items(), strict=True):
        for axis, (label, series) in zip(row, columns.items(), strict=True):
            for measure, sign in series.items():
                means, errors = estimates(compared, measure, list(at.values()))
                if np.isfinite(means).any():
                    color, marker = styles[sign]
                    axis.errorbar(range(len(at)), means, np.nan_to_num(errors), label=sign,
                                  color=color, marker=marker, capsize=3)  # fmt: skip
            axis.axhline(1.0 if label == "norm ratio" else 0.0, color="#666666", linewidth=0.8)
            axis.set_xticks(range(len(at)), list(at), rotation=30, ha="right", fontsize=8)
            axis.set_title(f"{method}: {label}", fontsize=9)
            axis.grid(alpha=0.3)
            if correlation in series:
                axis.set_ylim(-1.05, 1.05)
        if row[0].lines[1:]:
            row[0].legend(fontsize=8)
    save(figure, path)


def over_epochs(results: Results, path: pathlib.Path) -> bool:
    """What each method's own perturbations did to every class over the epochs of training.

    A row a method and perturbed layer: norm ratio, loss change, cosine and radius by class, means
    over seeds, frequent classes dark and rare ones light; and the correlation of loss change and
    norm ratio over classes with its standard error. False if no run logged any.
    """
    rows = [(method, layer) for method, runs in results.items() for layer in _logged_layers(runs)]
    if not rows:
        return False
    figure, axes = panels(len(rows), len(MEASURES) + 1, 2.3, width=2.9)
    for row, (method, layer) in zip(axes, rows, strict=True):
        runs = results[method]
        counts = np.mean([run["train_counts"] for run in runs], axis=0)
        rank = np.argsort(np.argsort(-counts, kind="stable"), kind="stable")
        colors = plt.get_cmap("viridis")(0.92 * rank / max(len(counts) - 1, 1))
        for axis, (name, (label, still)) in zip(row, MEASURES.items(), strict=False):
            epochs, values = curve_of(runs, f"classes/{layer}/{name}")
            for c, color in enumerate(colors):
                axis.plot(epochs, _mean_known(values[:, :, c]), color=color, linewidth=1.2,
                          marker="." if len(epochs) == 1 else "")  # fmt: skip
            if still is not None:
                axis.axhline(still, color="#666666", linewidth=0.8)
            axis.set_title(f"{method}, {layer}: {label}", fontsize=8)
        _correlation_over_epochs(row[-1], runs, layer)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("epoch", fontsize=8)
    ends = [plt.Line2D([], [], color=plt.get_cmap("viridis")(x)) for x in (0.0, 0.92)]
    figure.legend(ends, ["most frequent class", "rarest class"], loc="outside upper right",
                  ncols=2, frameon=False, fontsize=8)  # fmt: skip
    save(figure, path)
    return True


def _logged_layers(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Layers whose class geometry all runs of a method logged."""
    logged = [
        {name.split("/")[1] for row in run.get("curve", ()) for name in row
         if name.startswith("classes/")}
        for run in runs
    ]  # fmt: skip
    common = set.intersection(*logged) if logged else set()
    return sorted(layer for layer in common if curve_of(runs, f"classes/{layer}/norm_ratio"))


def _correlation_over_epochs(axis, runs, layer: str) -> None:
    names = ("norm_ratio", "loss_change", "sign", "delta_norm")
    tables = {name: curve_of(runs, f"classes/{layer}/{name}") for name in names}
    epochs = tables["norm_ratio"][0]
    found = np.full((len(runs), len(epochs)), np.nan)
    for index in np.ndindex(found.shape):
        geometry = {name: values[index] for name, (_, values) in tables.items()}
        if (np.nan_to_num(geometry["delta_norm"]) > 0).sum() > 1:
            found[index] = diagnostics.agreement(geometry).correlation
    mean = _mean_known(found)
    axis.plot(epochs, mean, color=COLORS[5], marker="." if len(epochs) == 1 else "")
    if len(runs) > 1:
        known = np.ma.masked_invalid(found)
        error = known.std(axis=0, ddof=1) / np.sqrt(known.count(axis=0))
        axis.fill_between(epochs, mean - error, mean + error, color=COLORS[5], alpha=0.15)
    axis.axhline(0, color="#666666", linewidth=0.8)
    axis.set_ylim(-1.05, 1.05)
    axis.set_title("correlation of loss change and norm ratio", fontsize=8)


def _mean_known(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is not NaN; NaN where nothing is known."""
    return np.ma.masked_invalid(values).mean(axis=0).filled(np.nan)
