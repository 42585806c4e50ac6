"""Every figure, drawn from made-up runs: no text overlaps another or leaves the canvas.

Also: one look a method, colours that colour-blind readers tell apart, words instead of noise.
"""

import itertools
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from experiments.reporting import (
    class_figures,
    figures,
    frame,
    measured_figures,
    paired,
    style,
    tables,
)
from tests.helpers.drawn_texts import problems

LONG = "manifold_mixup@input|hidden1|hidden2|hidden3"
FEW = ("erm", "lpl", "lpa", "lpa+lpl")
MANY = (*FEW, LONG, "a$b^$_{", "<b>x</b>", *(f"method_{i}" for i in range(13)))
LAYERS = ("input", "stage3", "logits")
EFFECTS = ("loss_change/positive", "loss_change/negative", "norm_ratio/positive", "radius/positive")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def checked(monkeypatch, tmp_path):
    """A path to draw to. A figure is drawn once, to check it; the file holds its texts alone."""
    seen = []

    def check(figure, path):
        complaints = problems(figure)
        assert not complaints, complaints
        seen.append(path)
        path.write_text(" ".join(text.get_text() for text in figure.findobj(Text)))
        plt.close(figure)

    monkeypatch.setattr(style, "write_figure", check)
    yield tmp_path / "figure.svg"
    assert seen


def results(methods, rng, classes=10, epochs=20):
    """Three seeds a method with curves, effects and accuracies of classes."""
    counts = [int(400 * 0.01 ** (c / max(classes - 1, 1))) for c in range(classes)]

    def run(seed, level):
        curve = [
            {"epoch": e, "train/loss": np.exp(-e / 4), "evaluation/accuracy": level * e / epochs}
            | {f"effect/hidden1/{name}": 1.0 if "norm" in name else level * e for name in EFFECTS}
            for e in range(1, epochs + 1)
        ]  # fmt: skip
        return {
            "seed": seed, "accuracy": level, "train_counts": counts, "curve": curve,
            "per_class_accuracy": list(np.linspace(1, level / 2, classes)), "seconds": 1.0,
            "group_accuracy": {"many": 0.99, "medium": level, "few": level / 2},
        }  # fmt: skip

    levels = np.linspace(0.8, 0.82, len(methods))  # close, so that labels have to be moved apart
    return {
        method: [run(seed, level + rng.normal(0, 0.001)) for seed in range(3)]
        for method, level in zip(methods, levels, strict=True)
    }


@pytest.mark.parametrize(("methods", "classes"), [(FEW, 100), (MANY, 10)], ids=["few", "many"])
def test_figures_of_a_comparison(methods, classes, rng, checked):
    found = results(methods, rng, classes)
    values, _ = frame.values_of(frame.tidy(found))
    compared = paired.compare(values, "erm", tested=("accuracy",))
    tested = tables.accuracies(compared).query("pairs > 0")
    assert figures.accuracy(compared, checked)
    assert figures.differences(tested, "difference to erm", checked)
    assert figures.per_class_accuracy(found, checked)
    assert figures.training_curves(found, checked, "test")
    assert figures.effect_curves(found, checked)
    assert "no change above" in checked.read_text().replace("\n", " "), "a ratio of 1 is no curve"


def test_panels_of_domains_say_so(rng, checked):
    values, _ = frame.values_of(frame.tidy(results(FEW, rng)))
    compared = paired.compare(values, "erm", tested=("accuracy",))
    names = {"many": "15", "medium": "art_painting", "few": "+90%"}
    assert figures.accuracy(compared.replace({"measure": names}), checked)
    drawn = checked.read_text()
    assert all(f"test {name}" in drawn for name in names.values()), drawn
    assert "all domains" in drawn and "all classes" not in drawn


