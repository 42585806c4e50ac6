"""The style of all figures: colours, markers and order of methods, labels at line ends, notes."""

import io
import pathlib
import textwrap
import zlib
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from lpa_jax.files import write_bytes

INK, GREY, PALE = "#222222", "#8a8a8a", "#c9c9c9"
BLUE, RED, GREEN = "#0072B2", "#D55E00", "#009E73"
# Okabe and Ito's palette without its yellow, which white paper hides: told apart by colour-blind
# readers (tests/experiments/reporting/test_figures.py simulates them).
PALETTE = (INK, GREEN, BLUE, RED, "#E69F00", "#56B4E9", "#CC79A7")
_KNOWN = {"erm": (INK, "o"), "lpl": (GREEN, "s"), "lpa": (BLUE, "o"), "lpa+lpl": (RED, "D")}
_OTHERS = (
    "adversarial", "dropout", "manifold_mixup", "sam", "gaussian_noise", "mixup", "coral", "irm",
    "vrex", "group_dro", "mixstyle", "rsc", "logit_adjusted", "ldam_drw", "isda",
    "spectral_decoupling", "spatial_dropout", "coral+lpa", "logit_adjusted+lpa",
)  # fmt: skip
_MARKERS = "^vPX<>hp*8"
MOST_HIGHLIGHTED = 7
_STEPS = [1, 2, 5, 10]
SMALL = 8
SIGNS = {"positive": (RED, "^"), "negative": (BLUE, "v"), "neutral": (GREY, "o")}
_STYLE = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL, "legend.fontsize": SMALL, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY,
    "axes.titlelocation": "left", "axes.grid": True, "grid.color": "#e6e6e6", "text.color": INK,
    "axes.axisbelow": True, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "lines.linewidth": 1.5, "lines.markersize": 5, "axes.unicode_minus": True,
    "font.family": ["DejaVu Sans"], "figure.constrained_layout.w_pad": 0.06,
    "figure.constrained_layout.h_pad": 0.06,
    # Names of methods are text, whatever dollar signs they hold.
    "text.parse_math": False,
    # Text stays text, and the same figure gives the same bytes.
    "svg.fonttype": "none", "svg.hashsalt": "lpa_jax",
}  # fmt: skip
plt.rcParams.update(_STYLE)


def mark_of(method: str) -> tuple[str, str]:
    """Colour and marker of a method, the same in every figure."""
    if method in _KNOWN:
        return _KNOWN[method]
    colors = PALETTE[len(_KNOWN) :]
    known = method in _OTHERS
    i = _OTHERS.index(method) if known else zlib.crc32(method.encode()) % 30
    return colors[i % len(colors)], _MARKERS[i // len(colors) % len(_MARKERS)]


def by_result(means: Mapping[str, float]) -> list[str]:
    """Methods from the best to the worst; those without a number come last."""
    return sorted(means, key=lambda m: -means[m] if np.isfinite(means[m]) else np.inf)


def highlighted(methods: Sequence[str]) -> list[str]:
    """At most 7 methods that have their colours: ERM, LPA and LPL, then the first of the others."""
    own = [method for method in methods if method in _KNOWN]
    others = [method for method in methods if method not in _KNOWN]
    chosen = [*own, *others[: MOST_HIGHLIGHTED - len(own)]]
    return [method for method in methods if method in chosen]


def marks(methods: Sequence[str]) -> dict[str, dict]:
    """Keywords of `plot` by method; methods beyond the highlighted ones are thin and grey."""
    bold = highlighted(methods)
    grey = {"color": PALE, "marker": "", "linewidth": 0.9, "zorder": 1.5}
    return {
        method: dict(zip(("color", "marker"), mark_of(method), strict=True))
        if method in bold else dict(grey)
        for method in methods
    }  # fmt: skip


def panels(rows: int, columns: int, height: float = 2.6, width: float = 3.2, **shared):
    """(figure, axes [rows, columns]); sizes of a panel in inches, `sharex` and `sharey`."""
    return plt.subplots(
        rows,
        columns,
        figsize=(width * columns + 0.6, height * rows + 0.3),
        squeeze=False,
        layout="constrained",
        **shared,
    )


def grid_of(count: int, height: float, width: float = 3.2, most: int = 3, **shared):
    """(figure, axes) of so many panels, at most `most` in a row; surplus axes are hidden."""
    columns = min(most, count)
    figure, axes = panels(-(-count // columns), columns, height, width, **shared)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    for axis in axes.flat[max(count - columns, 0) : count]:
        axis.tick_params(labelbottom=True)
    return figure, axes


def epochs(axis, last: float) -> None:
    """An axis of whole epochs."""
    axis.set(xlabel="epoch", xlim=(0, last + 0.5) if last < 2 else (0, last))
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1, steps=_STEPS))


def per_cent(axis, lowest: float, side: str = "y", label: str = "accuracy %") -> None:
    """An axis of accuracies, from below the lowest to 100."""
    low = max(0.0, 10 * np.floor((lowest - 2) / 10)) if np.isfinite(lowest) else 0.0
    ends = (min(low, 90.0), 100.0)
    (axis.set_ylim if side == "y" else axis.set_xlim)(*ends)
    one = axis.yaxis if side == "y" else axis.xaxis
    one.set_major_locator(MaxNLocator(5 if side == "y" else 4, steps=_STEPS))
    (axis.set_ylabel if side == "y" else axis.set_xlabel)(label)


def log(axis, side: str = "y", **scale) -> None:
    """A logarithmic axis; with `linthresh`, one that is linear around zero."""
    one = axis.yaxis if side == "y" else axis.xaxis
    name = "symlog" if scale else "log"
    (axis.set_yscale if side == "y" else axis.set_xscale)(name, **scale)
    one.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    one.set_minor_formatter(NullFormatter())


def number(value: float) -> str:
    """A number on an axis; powers of ten have exponents.

    >>> number(0.01), number(1e-7), number(2e5)
    ('0.01', '10⁻⁷', '2·10⁵')
    """
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.6g}".replace("-", "\N{MINUS SIGN}")
    mantissa, exponent = f"{value:.1e}".split("e")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    mantissa = f"{float(mantissa):g}·".replace("-", "\N{MINUS SIGN}")
    return f"{mantissa.removesuffix('1·')}10{raised}"


