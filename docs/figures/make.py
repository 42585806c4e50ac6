"""Draw the figures of the README and of the pages in results/, from committed tables alone.

    python docs/figures/make.py

Every number is read from results/. Run this again when a table there changes.
"""

import pathlib

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

FIGURES = pathlib.Path(__file__).parent
RESULTS = FIGURES.parents[1] / "results"
BLUE, ORANGE, GREEN, GREY, DARK = "#0072B2", "#D55E00", "#009E73", "#8a8a8a", "#222222"
NAMES = {
    "erm": "ERM", "lpl": "LPL", "lpa": "LPA", "lpa+lpl": "LPA+LPL", "sam": "SAM", "isda": "ISDA",
    "adversarial": "adversarial perturbation", "ldam_drw": "LDAM-DRW", "vrex": "V-REx",
    "manifold_mixup": "Manifold Mixup", "gaussian_noise": "Gaussian noise", "irm": "IRM",
    "mixstyle": "MixStyle", "coral": "CORAL", "coral+lpa": "CORAL+LPA", "rsc": "RSC",
    "group_dro": "GroupDRO", "logit_adjusted": "logit adjustment (LA)",
    "logit_adjusted+lpa": "LA+LPA", "logit_adjusted+lpl": "LA+LPL", "mixup": "input mixup",
    "logit_adjusted+lpa+lpl": "LA+LPA+LPL",
}  # fmt: skip
# Letters as outlines look the same everywhere; a fixed salt gives the same file every time.
STYLE = {"svg.hashsalt": "lpa_jax", "font.size": 10, "axes.spines.top": False,
         "axes.spines.right": False, "text.color": DARK}  # fmt: skip


def name_of(method: str) -> str:
    """The method's name for readers."""
    return NAMES.get(method, method.replace("_", " "))


def save(figure: Figure, path: pathlib.Path) -> None:
    """Write an SVG on white, without a date."""
    figure.savefig(
        path, format="svg", bbox_inches="tight", pad_inches=0.06, metadata={"Date": None}
    )


def idea(path: pathlib.Path) -> None:
    """The cascade from input to loss, and below it one arrow per class at one hidden layer."""
    figure = Figure((5.4, 3.3))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 108), ylim=(0, 64))
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
        (52, 26, -14, -7, BLUE, "frequent class:\ncontract, lower its loss", (57, 31)),
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
    figure = Figure((5.2, 3.1))
    axis = figure.add_subplot()
    groups = {"accuracy": "all", "many": "frequent\n(>100 images)", "medium": "medium\n(20-100)",
              "few": "rare\n(<20)"}  # fmt: skip
    colors = {"erm": GREY, "lpl": GREEN, "lpa": BLUE, "lpa+lpl": ORANGE}
    for i, (method, color) in enumerate(colors.items()):
        row = table.loc[method]
        x = [k + 0.16 * (i - 1.5) for k in range(len(groups))]
        means = [100 * row[f"{group}_mean"] for group in groups]
        errors = [100 * row[f"{group}_se"] for group in groups]
        axis.errorbar(x, means, errors, fmt="o", ms=6, elinewidth=1.6, color=color,
                      label=name_of(method))  # fmt: skip
    axis.grid(axis="y", color="#e4e4e4")
    axis.set_xticks(range(len(groups)), groups.values())
    axis.set(ylim=(45, 101), ylabel="test accuracy %")
    figure.legend(loc="upper center", ncols=4, frameon=False, columnspacing=1.2, handletextpad=0,
                  bbox_to_anchor=(0.54, 1.04))  # fmt: skip
    save(figure, path)


