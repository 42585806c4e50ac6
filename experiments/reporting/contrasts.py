"""Differences between methods that a reader names beforehand, such as LPA against LPL."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import pandas as pd

from experiments.reporting import paired as statistics
from experiments.reporting import summary
from experiments.reporting.paired import Comparison
from experiments.reporting.summary import Results

# The two methods of a contrast: accuracy of the first minus accuracy of the second.
Pair = tuple[str, str]
COLUMNS = ("contrast", "pairs", "difference", "95% interval", "p", "p (Holm)", "first is higher")


class Contrast(NamedTuple):
    """One method against another over their common seeds.

    Attributes:
      name: both methods, as a reader sees them.
      comparison: accuracy of the first minus accuracy of the second.
      p_holm: its p-value, corrected for the contrasts beside it and for nothing else.
    """

    name: str
    comparison: Comparison
    p_holm: float


def parse(texts: Sequence[str]) -> tuple[Pair, ...]:
    """Pairs of methods from a flag.

    Raises:
      ValueError: a text that is not METHOD:METHOD with two different methods, or one twice.

    >>> parse(["lpa:lpl", "logit_adjusted+lpa:logit_adjusted"])
    (('lpa', 'lpl'), ('logit_adjusted+lpa', 'logit_adjusted'))
    """
    pairs = []
    for text in texts:
        first, colon, second = (part.strip() for part in text.partition(":"))
        if not colon or not first or not second or ":" in second or first == second:
            raise ValueError(f"--compare must name pairs METHOD:METHOD, got {text!r}")
        pairs.append((first, second))
    for pair in pairs:
        # The other way round is the same test: counting it twice would only weaken the others.
        if pairs.count(pair) + pairs.count(pair[::-1]) > 1:
            raise ValueError(f"--compare names {':'.join(pair)!r} twice")
    return tuple(pairs)


def check(pairs: Sequence[Pair], methods: Collection[str]) -> None:
    """Refuses pairs that no table can show.

    Raises:
      ValueError: a method without any run.
    """
    for name in (name for pair in pairs for name in pair):
        if name not in methods:
            known = ", ".join(sorted(methods))
            raise ValueError(f"--compare: no run of the method {name!r}; there are: {known}")


def contrasts(results: Results, pairs: Sequence[Pair]) -> tuple[Contrast, ...]:
    """Those pairs that have common seeds, p-values Holm-corrected among each other."""
    compared = [(pair, summary.compare(results, *pair)) for pair in pairs]
    compared = [(pair, comparison) for pair, comparison in compared if comparison is not None]
    corrected = statistics.holm([comparison.p_value for _, comparison in compared])
    return tuple(
        Contrast(" - ".join(pair), comparison, p_holm)
        for (pair, comparison), p_holm in zip(compared, corrected, strict=True)
    )


def missing(results: Results, pairs: Sequence[Pair]) -> list[str]:
    """A line for each pair that `contrasts` leaves out."""
    lines = []
    for pair in pairs:
        absent = [name for name in pair if not results.get(name)]
        if absent:
            lines.append(f"{' - '.join(pair)}: no run of {' or '.join(absent)} in this setting.")
        elif summary.compare(results, *pair) is None:
            lines.append(f"{' - '.join(pair)}: no common seed.")
    return lines


def text_table(made: Sequence[Contrast]) -> list[list[str]]:
    """Text cells, header first; differences in percentage points."""
    return [
        list(COLUMNS),
        *(
            [
                contrast.name,
                str(contrast.comparison.pairs),
                *summary.comparison_cells(contrast.comparison, contrast.p_holm),
                f"{contrast.comparison.higher} of {contrast.comparison.pairs}",
            ]
            for contrast in made
        ),
    ]


def frame(made: Sequence[Contrast]) -> pd.DataFrame:
    """One number a cell, differences as fractions."""
    return pd.DataFrame.from_records(
        [
            {"contrast": contrast.name}
            | summary.comparison_numbers(contrast.comparison, contrast.p_holm)
            | {"first_is_higher": contrast.comparison.higher}
            for contrast in made
        ]
    )
