"""Tables: text cells from compared numbers, and their Markdown, LaTeX, CSV and terminal output.

All tables of this project are printed and written here. A table is a list of lines of text cells,
header first; a table of numbers is a pandas frame.
"""

import os
import pathlib
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from experiments.methods.names import ERM
from experiments.reporting import paired
from experiments.reporting.frame import Results, tidy, values_of
from experiments.reporting.runs import SELECTIONS
from experiments.runtime import files

# Text cells, header first.
Lines = Sequence[Sequence[str]]


def markdown_table(lines: Lines) -> str:
    r"""Text cells, header first, as a Markdown table; the first column left, the others right.

    >>> print(markdown_table([["method", "accuracy %"], ["a|b", "1.00 +- 0.10"]]), end="")
    | method | accuracy % |
    |---|---:|
    | a\|b | 1.00 +- 0.10 |
    """
    # A bar in a method's name (manifold_mixup@input|hidden1) would open a new cell.
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    text = [f"| {' | '.join(line)} |" for line in cells]
    text.insert(1, "|---" + "|---:" * (len(lines[0]) - 1) + "|")
    return "\n".join(text) + "\n"


def aligned_table(lines: Lines) -> str:
    """Text cells, header first, in columns of equal width, for a terminal or a log.

    >>> print(aligned_table([["method", "ms"], ["lpa+lpl", "1.25"]]), end="")
    method   ms
    lpa+lpl  1.25
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
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

    >>> print(latex_table([["method", "accuracy %"], ["a_b", "1.00 +- 0.10"]], "A"), end="")
    \begin{table}
      \caption{A}
      \begin{tabular}{lr}
        \toprule
        method & accuracy \% \\
        \midrule
        a\_b & 1.00 $\pm$ 0.10 \\
        \bottomrule
      \end{tabular}
    \end{table}
    """
    escaped = [[cell.translate(_LATEX).replace("+-", r"$\pm$") for cell in line] for line in lines]
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


def csv_text(table: pd.DataFrame) -> str:
    """CSV with six significant digits, and empty cells for NaN."""
    return table.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def console(width: int = 120) -> Console:
    """Standard output; a pipe or a file gets this width, however narrow the terminal is."""
    return Console() if sys.stdout.isatty() else Console(width=width)


def terminal_table(title: str, lines: Lines, no_wrap: bool = False) -> Table:
    """Text cells, header first, as a table for `console().print`.

    Args:
      title: above the table.
      lines: of equal length; the first column is aligned left, the others right.
      no_wrap: whether cells are cut off instead of wrapped where the terminal is too narrow.
    """
    table = Table(title=title, title_justify="left")
    header, *body = lines
    for i, column in enumerate(header):
        table.add_column(column, justify="right" if i else "left", no_wrap=no_wrap)
    for line in body:
        table.add_row(*line)
    return table


# Accuracies of methods: of what `paired.compare` returns.

# Groups of classes that the short table of a terminal shows, which is at most 120 columns wide.
CLASS_GROUPS = ("many", "medium", "few")
LEGEND = (
    "Accuracy: mean +- standard error over seeds. vs: mean and standard error of the paired "
    "difference to the baseline (same seed, same data), in percentage points, with its 95% "
    f"bootstrap interval (BCa, {paired.RESAMPLES} resamples; too narrow with very few seeds) "
    "and the p-value of Wilcoxon's signed-rank test, as it is and Holm-corrected for the "
    "comparisons of the table; n pairs cannot give less than 2^(1-n). many/medium/few: mean "
    "accuracy of the classes with > 100, 20-100, < 20 training images (by thirds where a group "
    "would be empty). seconds: mean wall time of a run, compilation included in a method's first."
)
DOMAIN_LEGEND = (
    "Accuracy in per cent on the held-out domain's images that no validation uses, mean +- "
    "standard error over seeds; the average is over test domains within a seed. vs: paired "
    "difference of the averages. The oracle chooses with labelled images of the test domain: no "
    "other table does. seconds: mean wall time of the networks of a run, pairs apart."
)
SELECTION_TITLES = {
    "training_domain_validation": "model selection: training-domain validation",
    "leave_one_domain_out": "model selection: leave-one-domain-out",
    "oracle": "model selection: oracle (chooses on the test domain)",
}


def percent(mean: float, error: float, signed: bool = False) -> str:
    """A fraction and its standard error in per cent; empty if unknown.

    >>> percent(0.787, 0.0032), percent(0.01, float("nan"), signed=True)
    ('78.70 +- 0.32', '+1.00')
    """
    text = number(100 * mean, "{:+.2f}" if signed else "{:.2f}")
    return text if np.isnan(error) else f"{text} +- {100 * error:.2f}"


def number(value: float, pattern: str) -> str:
    """The number as text; empty for NaN."""
    return "" if np.isnan(value) else pattern.format(value)


def groups(compared: pd.DataFrame) -> list[str]:
    """Groups of classes, or test domains, of a table of accuracies."""
    return [name for name in compared["measure"].unique() if name not in ("accuracy", "seconds")]


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


