"""Draw the figures of the README and of the pages in results/, from committed tables alone.

    python docs/figures/make.py

Every number is read from results/. Run this again when a table there changes.
"""

import pathlib
import sys

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

FIGURES = pathlib.Path(__file__).parent
sys.path.insert(0, str(FIGURES.parents[1]))
from experiments.reporting import style  # noqa: E402

RESULTS = FIGURES.parents[1] / "results"
BLUE, ORANGE, GREEN, GREY, DARK = style.BLUE, style.RED, style.GREEN, style.GREY, style.INK
NAMES = {
    "erm": "ERM", "lpl": "LPL", "lpa": "LPA", "lpa+lpl": "LPA+LPL", "sam": "SAM", "isda": "ISDA",
    "adversarial": "adversarial perturbation", "ldam_drw": "LDAM-DRW", "vrex": "V-REx",
    "manifold_mixup": "Manifold Mixup", "gaussian_noise": "Gaussian noise", "irm": "IRM",
    "mixstyle": "MixStyle", "coral": "CORAL", "coral+lpa": "CORAL+LPA", "rsc": "RSC",
    "group_dro": "GroupDRO", "logit_adjusted": "logit adjustment (LA)",
    "logit_adjusted+lpa": "LA+LPA", "logit_adjusted+lpl": "LA+LPL", "mixup": "input mixup",
    "logit_adjusted+lpa+lpl": "LA+LPA+LPL",
}  # fmt: skip


def name_of(method: str) -> str:
    """The method's name for readers."""
    return NAMES.get(method, method.replace("_", " "))


def save(figure: Figure, path: pathlib.Path) -> None:
    """Write an SVG whose letters are outlines: they look the same everywhere."""
    with mpl.rc_context({"svg.fonttype": "path"}):
        style.save(figure, path)


def idea(path: pathlib.Path) -> None:
    """The cascade from input to loss, and below it one arrow per class at one hidden layer."""
    figure = Figure((5.4, 3.3))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(-4, 108), ylim=(0, 64))
    axis.axis("off")
    stages = [("input", "augmentation"), ("hidden", "LPA"), ("hidden", "LPA"), ("logits", "LPL")]
    for i, (stage, method) in enumerate([*stages, ("loss", "")]):
        x, last = 2 + 22 * i, i == len(stages)
        box = {"boxstyle": "round,pad=0.45", "fc": "white", "ec": GREY if last else DARK}
        axis.text(x + 8, 58, stage, ha="center", va="center", fontsize=12, bbox=box)
        axis.text(x + 8, 49, method, ha="center", va="center", fontsize=10, color=GREEN)
        if not last:
            arrow = {"arrowstyle": "-|>", "color": DARK, "lw": 1.2}
            axis.annotate("", (x + 22, 58), (x + 15.5, 58), arrowprops=arrow)
    for x in (3, 105):
        axis.plot([54, x], [45, 41], color=GREEN, lw=0.8, ls=":")
    axis.add_patch(mpl.patches.Rectangle((3, 1), 102, 40, fc="#f5faf8", ec=GREEN, lw=0.8))
    axis.text(6, 36, "one learned perturbation per class", color=GREEN, fontsize=11, va="center")
    axis.plot(12, 7, "o", color=DARK, ms=4)
    axis.text(14.5, 6.5, "0", va="center")
    offsets = [(-3, 1.5), (-1, -2.2), (0.5, 2.4), (2.6, -0.8), (0.3, 0.2), (3.2, 2.0), (-2.4, -1)]
    classes = [
        (52, 24, -14, -7, BLUE, "frequent class:\ncontract, lower its loss", (57, 28)),
        (64, 11, 15, 1.6, ORANGE, "rare class:\nexpand, raise its loss", (68, 20)),
    ]
    for x, y, dx, dy, color, label, place in classes:
        few = offsets if color == BLUE else offsets[:3]
        axis.plot(
            [x + a for a, _ in few], [y + b for _, b in few], "o", color=color, ms=5, alpha=0.5
        )
        axis.plot([12, x], [7, y], color=GREY, lw=0.7, ls=(0, (2, 2)), zorder=2)
        arrow = {"arrowstyle": "-|>", "color": color, "lw": 2.6, "mutation_scale": 18}
        axis.annotate("", (x + dx, y + dy), (x, y), arrowprops=arrow)
        axis.text(*place, label, color=color, fontsize=10.5, va="center", linespacing=1.15)
    save(figure, path)


