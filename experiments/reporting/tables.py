"""Tables of accuracies: text cells from compared numbers, and their Markdown, LaTeX and CSV.

A table is a list of lines of text cells, header first; `screen` prints it. A table of numbers is a
pandas frame.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from experiments.methods.names import ERM
from experiments.reporting import paired, screen
from experiments.reporting.frame import Results, tidy, values_of
from experiments.reporting.runs import SELECTIONS
from experiments.reporting.screen import Lines
from experiments.runtime import files
from lpa_jax import metrics


def markdown_table(lines: Lines) -> str:
    r"""Text cells, header first, as a Markdown table; the first column left, the others right.

    >>> print(markdown_table([["method", "accuracy %"], ["a|b", "1.0±0.1"]]), end="")
    | method | accuracy % |
    |---|---:|
    | a\|b | 1.0±0.1 |
    """
    # A bar in a method's name (manifold_mixup@input|hidden1) would open a new cell.
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    text = [f"| {' | '.join(line)} |" for line in escaped]
    text.insert(1, "|---" + "|---:" * (len(lines[0]) - 1) + "|")
    return "\n".join(text) + "\n"


_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "|": r"\textbar{}",
    }
    | {c: f"\\{c}" for c in "&%$#_{}"}
)


def latex_table(lines: Lines, caption: str) -> str:
    r"""Text cells, header first, as a LaTeX table for the package booktabs.

    >>> print(latex_table([["method", "accuracy %"], ["a_b", "1.0±0.1"]], "A"), end="")
    \begin{table}
      \caption{A}
      \begin{tabular}{lr}
        \toprule
        method & accuracy \% \\
        \midrule
        a\_b & 1.0$\pm$0.1 \\
        \bottomrule
      \end{tabular}
    \end{table}
    """
    escaped = [[cell.translate(_LATEX).replace("±", r"$\pm$") for cell in line] for line in lines]
    header, *body = [f"    {' & '.join(line)} \\\\" for line in escaped]
    return "\n".join(
        [
            r"\begin{table}",
            f"  \\caption{{{caption.translate(_LATEX)}}}",
            f"  \\begin{{tabular}}{{l{'r' * (len(lines[0]) - 1)}}}",
            r"    \toprule",
            header,
            r"    \midrule",
            *body,
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def csv_text(table: pd.DataFrame, float_format: str | None = "%.6g") -> str:
    """CSV with six significant digits, all of them for None, and empty cells for NaN."""
    return table.to_csv(index=False, float_format=float_format, lineterminator="\n")


# Accuracies of methods: of what `paired.compare` returns.

# Columns that a narrow terminal does without, the first first.
SECONDARY = ("published", "seconds", "seeds", "p", "95% interval", "p (Holm)")
CLASS_GROUPS = ("many", "medium", "few")
TEST = "test "  # before the name of a domain
SELECTION_TITLES = {
    "training_domain_validation": "model selection: training-domain validation",
    "leave_one_domain_out": "model selection: leave-one-domain-out",
    "oracle": "model selection: oracle (chooses on the test domain)",
}


def percent(mean: float, error: float, signed: bool = False) -> str:
    """A fraction and its standard error in per cent; empty if unknown.

    >>> percent(0.787, 0.0032), percent(0.01, float("nan"), signed=True)
    ('78.7±0.3', '+1.0')
    """
    text = number(100 * mean, "{:+.1f}" if signed else "{:.1f}")
    return text if np.isnan(error) else f"{text}±{100 * error:.1f}"


def number(value: float, pattern: str) -> str:
    """The number as text; empty for NaN."""
    return "" if np.isnan(value) else pattern.format(value)


def groups(compared: pd.DataFrame) -> list[str]:
    """Groups of classes, or test domains, of a table of accuracies."""
    return [name for name in compared["measure"].unique() if name not in ("accuracy", "seconds")]


def group_title(name: str) -> str:
    """What a group of `groups` is called: a name of a domain may be a number, 15 or +90%.

    >>> group_title("many"), group_title("15")
    ('many', 'test 15')
    """
    return name if name in CLASS_GROUPS else f"{TEST}{name}"


def accuracies(compared: pd.DataFrame) -> pd.DataFrame:
    """The rows of the accuracy, one a method."""
    return compared[compared["measure"] == "accuracy"]


def of_measure(compared: pd.DataFrame, measure: str, methods: Sequence[str]) -> pd.DataFrame:
    """The rows of a measure by method; NaN for a method without one."""
    rows = compared[compared["measure"] == measure].set_index("method")
    return rows.reindex(methods)


def cells(compared: pd.DataFrame, measure: str, methods: Sequence[str]) -> list[str]:
    """Means and standard errors in per cent, one a method."""
    rows = of_measure(compared, measure, methods)
    return [percent(*row) for row in zip(rows["mean"], rows["se"], strict=True)]


def difference(row) -> str:
    """The mean paired difference in percentage points, with its error, or that of each seed."""
    if 1 < row.pairs < paired.FEWEST_PAIRS:
        each = " ".join(f"{100 * value:+.1f}" for value in row.each)
        return f"{100 * row.difference:+.1f} ({each})"
    return percent(row.difference, row.difference_se, signed=True)


def difference_columns(rows: pd.DataFrame) -> dict[str, list[str]]:
    """The difference and, where some row has enough pairs, its interval and its p-values."""
    columns = {"difference": [difference(row) for row in rows.itertuples()]}
    if (rows["pairs"] >= paired.FEWEST_PAIRS).any():
        columns["95% interval"] = [
            "" if np.isnan(row.difference_low)
            else f"[{100 * row.difference_low:+.1f}, {100 * row.difference_high:+.1f}]"
            for row in rows.itertuples()
        ]  # fmt: skip
        columns["p"] = [number(value, "{:.3g}") for value in rows["p_value"]]
        columns["p (Holm)"] = [number(value, "{:.3g}") for value in rows["p_holm"]]
    return columns


def lines_of(columns: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Text cells, header first, from columns by name."""
    return [list(columns), *map(list, zip(*columns.values(), strict=True))]