def difference_columns(rows: pd.DataFrame) -> list[list[str]]:
    """Columns of the difference, its interval, the p-value and the corrected p-value."""
    columns: list[list[str]] = [[], [], [], []]
    for row in rows.itertuples():
        columns[0].append(percent(row.difference, row.difference_se, signed=True))
        low, high = 100 * row.difference_low, 100 * row.difference_high
        columns[1].append("" if np.isnan(low) else f"[{low:+.2f}, {high:+.2f}]")
        columns[2].append(number(row.p_value, "{:.3g}"))
        columns[3].append(number(row.p_holm, "{:.3g}"))
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
        names = (f"vs {rows['baseline'].iloc[0]}", "95% interval", "p", "p (Holm)")
        columns |= dict(zip(names, difference_columns(rows), strict=True))
    columns |= {f"{name} %": cells(compared, name, methods) for name in groups(compared)}
    seconds = of_measure(compared, "seconds", methods)["mean"]
    if seconds.notna().any():
        columns["seconds"] = [number(value, "{:.1f}") for value in seconds]
    if published:
        columns["published"] = [published.get(method, "") for method in methods]
    return lines_of(columns)


def short_table(compared: pd.DataFrame, domains: bool = False) -> list[list[str]]:
    """The same for a terminal, without intervals; the groups are classes or test domains."""
    rows = accuracies(compared)
    methods = list(rows["method"])
    versus = {f"vs {rows['baseline'].iloc[0]}": difference_columns(rows)[0]}
    mean = cells(compared, "accuracy", methods)
    if domains:
        columns = {"method": methods}
        columns |= {name: cells(compared, name, methods) for name in groups(compared)}
        columns |= {"average %": mean} | versus
    else:
        columns = {"method": methods, "accuracy %": mean} | versus
        columns |= {f"{name} %": cells(compared, name, methods) for name in CLASS_GROUPS}
    seconds = of_measure(compared, "seconds", methods)["mean"]
    columns["seconds"] = [f"{value:.1f}" for value in seconds]
    return lines_of(columns)


def accuracy_frame(compared: pd.DataFrame) -> pd.DataFrame:
    """The table with one number a cell: accuracies as fractions, NaN where there is none."""
    rows = accuracies(compared).drop(columns=["measure", "higher"])
    names = {"mean": "accuracy_mean", "se": "accuracy_se", "difference": "difference_mean"}
    wide = rows.rename(columns=names).reset_index(drop=True)
    for name in groups(compared):
        own = of_measure(compared, name, wide["method"])
        wide[f"{name}_mean"], wide[f"{name}_se"] = own["mean"].to_numpy(), own["se"].to_numpy()
    wide["seconds_mean"] = of_measure(compared, "seconds", wide["method"])["mean"].to_numpy()
    return wide


def contrast_table(compared: pd.DataFrame) -> list[list[str]]:
    """Text cells of `paired.contrasts`, header first; differences in percentage points."""
    names = ("difference", "95% interval", "p", "p (Holm)")
    columns = {"contrast": list(compared["method"]), "pairs": list(map(str, compared["pairs"]))}
    columns |= dict(zip(names, difference_columns(compared), strict=True))
    columns["first is higher"] = [f"{row.higher} of {row.pairs}" for row in compared.itertuples()]
    return lines_of(columns)


def contrast_frame(compared: pd.DataFrame) -> pd.DataFrame:
    """One number a cell, differences as fractions."""
    names = {"method": "contrast", "difference": "difference_mean", "higher": "first_is_higher"}
    frame = compared.rename(columns=names)
    frame["first_is_higher"] = frame.pop("first_is_higher")
    return frame


def write_comparison(
    title: str,
    results: Results,
    workdir: pathlib.Path,
    notes: Sequence[str] = (),
    pair: paired.Pair | None = None,
) -> None:
    """Prints a comparison of methods to ERM, and writes table.md and table.csv.

    There is a table for each model selection that all runs have, or one if there are none.

    Args:
      title: of all tables.
      results: of the runs, by method.
      workdir: folder for the files.
      notes: what limits the numbers, a line each.
      pair: of methods, whose difference is printed as well.
    """
    every = tidy(results)
    whole = every["selection"].value_counts() == sum(map(len, results.values()))
    names = [name for name in SELECTIONS if whole.get(name)]
    screen = console(width=160 if names else 120)
    text, frames, printed = [f"## {title}\n"], [], []
    if names:
        screen.print(title, style="bold")
    for name in names or [None]:
        values, _ = values_of(every, name)
        compared = paired.compare(values, ERM, tested=("accuracy",))
        heading = f"### {SELECTION_TITLES[name]}\n\n" if name else ""
        text.append(heading + markdown_table(accuracy_table(compared)))
        frames.append(accuracy_frame(compared))
        if name:
            frames[-1].insert(0, "selection", name)
        above = SELECTION_TITLES[name] if name else title
        screen.print(terminal_table(above, short_table(compared, bool(name)), not name))
        for row in paired.contrasts(values, [pair] if pair else [])[0].itertuples():
            difference = percent(row.difference, row.difference_se, signed=True)
            printed.append(f"{' vs '.join(pair)}, paired: {difference}")
    lines = [DOMAIN_LEGEND if names else LEGEND, *notes]
    files.write_text(workdir / "table.md", "\n".join([*text, *(f"{line}\n" for line in lines)]))
    files.write_text(workdir / "table.csv", csv_text(pd.concat(frames, ignore_index=True)))
    for line in (*lines, *printed, f"Written to {workdir}{os.sep}"):
        screen.print(line, highlight=False)