def methods(folder: str, *tables: str) -> None:
    """FOLDER/accuracy.svg: a panel for each setting, a dot with its error for each method."""
    rows = pd.concat(pd.read_csv(RESULTS / folder / table) for table in tables)
    rows = rows[~rows.setting.str.endswith("oracle")]
    settings = sorted(rows.setting.unique(), key=lambda text: [int(n) for n in _numbers(text)])
    count = max((rows.setting == setting).sum() for setting in settings)
    figure = Figure((3.3 * len(settings), 0.7 + 0.2 * count))
    for axis, setting in zip(
        figure.subplots(1, len(settings), squeeze=False)[0], settings, strict=True
    ):
        part = rows[rows.setting == setting].sort_values("accuracy_mean").reset_index(drop=True)
        for y, row in part.iterrows():
            color = GREY if row.method == "erm" else BLUE if "lp" in row.method else DARK
            axis.errorbar(100 * row.accuracy_mean, y, xerr=100 * row.accuracy_se, fmt="o", ms=4,
                          color=color, elinewidth=1.2)  # fmt: skip
        axis.set_yticks(part.index, [name_of(m) for m in part.method], fontsize=8)
        axis.axvline(100 * part.accuracy_mean[part.method == "erm"].item(), color=GREY, lw=0.6)
        axis.set_title(_short(setting), fontsize=9)
        axis.set_xlabel("accuracy %", fontsize=9)
        axis.tick_params(axis="x", labelsize=8)
    figure.tight_layout()
    save(figure, RESULTS / folder / "accuracy.svg")


def layers(path: pathlib.Path) -> None:
    """The gain of LPA over ERM at every injection point, a panel a network and data set."""
    figure = Figure((8, 4.6))
    axes = figure.subplots(2, 2)
    for axis, (folder, title) in zip(axes.flat, _FOUR.items(), strict=True):
        rows = pd.read_csv(RESULTS / "layer_sweep" / folder / "layer_sweep.csv")
        rows = rows[(rows.measure == "accuracy") & (rows.method != "erm")]
        places = [method.split("@")[1] for method in rows.method]
        axis.errorbar(places, 100 * rows.difference, yerr=100 * rows.difference_se, fmt="o",
                      color=BLUE)  # fmt: skip
        axis.axhline(0, color=GREY, lw=0.8)
        axis.set_title(title, fontsize=9)
        axis.set_ylabel("LPA - ERM, points", fontsize=9)
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    save(figure, path)


def sharpness(path: pathlib.Path) -> None:
    """Test accuracy against the largest Hessian eigenvalue, a panel a network and data set."""
    figure = Figure((8, 5.6))
    axes = figure.subplots(2, 2)
    for axis, (folder, title) in zip(axes.flat, _FOUR.items(), strict=True):
        flat = pd.read_csv(RESULTS / "landscape" / folder / "flatness.csv")
        right = pd.read_csv(RESULTS / "landscape" / folder / "calibration.csv")
        largest = flat[flat.measure == "lambda1"].set_index("method")["mean"]
        accuracy = right[right.measure == "accuracy"].set_index("method")
        for method, x in largest.items():
            axis.errorbar(x, 100 * accuracy["mean"][method], 100 * accuracy["se"][method], fmt="o",
                          ms=5, label=name_of(method))  # fmt: skip
        axis.set(xscale="log")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("largest eigenvalue (flat to sharp)", fontsize=9)
        axis.set_ylabel("test accuracy %", fontsize=9)
        axis.tick_params(labelsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncols=4,
                  frameon=False, fontsize=9)  # fmt: skip
    save(figure, path)


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
    mpl.rcParams.update(STYLE)
    idea(FIGURES / "idea.svg")
    accuracy_by_class(FIGURES / "accuracy_by_class.svg")
    methods("long_tail/mlp", "table.csv")
    methods("long_tail/resnet8_slim", "table.csv")
    methods("balanced/mlp", "table.csv", "images_400/table.csv")
    methods("balanced/resnet8_slim", "table.csv")
    methods("domains/small_cnn", "table.csv")
    layers(RESULTS / "layer_sweep" / "gain.svg")
    sharpness(RESULTS / "landscape" / "sharpness.svg")


if __name__ == "__main__":
    main()