def accuracy_table(
    compared: pd.DataFrame, published: Mapping[str, str] | None = None
) -> list[list[str]]:
    """The whole table as text, header first; accuracies in per cent.

    Args:
      compared: of `paired.compare`, with the measures accuracy, groups and seconds.
      published: figures of others by method, for a last column.
    """
    rows = accuracies(compared)
    methods = list(rows["method"])
    columns = {"method": methods, "seeds": [str(count) for count in rows["seeds"]]}
    columns["accuracy %"] = cells(compared, "accuracy", methods)
    if rows["pairs"].any():
        differences = difference_columns(rows)
        columns[f"vs {rows['baseline'].iloc[0]}"] = differences.pop("difference")
        columns |= differences
    for name in groups(compared):
        unit = " %" if name in CLASS_GROUPS else ""
        columns[f"{group_title(name)}{unit}"] = cells(compared, name, methods)
    seconds = of_measure(compared, "seconds", methods)["mean"]
    if seconds.notna().any():
        columns["seconds"] = [number(value, "{:.1f}") for value in seconds]
    if published:
        columns["published"] = [published.get(method, "") for method in methods]
    return lines_of(columns)


def legend(table: Lines, by_thirds: bool | None = None) -> list[str]:
    """What the columns of a table of accuracies mean, a line each.

    Args:
      table: of `accuracy_table` or `contrast_table`.
      by_thirds: whether many, medium and few are thirds of the classes; None if unknown.
    """
    header, *body = table
    text = " ".join(cell for line in body for cell in line)
    error = " ± standard error" if "±" in text else ""
    lines = [f"Accuracies: mean{error} over seeds, in per cent."] if "accuracy %" in header else []
    few = any("(" in cell for line in body for cell in line[1:])
    for name in header:
        if name.startswith("vs ") or name == "difference":
            other = "the second method" if name == "difference" else name.removeprefix("vs ")
            each = f"; that of each seed where there are fewer than {paired.FEWEST_PAIRS}"
            lines.append(
                f"{name}: mean difference to {other} over seeds that both have (same data, same "
                f"initial weights), in percentage points{each if few else ''}."
            )
    if "95% interval" in header:
        lines.append(f"95% interval: bootstrap, BCa, {paired.RESAMPLES} resamples.")
        lines.append(
            "p: Wilcoxon's signed-rank test; p (Holm): corrected for the comparisons of the table. "
            "n seeds cannot give less than 2^(1-n)."
        )
    if f"{CLASS_GROUPS[0]} %" in header:
        sizes = "classes with > 100, 20-100, < 20 training images"
        thirds = "the thirds of the classes with the most, fewer, fewest training images"
        unknown = f"{sizes} (by thirds where a group would be empty)"
        what = {True: thirds, False: sizes, None: unknown}[by_thirds]
        lines.append(f"many, medium, few: {what}.")
    if any(name.startswith(TEST) for name in header):
        lines.append(
            "test NAME: accuracy on that held-out domain, in RotatedMNIST an angle in degrees."
        )
    if "seconds" in header:
        lines.append("seconds: mean time of a run; a method's first includes compilation.")
    return lines