def test_figures_over_layers_and_of_classes(rng, checked):
    names = ("norm_ratio", "loss_change", "sign", "delta_norm")
    measures = [f"{m} {s}" for m in names[:2] for s in ("positive", "negative")]

    def one():
        values = {f"{form} at {layer}: {m}": rng.normal() for form in ("signed", "free")
                  for layer in LAYERS for m in (*measures, "correlation")}  # fmt: skip
        classes = {layer: {n: 1 + 0.1 * rng.normal(size=10) for n in names} for layer in LAYERS}
        forms = dict.fromkeys(("signed", "free"), classes)
        return {"values": values, "layers": LAYERS, "classes": forms}

    class_figures.every_form({m: {0: one(), 1: one()} for m in FEW[1:3]}, checked)
    drawn = {path.name for path in checked.parent.iterdir()}
    assert drawn == {"figure.svg", "figure_signed.svg", "figure_free_classes.svg",
                     "figure_signed_classes.svg"}  # fmt: skip
    logged = [
        {"epoch": e} | {f"classes/stage3/{n}": rng.normal(size=10) for n in (*names, "radius")}
        for e in (2, 4)
    ]  # fmt: skip
    runs = [{"seed": s, "train_counts": range(10, 0, -1), "curve": logged} for s in (0, 1)]
    assert class_figures.over_epochs(dict.fromkeys(FEW[:2], runs), checked)
    placed = {m: {layer: f"{m}@{layer}" for layer in LAYERS} for m in ("lpa", "adversarial")}
    swept = [*measures, "accuracy", "correlation of loss and norm"]
    swept += [f"{m} {r}" for m in ("agreement", "error_consistency", "cka")
              for r in ("input", "logits", "erm")]  # fmt: skip
    rows = [
        {"measure": m, "method": name, "mean": rng.uniform(), "se": 0.01, "baseline": "erm"}
        for m in swept for name in ("erm", *(n for at in placed.values() for n in at.values()))
    ]  # fmt: skip
    class_figures.swept(pd.DataFrame(rows), placed, checked)
    measured_figures.layer_sweep(pd.DataFrame(rows), placed, checked)


ONE = pytest.param(("erm",), id="one", marks=pytest.mark.slow)


@pytest.mark.parametrize("methods", [ONE, pytest.param(FEW, id="four")])
def test_figures_of_what_was_measured(methods, rng, checked):
    steps = [-1.0, -0.5, 0.0, 0.5, 1.0]

    def line(scale):
        return {"steps": steps, "losses": [[scale * (0.01 + s * s) for s in steps]] * 2}

    def spectrum(scale):
        return {"values": {"largest": scale}, "nodes": [[-0.1, 0.0, scale]] * 2,
                "weights": [[0.1, 0.8, 0.1]] * 2}  # fmt: skip

    def gains():
        table = np.triu(rng.uniform(0.01, 90, (3, 3)), 1)
        probes = ("lpa", "adversarial", "random", "bound")
        return {"layers": LAYERS, "maps": dict.fromkeys(probes, np.where(table, table, np.nan))}

    def calibration():
        bins = np.linspace(0.05, 0.95, 10)
        accuracies = {name: [0.9, 0.5, 0.2] for name in ("gaussian_noise", "pixelate")}
        reliability = {"confidence": bins, "accuracy": bins**2}
        return {"reliability": reliability, "severities": [1, 3, 5], "by_severity": accuracies}

    def flat(scale):
        names = ("loss", "lambda1", "trace", "normalized worst case", "hidden3 worst case")
        return {"values": {name: scale * rng.uniform(1, 2) for name in names}}

    scales = [10.0**i for i in range(len(methods))]
    drawn = (
        (measured_figures.lines, line), (measured_figures.spectra, spectrum),
        (measured_figures.amplification, lambda _: gains()), (measured_figures.flatness, flat),
        (measured_figures.corrupted, lambda _: calibration()),
        (measured_figures.planes, lambda scale: {"steps": steps, "losses": [
            [scale * (0.01 + a * a + b * b) for b in steps] for a in steps]}),
    )  # fmt: skip
    for draw, make in drawn:
        found = {m: {0: make(s), 1: make(s)} for m, s in zip(methods, scales, strict=True)}
        checked.unlink(missing_ok=True)
        draw(found, checked)
        text = checked.read_text()
        if draw is not measured_figures.corrupted:
            assert re.search(r"refute|only\sif", text), "how to read it"


def test_a_method_looks_the_same_in_every_figure_and_at_most_seven_stand_out():
    assert style.marks(FEW)["lpa"] == style.marks(MANY[::-1])["lpa"]
    looks = [style.mark_of(method) for method in (*FEW, *style._OTHERS)]
    assert len(set(looks)) == len(looks)
    marks = style.marks(MANY)
    assert sum(mark["color"] != style.PALE for mark in marks.values()) == 7
    assert all(marks[method]["color"] != style.PALE for method in FEW)


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
BLINDNESS = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
               [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
               [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
               [0.004733, 0.691367, 0.303900]],
    "none": np.eye(3),
}  # fmt: skip


def lab(color, matrix):
    """CIE L*a*b* (D65) of a colour as a reader with that matrix sees it."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(matrix) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x = np.array(to_xyz) @ seen / [0.9505, 1.0, 1.089]
    f = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("kind", BLINDNESS)
def test_colour_blind_readers_tell_the_palette_apart(kind):
    seen = {color: lab(color, BLINDNESS[kind]) for color in style.PALETTE}
    apart = {pair: np.linalg.norm(seen[pair[0]] - seen[pair[1]])
             for pair in itertools.combinations(seen, 2)}  # fmt: skip
    assert min(apart.values()) > 11, min(apart, key=apart.get)
    assert max(color[0] for color in seen.values()) < 80, "visible on white"