def accuracy_by_class(path: pathlib.Path) -> None:
    """Accuracy over all, frequent, medium and rare classes: ERM and the class-level methods."""
    table = pd.read_csv(RESULTS / "long_tail/mlp_40_trials/table.csv").set_index("method")
    figure = Figure((4.6, 3.0), layout="constrained")
    axis = figure.add_subplot()
    groups = {"accuracy": "all", "many": "frequent\n(>100)", "medium": "medium\n(20-100)",
              "few": "rare\n(<20)"}  # fmt: skip
    ends = {}
    for i, method in enumerate(("erm", "lpl", "lpa", "lpa+lpl")):
        row = table.loc[method]
        color, marker = style.mark_of(method)
        x = [k + 0.14 * (i - 1.5) for k in range(len(groups))]
        means = [100 * row[f"{group}_mean"] for group in groups]
        errors = [100 * row[f"{group}_se"] for group in groups]
        axis.errorbar(x, means, errors, fmt=marker, ms=6, elinewidth=1.6, color=color)
        ends[name_of(method)] = (means[-1], color)
    axis.grid(axis="x", visible=False)
    axis.set_xticks(range(len(groups)), groups.values())
    axis.set_xlabel("classes, by training images")
    axis.set_xlim(-0.4, len(groups) - 0.65)
    style.per_cent(axis, 47, label="test accuracy %")
    style.label_ends(axis, ends)
    save(figure, path)


def methods(folder: str, *tables: str) -> None:
    """FOLDER/accuracy.svg: a panel for each setting, a dot with its error for each method."""
    rows = pd.concat(pd.read_csv(RESULTS / folder / table) for table in tables)
    rows = rows[~rows.setting.str.endswith("oracle")]
    settings = sorted(rows.setting.unique(), key=lambda text: [int(n) for n in _numbers(text)])
    count = max((rows.setting == setting).sum() for setting in settings)
    figure, axes = style.grid_of(len(settings), 0.7 + 0.2 * count, 3.3, len(settings))
    for axis, setting in zip(axes.flat, settings, strict=True):
        part = rows[rows.setting == setting].sort_values("accuracy_mean").reset_index(drop=True)
        bold = style.highlighted(list(part.method[::-1]))
        for y, row in part.iterrows():
            color, marker = style.GREY, "o"
            if row.method in bold:
                color, marker = style.mark_of(row.method)
            axis.errorbar(100 * row.accuracy_mean, y, xerr=100 * row.accuracy_se, fmt=marker,
                          color=color, elinewidth=1.3)  # fmt: skip
        axis.set_yticks(part.index, [name_of(m) for m in part.method])
        style.zero_line(axis, 100 * part.accuracy_mean[part.method == "erm"].item(), "x")
        axis.grid(axis="y", visible=False)
        axis.set_title(_short(setting))
        lowest = 100 * (part.accuracy_mean - part.accuracy_se).min()
        style.per_cent(axis, lowest, "x", "accuracy % (line: ERM)")
    save(figure, RESULTS / folder / "accuracy.svg")


def layers(path: pathlib.Path) -> None:
    """The gain of LPA over ERM at every injection point, a panel a network and data set."""
    figure, axes = style.panels(2, 2, 2.1, 3.7)
    color, marker = style.mark_of("lpa")
    for axis, (folder, title) in zip(axes.flat, _FOUR.items(), strict=True):
        rows = pd.read_csv(RESULTS / "layer_sweep" / folder / "layer_sweep.csv")
        rows = rows[(rows.measure == "accuracy") & (rows.method != "erm")]
        places = [method.split("@")[1] for method in rows.method]
        axis.errorbar(range(len(places)), 100 * rows.difference, yerr=100 * rows.difference_se,
                      fmt=marker, color=color)  # fmt: skip
        style.ticks(axis, places)
        style.zero_line(axis)
        axis.set_title(title)
    for axis in axes[:, 0]:
        axis.set_ylabel("LPA - ERM, points")
    save(figure, path)


