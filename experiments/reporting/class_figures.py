"""Figures of what perturbations do to classes: over layers, over epochs, class by class."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from experiments.reporting import style
from experiments.reporting.figures import curve_of
from experiments.reporting.frame import Results
from experiments.reporting.measured_figures import estimates, first_of, over_seeds
from experiments.reporting.measured_tables import Found
from lpa_jax import diagnostics

# Logged measures of a class, with their labels and the value where a perturbation changes nothing.
MEASURES = {
    "norm_ratio": ("norm ratio", 1.0),
    "loss_change": ("loss change, nats", 0.0),
    "radius": ("radius used", None),
}
# Loss changes within this are drawn on a line, beyond it by their logarithm.
_LINEAR_LOSS = 1e-3
_FORMS = {"signed": "within the half-space that keeps its sign", "free": "without a half-space"}
_GEOMETRY = (
    "Norm ratio above 1: the perturbation moves the activations of a class outward. If expansive "
    "means harder, ratios are above 1 where the loss rises (positive classes) and below 1 where it "
    "falls, and the correlation over classes is near 1. Correlations near 0 or below refute it."
)


def every_form(found: Found, path: pathlib.Path) -> None:
    """A figure over layers for each form of LPA's perturbation, and one of its single classes.

    The first is PATH; the others are beside it, NAME_FORM and NAME_FORM_classes.
    """
    for number, form in enumerate(_forms(found)):
        of_form = path if not number else path.with_name(f"{path.stem}_{form}{path.suffix}")
        over_layers(found, of_form, form)
        by_class(found, form, path.with_name(f"{path.stem}_{form}_classes{path.suffix}"))


def _forms(found: Found) -> list[str]:
    """The forms measured, the one that answers the question first: it is free to shrink or grow."""
    return sorted(first_of(found)["classes"], key=lambda form: form != "free")


def over_layers(found: Found, path: pathlib.Path, form: str | None = None) -> None:
    """Four panels over layers: norm ratio of both signs, loss change by sign, their correlation.

    Args:
      found: measurements of `geometry`.
      path: of the figure: means and standard errors over seeds of every method.
      form: of the perturbation; None takes the one without a half-space.
    """
    compared, layers = over_seeds(found), first_of(found)["layers"]
    form = form or _forms(found)[0]
    means = {m: np.mean([one["values"].get("accuracy", np.nan) for one in found[m].values()])
             for m in found}  # fmt: skip
    marks = style.marks(style.by_result(means))
    figure, axes = style.panels(2, 2, 2.5, 3.6, sharex=True)
    panels = [
        ("norm ratio, positive classes", ["norm_ratio positive"], 1.0),
        ("norm ratio, negative classes", ["norm_ratio negative"], 1.0),
        ("loss change, nats: positive above 0, negative below",
         ["loss_change positive", "loss_change negative"], 0.0),
        ("correlation of the two over classes", ["correlation"], 0.0),
    ]  # fmt: skip
    handles = {}
    for axis, (title, measures, still) in zip(axes.flat, panels, strict=True):
        for i, (method, mark) in enumerate(marks.items()):
            shift = 0.03 * (i - len(marks) / 2)
            for measure in measures:
                series = [estimates(compared, f"{form} at {x}: {measure}", [method])[:, 0]
                          for x in layers]  # fmt: skip
                mean, error = np.array(series).T
                handles[method] = axis.errorbar(np.arange(len(layers)) + shift, mean,
                                                np.nan_to_num(error), **mark)  # fmt: skip
        style.zero_line(axis, still)
        axis.set_title(title)
        style.ticks(axis, layers)
        if len(measures) > 1:
            _log_of_losses(axis)
        elif measures == ["correlation"]:
            axis.set_ylim(-1.08, 1.08)
    bold = style.highlighted(list(marks))
    style.legend(figure, {m: h for m, h in handles.items() if m in bold})
    style.note(figure, f"LPA's perturbation, {_FORMS.get(form, form)}. {_GEOMETRY}")
    style.save(figure, path)


def _log_of_losses(axis) -> None:
    low, high = axis.dataLim.intervaly
    # On a logarithmic axis a margin is a factor; a side without data ends at zero.
    axis.set_ylim(1.5 * min(low, 0.0), 1.5 * max(high, 0.0))
    style.log(axis, linthresh=_LINEAR_LOSS)


def by_class(found: Found, form: str, path: pathlib.Path) -> None:
    """Loss change against norm ratio, a point a class and seed, a panel a method and layer."""
    layers = first_of(found)["layers"]
    figure, axes = style.panels(len(found), len(layers), 1.8, 2.0, sharey=True, sharex="col")
    handles = {}
    for row, seeds in zip(axes, found.values(), strict=True):
        for axis, layer in zip(row, layers, strict=True):
            classes = {
                name: np.array([one["classes"][form][layer][name] for one in seeds.values()], float)
                for name in ("norm_ratio", "loss_change", "sign")
            }
            for sign, (color, marker) in style.SIGNS.items():
                number = {"positive": 1, "negative": -1, "neutral": 0}[sign]
                chosen = np.sign(np.nan_to_num(classes["sign"])) == number
                chosen &= np.isfinite(classes["norm_ratio"])
                if chosen.any():
                    (handles[sign],) = axis.plot(
                        classes["norm_ratio"][chosen], classes["loss_change"][chosen], marker,
                        color=color, markersize=4, alpha=0.7, linestyle="",
                    )  # fmt: skip
            style.zero_line(axis, 1.0, "x")
            style.zero_line(axis)
            style.log(axis, linthresh=_LINEAR_LOSS)
            style.plain(axis, "x", 3)
    for axis, layer in zip(axes[0], layers, strict=True):
        axis.set_title(layer)
    for axis, method in zip(axes[:, 0], found, strict=True):
        axis.set_ylabel(f"{method}\nloss change, nats")
    for axis in axes[-1]:
        axis.set_xlabel("norm ratio")
    style.legend(figure, {f"{sign} classes": handle for sign, handle in handles.items()})
    style.save(figure, path)


def swept(
    compared: pd.DataFrame, placed: Mapping[str, Mapping[str, str]], path: pathlib.Path
) -> None:
    """Norm ratio and loss change of each sign group, and their correlation, by injection point.

    Args:
      compared: of `paired.compare`, of a layer sweep, by placed method.
      placed: method -> layer -> name of the placed method.
      path: of the figure: a row of panels a method, means and standard errors over seeds.
    """
    panels = {
        "norm ratio": {f"norm_ratio {sign}": sign for sign in style.SIGNS},
        "loss change, nats": {f"loss_change {sign}": sign for sign in style.SIGNS},
    }
    correlation = "correlation of loss and norm"
    names = [name for at in placed.values() for name in at.values()]
    if np.isfinite(estimates(compared, correlation, names)).any():
        panels["correlation over classes"] = {correlation: "all"}  # runs logged classes
    figure, axes = style.panels(len(placed), len(panels), 2.4, 3.1, sharex="col")
    handles = {}
    for row, (method, at) in zip(axes, placed.items(), strict=True):
        for axis, (label, series) in zip(row, panels.items(), strict=True):
            for measure, sign in series.items():
                means, errors = estimates(compared, measure, list(at.values()))
                if np.isfinite(means).any():
                    color, marker = style.SIGNS.get(sign, (style.INK, "o"))
                    drawn = axis.errorbar(range(len(at)), means, np.nan_to_num(errors),
                                          color=color, marker=marker)  # fmt: skip
                    if sign != "all":
                        handles[f"{sign} classes"] = drawn
            style.zero_line(axis, 1.0 if label == "norm ratio" else 0.0)
            style.ticks(axis, list(at))
            axis.set_title(label)
            if correlation in series:
                axis.set_ylim(-1.08, 1.08)
            elif "loss" in label:
                _log_of_losses(axis)
        row[0].set_ylabel(method)
    style.legend(figure, handles)
    style.save(figure, path)


def over_epochs(results: Results, path: pathlib.Path) -> bool:
    """What each method's own perturbations did to every class over the epochs of training.

    A row a method and perturbed layer: norm ratio, loss change and radius by class, means
    over seeds, frequent classes dark and rare ones light; and the correlation of loss change and
    norm ratio over classes with its standard error. False if no run logged any.
    """
    rows = [(method, layer) for method, runs in results.items() for layer in _logged_layers(runs)]
    if not rows:
        return False
    figure, axes = style.panels(len(rows), len(MEASURES) + 1, 1.9, 2.7, sharex=True)
    for row, (method, layer) in zip(axes, rows, strict=True):
        runs = results[method]
        counts = np.mean([run["train_counts"] for run in runs], axis=0)
        rank = np.argsort(np.argsort(-counts, kind="stable"), kind="stable")
        colors = plt.get_cmap("viridis")(0.92 * rank / max(len(counts) - 1, 1))
        for axis, (name, (_, still)) in zip(row, MEASURES.items(), strict=False):
            epochs, values = curve_of(runs, f"classes/{layer}/{name}")
            for c, color in enumerate(colors):
                axis.plot(epochs, _mean_known(values[:, :, c]), color=color, linewidth=1.2,
                          marker="." if len(epochs) == 1 else "")  # fmt: skip
            if still is not None:
                style.zero_line(axis, still)
            style.epochs(axis, epochs[-1])
            style.plain(axis)
        _correlation_over_epochs(row[-1], runs, layer)
        style.epochs(row[-1], epochs[-1])
        row[0].set_ylabel(f"{method}\n{layer}")
    for axis, (label, _) in zip(axes[0], MEASURES.values(), strict=False):
        axis.set_title(label)
    axes[0, -1].set_title("correlation over classes")
    for axis in axes[:-1].flat:
        axis.set_xlabel("")
    lines = [plt.Line2D([], [], color=plt.get_cmap("viridis")(x)) for x in (0.0, 0.92)]
    ends = ("most frequent class", "rarest class")
    style.legend(figure, dict(zip(ends, lines, strict=True)))
    style.save(figure, path)
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
    axis.plot(epochs, mean, color=style.BLUE, marker="." if len(epochs) == 1 else "")
    if len(runs) > 1:
        known = np.ma.masked_invalid(found)
        error = known.std(axis=0, ddof=1) / np.sqrt(known.count(axis=0))
        axis.fill_between(epochs, mean - error, mean + error, color=style.BLUE, alpha=0.15)
    style.zero_line(axis)
    axis.set_ylim(-1.08, 1.08)


def _mean_known(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is not NaN; NaN where nothing is known."""
    return np.ma.masked_invalid(values).mean(axis=0).filled(np.nan)
