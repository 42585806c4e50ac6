"""Tables on a terminal: one renderer for all experiments.

A table is a list of lines of text cells, header first. It fits the terminal, or 80 columns where
the output is a file: columns that are empty or secondary are left out, and what is still too wide
is folded.
"""

import io
import shutil
import sys
import textwrap
from collections.abc import Sequence

from rich import box
from rich import table as rich_table
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

# Text cells, header first.
Lines = Sequence[Sequence[str]]
# Of a column: two spaces and a line.
_GAP = 3
# Names that are longer are broken where a table would be too wide.
_LONGEST_NAME = 24


def width() -> int:
    """Columns of the terminal, or of the environment's COLUMNS; 80 for a file or a pipe."""
    return shutil.get_terminal_size((80, 24)).columns


def show(text: str = "") -> None:
    """Prints lines, folded at words to the width of the terminal, in characters that it has."""
    for line in text.split("\n"):
        print(_encodable("\n".join(textwrap.wrap(line, width(), break_on_hyphens=False)) or ""))


def show_table(lines: Lines, secondary: Sequence[str] = (), keys: int = 1) -> Lines:
    """Prints a table without the columns that do not fit; returns what it printed.

    Args:
      lines: of equal length.
      secondary: headers of the columns that a narrow terminal does without, the first first.
      keys: number of first columns, which every part of a folded table has.
    """
    shown = fitting(lines, width(), secondary)
    print(table(shown, width(), keys, _encodable("±╭┼") == "±╭┼"), end="", flush=True)
    return shown


def fitting(lines: Lines, columns: int, secondary: Sequence[str] = ()) -> Lines:
    """The table without empty columns and, if it is wider than `columns`, without secondary ones.

    >>> fitting([["method", "empty", "seconds"], ["lpa", "", "1.2"]], 19, ["seconds"])
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

    Headers are broken at spaces, and long names at their signs, where that saves a part.

    Args:
      lines: of equal length.
      columns: characters of the terminal.
      keys: number of first columns, which are aligned left and repeated in every part of a folded
        table; the others are aligned right.
      symbols: whether the console has other characters than ASCII: 75.6±0.5, not 75.6+-0.5.

    Example:
      >>> print(table([["method", "accuracy %"], ["lpa+lpl", "75.6±0.5"]], 30), end="")
      ╭─────────┬────────────╮
      │ method  │ accuracy % │
      ├─────────┼────────────┤
      │ lpa+lpl │   75.6±0.5 │
      ╰─────────┴────────────╯
    """
    cells = [[_plain(cell, symbols) for cell in line] for line in lines]
    every = [list(column) for column in zip(*cells, strict=True)]
    if _width(every) > columns:
        every = [_narrow(column) for column in every]
    if _width(every) > columns:
        every[:keys] = [[c[0], *map(_broken, c[1:])] for c in every[:keys]]
    parts = _parts(every[:keys], every[keys:], columns)
    return "\n".join(_drawn(every[:keys] + part, keys, symbols) for part in parts)


def _plain(cell: str, symbols: bool) -> str:
    # Names come from files: no control characters reach the terminal.
    text = "".join(c if c.isprintable() else "?" for c in cell)
    return text if symbols else text.replace("±", "+-")


def _encodable(text: str) -> str:
    """The text in characters of the console: +- for ±, ? for what else it lacks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.replace("±", "+-").encode(encoding, "replace").decode(encoding)
    return text


def _narrow(column: Sequence[str]) -> list[str]:
    """The column with its header broken at spaces to the width of its cells."""
    least = max(_column_width(column[1:]), *map(cell_len, column[0].split()), 1)
    header = textwrap.wrap(column[0], least, break_on_hyphens=False)
    return ["\n".join(header) or column[0], *column[1:]]


def _broken(name: str) -> str:
    if cell_len(name) <= _LONGEST_NAME:
        return name
    spaced = name.replace("+", "+ ").replace("|", "| ")
    pieces = textwrap.wrap(spaced, _LONGEST_NAME, break_on_hyphens=False)
    return "\n".join(piece.replace("+ ", "+").replace("| ", "|") for piece in pieces)


def _column_width(column: Sequence[str]) -> int:
    return max((cell_len(line) for cell in column for line in cell.split("\n")), default=0)


def _width(table: Sequence[Sequence[str]]) -> int:
    return sum(map(_column_width, table)) + _GAP * len(table) + 1


def _parts(key: list, rest: list, columns: int) -> list[list]:
    """Columns by part of a folded table, each with at least one."""
    parts: list[list] = [[]]
    for column in rest:
        if parts[-1] and _width([*key, *parts[-1], column]) > columns:
            parts.append([])
        parts[-1].append(column)
    return parts


def _drawn(columns: Sequence[Sequence[str]], keys: int, symbols: bool) -> str:
    drawn = rich_table.Table(box=box.ROUNDED if symbols else box.ASCII)
    for number, (header, *_) in enumerate(columns):
        justify = "left" if number < keys else "right"
        drawn.add_column(Text(header), justify=justify, vertical="bottom", no_wrap=True)
    for row in zip(*(column[1:] for column in columns), strict=True):
        drawn.add_row(*map(Text, row))  # no markup: names are text
    file = io.StringIO()
    width = _width(columns)
    Console(file=file, width=width, color_system=None, legacy_windows=False).print(drawn)
    return file.getvalue()
