"""Tables of a terminal: they fit, fold, leave out what is secondary, and are ASCII where needed."""

import io
import sys

import pytest

from experiments.reporting import screen

LINES = [
    ["method", "seeds", "accuracy %", "vs erm", "nothing", "many %", "few %", "seconds"],
    ["erm", "3", "75.8±0.5", "", "", "97.9±0.6", "50.8±1.4", "15.2"],
    ["manifold_mixup@input|hidden1|hidden2+lpl", "3", "80.9±0.1", "+5.1 (+4.4 +5.0 +5.9)",
     "", "96.6±0.7", "63.8±0.4", "27.1"],
]  # fmt: skip
SECONDARY = ("seconds", "seeds")


@pytest.mark.parametrize("columns", [24, 40, 80, 100, 200])
@pytest.mark.parametrize("symbols", [True, False])
def test_a_table_is_never_wider_than_the_terminal_and_keeps_every_number(columns, symbols):
    shown = screen.fitting(LINES, columns, SECONDARY)
    text = screen.table(shown, columns, symbols=symbols)
    widest = max(map(len, text.splitlines()))
    # Two columns of a part are the least: a name and a number.
    assert widest <= max(columns, 24 + 22 + 3 * 2 + 1)
    assert "nothing" not in text and ("seconds" in text) == (columns >= 140)
    assert text.isascii() != symbols
    for number in ("75.8", "96.6", "63.8", "(+4.4 +5.0 +5.9)"):
        assert text.count(number) == 1
    assert ("80.9±0.1" if symbols else "80.9+-0.1") in text


def test_a_folded_table_repeats_its_keys_and_its_columns_stay_aligned():
    lines = [["method", "layer", "one", "two words"], ["lpa", "hidden1", "1.25", "3"]]
    assert screen.table(lines, 28, keys=2) == (
        "╭────────┬─────────┬──────╮\n"
        "│ method │ layer   │  one │\n"
        "├────────┼─────────┼──────┤\n"
        "│ lpa    │ hidden1 │ 1.25 │\n"
        "╰────────┴─────────┴──────╯\n"
        "\n"
        "╭────────┬─────────┬───────╮\n"
        "│        │         │   two │\n"
        "│ method │ layer   │ words │\n"
        "├────────┼─────────┼───────┤\n"
        "│ lpa    │ hidden1 │     3 │\n"
        "╰────────┴─────────┴───────╯\n"
    )


def test_a_console_without_symbols_gets_ascii_and_no_escape_reaches_a_terminal(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    monkeypatch.setenv("COLUMNS", "40")
    screen.show_table([["method", "accuracy %"], ["\x1b[31mlpa", "[b]1.0±0.1"]])
    screen.show("mean ± error, é")
    text = raw.getvalue().decode("ascii")
    assert "[b]1.0+-0.1" in text and "mean +- error, ?" in text and "\x1b" not in text
