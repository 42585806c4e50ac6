"""Tables on a terminal: one renderer for all experiments.

A table is a list of lines of text cells, header first. It fits the terminal, or 80 columns where
the output is a file: columns that are empty or secondary are left out, and what is still too wide
is folded.
"""

import shutil
import sys
import textwrap
from collections.abc import Sequence

from rich.cells import cell_len

# Text cells, header first.
Lines = Sequence[Sequence[str]]
_GAP = 2
# Names that are longer are broken where a table would be too wide.
_LONGEST_NAME = 24


def width() -> int:
    """Columns of the terminal, or of the environment's COLUMNS; 80 for a file or a pipe."""
    return shutil.get_terminal_size((80, 24)).columns


def show(text: str = "") -> None:
    """Prints lines, folded at words to the width of the terminal, in characters that it has."""
    for line in text.replace("+-", "±").split("\n"):
        print(_encodable("\n".join(textwrap.wrap(line, width(), break_on_hyphens=False)) or ""))


def show_table(lines: Lines, secondary: Sequence[str] = (), keys: int = 1) -> Lines:
    """Prints a table without the columns that do not fit; returns what it printed.

    Args:
      lines: of equal length.
      secondary: headers of the columns that a narrow terminal does without, the first first.
      keys: number of first columns, which every part of a folded table has.
    """
    shown = fitting(lines, width(), secondary)
    print(table(shown, width(), keys, _encodable("±─") == "±─"), end="", flush=True)
    return shown


def fitting(lines: Lines, columns: int, secondary: Sequence[str] = ()) -> Lines:
    """The table without empty columns and, if it is wider than `columns`, without secondary ones.

    >>> fitting([["method", "empty", "seconds"], ["lpa", "", "1.2"]], 9, ["seconds"])
    [['method'], ['lpa']]
    """
    plain = [[_plain(cell, True) for cell in line] for line in lines]
    kept = [i for i, column in enumerate(zip(*plain, strict=True)) if i == 0 or any(column[1:])]
    for name in secondary:
        if _width([[line[i] for line in plain] for i in kept]) > columns:
            kept = [i for i in kept if lines[0][i] != name]
    return [[line[i] for i in kept] for line in lines]


def table(lines: Lines, columns: int, keys: int = 1, symbols: bool = True) -> str:
    """Text cells, header first, as a table, folded where it is wider than `columns`.

    Args:
      lines: of equal length.
      columns: characters of the terminal.
      keys: number of first columns, which are aligned left and repeated in every part of a folded
        table; the others are aligned right.
      symbols: whether the console has other characters than ASCII: 75.60±0.50, not 75.60+-0.50.

    Example:
      >>> print(table([["method", "accuracy %"], ["lpa+lpl", "75.60 +- 0.50"]], 20), end="")
      method   accuracy %
      ───────  ──────────
      lpa+lpl  75.60±0.50
    """
    cells = [[_plain(cell, symbols) for cell in line] for line in lines]
    every = [list(column) for column in zip(*cells, strict=True)]
    key, rest = every[:keys], every[keys:]
    if _width(key + rest) > columns:
        key = [[column[0], *(_broken(cell) for cell in column[1:])] for column in key]
    return "\n".join(
        _text(key + part, keys, "─" if symbols else "-") for part in _parts(key, rest, columns)
    )


def _plain(cell: str, symbols: bool) -> str:
    # Names come from files: no control characters reach the terminal.
    text = "".join(c if c.isprintable() else "?" for c in cell)
    return text.replace(" +- ", "±" if symbols else "+-")


def _encodable(text: str) -> str:
    """The text in characters of the console: +- for ±, ? for what else it lacks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.replace("±", "+-").encode(encoding, "replace").decode(encoding)
    return text


def _broken(name: str) -> str:
    if cell_len(name) <= _LONGEST_NAME:
        return name
    spaced = name.replace("+", "+ ").replace("|", "| ")
    pieces = textwrap.wrap(spaced, _LONGEST_NAME, break_on_hyphens=False)
    return "\n".join(piece.replace("+ ", "+").replace("| ", "|") for piece in pieces)


def _column_width(column: Sequence[str]) -> int:
    """Of the widest cell, or of the header's longest word: headers are broken at spaces."""
    parts = [*column[0].split(), *(line for cell in column[1:] for line in cell.split("\n"))]
    return max(map(cell_len, parts), default=0)


def _width(table: Sequence[Sequence[str]]) -> int:
    return sum(map(_column_width, table)) + _GAP * (len(table) - 1)


def _parts(key: list, rest: list, columns: int) -> list[list]:
    """Columns by part of a folded table, each with at least one."""
    parts: list[list] = [[]]
    for column in rest:
        if parts[-1] and _width([*key, *parts[-1], column]) > columns:
            parts.append([])
        parts[-1].append(column)
    return parts


def _text(table: Sequence[Sequence[str]], keys: int, rule: str) -> str:
    widths = [_column_width(column) for column in table]
    headers = ["\n".join(textwrap.wrap(c[0], w, break_on_hyphens=False)) or c[0]
               for c, w in zip(table, widths, strict=True)]  # fmt: skip
    rows = list(zip(*(column[1:] for column in table), strict=True))
    text = _row(headers, widths, keys, bottom=True)
    text += _row([rule * w for w in widths], widths, keys)
    return text + "".join(_row(row, widths, keys) for row in rows)


def _row(cells: Sequence[str], widths: Sequence[int], keys: int, bottom: bool = False) -> str:
    """One row, of several lines if a cell has several; headers end on the same line."""
    split = [cell.split("\n") for cell in cells]
    height = max(map(len, split))
    text = ""
    for i in range(height):
        line = []
        for number, (parts, w) in enumerate(zip(split, widths, strict=True)):
            at = i - (height - len(parts)) if bottom else i
            cell = parts[at] if 0 <= at < len(parts) else ""
            fill = " " * (w - cell_len(cell))
            line.append(cell + fill if number < keys else fill + cell)
        text += (" " * _GAP).join(line).rstrip() + "\n"
    return text