def plain(axis, side: str = "y", most: int = 5) -> None:
    """An axis with few ticks, and no offset."""
    one = axis.yaxis if side == "y" else axis.xaxis
    one.set_major_locator(MaxNLocator(most, steps=_STEPS))
    one.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def zero_line(axis, value: float = 0.0, side: str = "y") -> None:
    """A line where nothing changes."""
    (axis.axhline if side == "y" else axis.axvline)(value, color=GREY, linewidth=0.8, zorder=1)


def ticks(axis, layers: Sequence[str]) -> None:
    """An axis of layers."""
    slanted = sum(map(len, layers)) > 34
    axis.set_xticks(range(len(layers)), layers, rotation=35 * slanted,
                    ha="right" if slanted else "center", rotation_mode="anchor")  # fmt: skip
    axis.set_xlim(-0.4, len(layers) - 0.6)


def label_ends(axis, ends: Mapping[str, tuple[float, str]]) -> None:
    """Names beside the right ends of lines, moved apart where they would overlap.

    Args:
      axis: whose lines end there.
      ends: name -> (value at the end, colour).
    """
    names = sorted((name for name in ends if np.isfinite(ends[name][0])), key=lambda n: ends[n][0])
    look = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center",
            "fontsize": SMALL, "annotation_clip": False}  # fmt: skip
    axis.end_labels = [
        axis.annotate(name, (1, ends[name][0]), (5, 0), color=ends[name][1], **look)
        for name in names
    ]


def legend(figure: Figure, handles: Mapping[str, object]) -> None:
    """A legend above all panels, in as many lines as it needs."""
    longest = max(map(len, handles), default=1)
    columns = int(figure.get_size_inches()[0] / (0.075 * longest + 0.55))
    figure.legend(list(handles.values()), list(handles), loc="outside upper left",
                  ncols=max(1, min(len(handles), columns)))  # fmt: skip


def note(figure: Figure, text: str) -> None:
    """Sentences below the panels: how to read them, and what would decide the question."""
    width = figure.get_size_inches()[0]
    lines = textwrap.wrap(text, int(14.5 * width))
    figure.supxlabel("\n".join(lines), x=0.012, ha="left", fontsize=SMALL, color="#444444")


def say(axis, text: str) -> None:
    """Words in place of curves."""
    axis.text(0.5, 0.5, textwrap.fill(text, 30), ha="center", va="center", fontsize=SMALL,
              transform=axis.transAxes, color="#444444")  # fmt: skip


def save(figure: Figure, path: pathlib.Path) -> None:
    """Lays the figure out, writes and closes it."""
    # Once: drawing would do it again every time.
    if figure.get_layout_engine() is not None:
        figure.get_layout_engine().execute(figure)
        figure.set_layout_engine("none")
    for axis in figure.axes:
        _spread(axis, getattr(axis, "end_labels", ()))
    write_figure(figure, path)


def _spread(axis, labels: Sequence) -> None:
    """Moves labels apart by the height of a line, as little as that takes, within the panel."""
    if not labels:
        return
    gap = 1.25 * SMALL
    scale = 72 / axis.figure.dpi
    bottom, top = scale * axis.bbox.y0, scale * axis.bbox.y1
    places = [scale * axis.transData.transform((0, label.xy[1]))[1] for label in labels]
    places = [min(max(place, bottom), top) for place in places]
    moved = list(places)
    for _ in range(200):
        for i in range(len(moved) - 1):
            short = gap - (moved[i + 1] - moved[i])
            if short > 0.01:
                moved[i] -= short / 2
                moved[i + 1] += short / 2
        if moved[-1] > top + 2:
            moved = [place - (moved[-1] - top - 2) for place in moved]
    for label, new in zip(labels, moved, strict=True):
        start = scale * axis.transData.transform((0, label.xy[1]))[1]
        label.set_position((5, new - start))


def write_figure(figure: Figure, path: pathlib.Path) -> None:
    """Writes a figure whole, and never through a link to somewhere else; closes it.

    Args:
      figure: to write.
      path: whose suffix is the format: .png, or .svg, whose bytes depend on nothing but the figure.
    """
    content = io.BytesIO()
    suffix = path.suffix.removeprefix(".")
    metadata = {"Date": None} if suffix == "svg" else None
    figure.savefig(content, format=suffix, dpi=150, metadata=metadata)
    write_bytes(path, content.getvalue())
    plt.close(figure)