def sharpness(path: pathlib.Path) -> None:
    """Test accuracy against the largest Hessian eigenvalue, a panel a network and data set."""
    figure, axes = style.panels(2, 2, 2.5, 3.7)
    handles = {}
    for axis, (folder, title) in zip(axes.flat, _FOUR.items(), strict=True):
        flat = pd.read_csv(RESULTS / "landscape" / folder / "flatness.csv")
        right = pd.read_csv(RESULTS / "landscape" / folder / "calibration.csv")
        largest = flat[flat.measure == "lambda1"].set_index("method")["mean"]
        accuracy = right[right.measure == "accuracy"].set_index("method")
        for method, x in largest.items():
            color, marker = style.mark_of(method)
            handles[name_of(method)] = axis.errorbar(
                x, 100 * accuracy["mean"][method], 100 * accuracy["se"][method], fmt=marker,
                color=color)  # fmt: skip
        style.log(axis, "x")
        style.per_cent(axis, 100 * (accuracy["mean"] - accuracy["se"]).min(), label="")
        axis.set_title(title)
    for axis in axes[:, 0]:
        axis.set_ylabel("test accuracy %")
    for axis in axes[-1]:
        axis.set_xlabel("largest eigenvalue (flat to sharp)")
    style.legend(figure, handles)
    save(figure, path)


def radii(folder: str) -> None:
    """FOLDER/map.svg: validation accuracy over the radius, a line for each layer.

    map/runs.csv has the runs, in folders that end in `radius_R`; trials_erm_30.csv is ERM's search.
    """
    rows = pd.read_csv(RESULTS / folder / "map/runs.csv")
    places = rows.folder.str.extract(r"radius_([\d.]+)/runs/(?:lpa@)?(\w+)/")
    rows["radius"], rows["layer"] = places[0].astype(float), places[1]
    figure = Figure((4.6, 3.0), layout="constrained")
    axis = figure.add_subplot()
    layers = ("input", "stage1", "stage2", "stage3", "pool")
    marks = zip(
        layers, (style.GREEN, style.BLUE, style.RED, *style.PALETTE[5:]), "soD^v", strict=True
    )
    for layer, color, marker in marks:
        part = rows[rows.layer == layer].sort_values("radius")
        axis.plot(part.radius, 100 * part.accuracy, color=color, marker=marker)
        end = (part.radius.iloc[-1], 100 * part.accuracy.iloc[-1])
        axis.annotate(layer, end, (6, -7), textcoords="offset points", color=color,
                      fontsize=style.SMALL)  # fmt: skip
    same = 100 * rows.accuracy[rows.layer == "erm"].item()
    best = 100 * pd.read_csv(RESULTS / folder / "trials_erm_30.csv").validation_accuracy.max()
    for value, text in ((same, "ERM, the same options"), (best, "ERM at its best")):
        style.zero_line(axis, value)
        axis.annotate(text, (0.3, value), (0, 3), textcoords="offset points", color=GREY,
                      fontsize=style.SMALL, ha="right")  # fmt: skip
    style.log(axis, "x")
    axis.set_xlabel("relative radius")
    axis.set_ylabel("validation accuracy %")
    save(figure, RESULTS / folder / "map.svg")


_FOUR = {
    "mlp_long_tail": "MLP, 100:1",
    "resnet8_slim_long_tail": "small ResNet, 100:1",
    "mlp_balanced": "MLP, 50 images a class",
    "resnet8_slim_balanced": "small ResNet, 50 images a class",
}


def _numbers(text: str) -> list[str]:
    part = text.split(",")[1] if text.startswith("mnist5k") else "0"
    return "".join(c if c.isdigit() else " " for c in part).split()


def _short(setting: str) -> str:
    parts = [part.strip() for part in setting.split(",")]
    if parts[0] != "mnist5k":
        return parts[0]
    return parts[1].replace("exponential ", "").replace("training images", "images")


def main() -> None:
    """Draw all figures."""
    idea(FIGURES / "idea.svg")
    accuracy_by_class(FIGURES / "accuracy_by_class.svg")
    methods("long_tail/mlp", "table.csv")
    methods("long_tail/resnet8_slim", "table.csv")
    methods("balanced/mlp", "table.csv", "images_400/table.csv")
    methods("balanced/resnet8_slim", "table.csv")
    methods("domains/small_cnn", "table.csv")
    radii("balanced/small_cnn_cifar10")
    layers(RESULTS / "layer_sweep" / "gain.svg")
    sharpness(RESULTS / "landscape" / "sharpness.svg")


if __name__ == "__main__":
    main()