DOMAIN_LEGEND = (
    "Accuracies are those on images of the held-out domain that no validation uses. accuracy %: "
    "mean over the test domains within a seed. The oracle chooses with labelled images of the test "
    "domain; the other selections do not."
)


def accuracy_frame(compared: pd.DataFrame) -> pd.DataFrame:
    """The table with one number a cell: accuracies as fractions, NaN where there is none."""
    rows = accuracies(compared).drop(columns=["measure", "higher", "each"])
    names = {"mean": "accuracy_mean", "se": "accuracy_se", "difference": "difference_mean"}
    wide = rows.rename(columns=names).reset_index(drop=True)
    for name in groups(compared):
        own = of_measure(compared, name, wide["method"])
        wide[f"{name}_mean"], wide[f"{name}_se"] = own["mean"].to_numpy(), own["se"].to_numpy()
    wide["seconds_mean"] = of_measure(compared, "seconds", wide["method"])["mean"].to_numpy()
    return wide


def contrast_table(compared: pd.DataFrame) -> list[list[str]]:
    """Text cells of `paired.contrasts`, header first; differences in percentage points."""
    columns = {"contrast": list(compared["method"]), "pairs": list(map(str, compared["pairs"]))}
    columns |= difference_columns(compared)
    columns["first is higher"] = [f"{row.higher} of {row.pairs}" for row in compared.itertuples()]
    return lines_of(columns)


def contrast_frame(compared: pd.DataFrame) -> pd.DataFrame:
    """One number a cell, differences as fractions."""
    names = {"method": "contrast", "difference": "difference_mean", "higher": "first_is_higher"}
    frame = compared.drop(columns="each").rename(columns=names)
    frame["first_is_higher"] = frame.pop("first_is_higher")
    return frame


def write_comparison(
    title: str,
    results: Results,
    workdir: pathlib.Path,
    notes: Sequence[str] = (),
    pair: paired.Pair | None = None,
    quiet: bool = False,
) -> None:
    """Prints a comparison of methods to ERM, and writes table.md and table.csv.

    There is a table for each model selection that all runs have, or one if there are none.

    Args:
      title: of all tables.
      results: of the runs, by method.
      workdir: folder for the files.
      notes: what limits the numbers, a line each.
      pair: of methods, whose difference is printed as well.
      quiet: whether to print the tables alone.
    """
    every = tidy(results)
    whole = every["selection"].value_counts() == sum(map(len, results.values()))
    names = [name for name in SELECTIONS if whole.get(name)]
    text, frames, pairs = [f"## {title}\n"], [], []
    explained, short = {}, {}  # in the order of the columns, each line once
    for name in names or [None]:
        values, _ = values_of(every, name)
        compared = paired.compare(values, ERM, tested=("accuracy",))
        table = accuracy_table(compared)
        text += [f"### {SELECTION_TITLES[name]}\n"] if name else []
        text.append(markdown_table(table))
        frames.append(accuracy_frame(compared))
        if name:
            frames[-1].insert(0, "selection", name)
        heading = [title, *([SELECTION_TITLES[name]] if name else []), _seeds(compared)]
        screen.show(f"{', '.join(filter(None, heading))}\n")
        shown = screen.show_table(table, SECONDARY)
        screen.show()
        thirds = _by_thirds(results)
        explained |= dict.fromkeys(legend(table, thirds))
        short |= dict.fromkeys(legend(shown, thirds))
        for row in paired.contrasts(values, [pair] if pair else [])[0].itertuples():
            pairs.append(f"{row.method}: {difference(row)}")
    protocol = [DOMAIN_LEGEND] if names else []
    lines = [*protocol, *explained, *notes]
    files.write_text(workdir / "table.md", "\n".join([*text, *(f"{line}\n" for line in lines)]))
    files.write_text(workdir / "table.csv", csv_text(pd.concat(frames, ignore_index=True)))
    if not quiet:
        for line in (*pairs, *protocol, *short, *notes, f"Written to {workdir}{os.sep}"):
            screen.show(line)


def _seeds(compared: pd.DataFrame) -> str:
    """The number of seeds, if it is that of all methods."""
    counts = set(accuracies(compared)["seeds"])
    return f"{counts.pop()} seeds" if len(counts) == 1 and counts != {1} else ""


def _by_thirds(results: Results) -> bool | None:
    """Whether the classes of the first run are grouped by thirds; None if their sizes are unknown.

    As `shot_groups` decides it: a group by size would be empty.
    """
    counts = next(iter(results.values()))[0].get("train_counts")
    if not counts:
        return None
    by_size = metrics.shot_groups(counts).values()
    return not all(members.any() for members in by_size)
