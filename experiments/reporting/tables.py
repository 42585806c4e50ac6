"""Tables of text cells as Markdown, LaTeX, aligned text, CSV and on the terminal.

All tables of this project are printed and written here. A table is a list of lines of text cells,
header first; a table of numbers is a pandas frame.
"""

import sys
from collections.abc import Sequence

import pandas as pd
from rich.console import Console
from rich.table import Table

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
    """CSV with six significant digits and empty cells for NaN."""
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
