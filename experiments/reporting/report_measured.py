"""Figures of what `landscape` measured of the runs of a report, where it left anything."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from experiments.reporting import geometry_plots, measure_plots, spectrum_plots
from experiments.reporting.measure_plots import Found
from experiments.reporting.runs import Setting
from experiments.runtime import files
from experiments.training.folder import MEASURED

# Measurement -> caption, what draws it, and what it has to hold for that.
FIGURES: dict[str, tuple[str, Callable[[Found, pathlib.Path], None], tuple[str, ...]]] = {
    "geometry": (
        "geometry: what LPA's perturbation, the same for all models, does to norm and loss at "
        "every layer",
        geometry_plots.over_layers,
        ("layers", "classes"),
    ),
    "amplification": (
        "amplification: mean gain of a perturbation injected at a row's layer, at a column's",
        measure_plots.amplification,
        ("layers", "maps"),
    ),
    "spectrum": (
        "density of the eigenvalues of the loss's Hessian in the weights",
        spectrum_plots.spectra,
        ("nodes", "weights"),
    ),
    "line": (
        "loss along random filter-normalised directions",
        measure_plots.lines,
        ("steps", "losses"),
    ),
}


def figures(setting: Setting, output: pathlib.Path, slug: str) -> list[tuple[str, pathlib.Path]]:
    """(caption, file) of every figure that can be drawn."""
    made = []
    for name, (caption, draw, needed) in FIGURES.items():
        found = measured(setting, name, needed)
        if found:
            path = output / "figures" / f"{slug}_{name}.png"
            draw(found, path)
            made.append((caption, path))
    return made


def measured(setting: Setting, name: str, needed: tuple[str, ...]) -> Found:
    """What stands beside the runs, by method and seed; all measured with the same settings.

    Of several settings that of most runs counts; what is cut short or of an earlier form does not.
    """
    by_settings: dict[str, dict[str, dict[int, Mapping[str, Any]]]] = {}
    for method, runs in setting.runs.items():
        for run in runs:
            content = files.read_json(run.folder / MEASURED / f"{name}.json")
            found = content.get("measured") if isinstance(content, dict) else None
            if isinstance(found, dict) and {"values", *needed} <= set(found):
                one = by_settings.setdefault(repr(content.get("settings")), {})
                one.setdefault(method, {})[run.config["seed"]] = found
    counted = sorted(by_settings.values(), key=lambda one: -sum(map(len, one.values())))
    return counted[0] if counted else {}
