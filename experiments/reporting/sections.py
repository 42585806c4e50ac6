"""A report's sections, and its files: Markdown, CSV, LaTeX."""

import itertools
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from experiments.methods import published
from experiments.reporting import (
    class_figures,
    figures,
    frame,
    measured_figures,
    paired,
    runs,
    tables,
)
from experiments.reporting.frame import Results, Setting
from experiments.reporting.measured_tables import Found
from experiments.reporting.paired import Pair
from experiments.reporting.runs import Problem
from experiments.runtime import files
from experiments.training.folder import MEASURED, read_measured

PUBLISHED = (
    "published: accuracies of other authors' runs; sources and protocols in "
    "`experiments/methods/recipes`. "
    "Seeds, subsets and details differ."
)

# Measurement of `landscape` -> caption, what draws it, and what it has to hold for that.
MEASURED_FIGURES: dict[str, tuple[str, Callable[[Found, pathlib.Path], None], tuple[str, ...]]] = {
    "geometry": (
        "geometry: what LPA's perturbation, the same for all models, does to norm and loss at "
        "every layer",
        class_figures.over_layers,
        ("layers", "classes"),
    ),
    "amplification": (
        "amplification: mean gain of a perturbation injected at a row's layer, at a column's",
        measured_figures.amplification,
        ("layers", "maps"),
    ),
    "spectrum": (
        "density of the eigenvalues of the loss's Hessian in the weights",
        measured_figures.spectra,
        ("nodes", "weights"),
    ),
    "line": (
        "loss along random filter-normalised directions",
        measured_figures.lines,
        ("steps", "losses"),
    ),
}


class Section(NamedTuple):
    """One table and its figures: a setting, for domain generalization with one model selection.

    Attributes:
      title: heading.
      setting: the runs.
      results: of the runs, by method, the baseline first.
      seeds: those that count, by method.
      compared: the numbers, as `paired.compare` gives them.
      contrasts: differences that were asked for besides; empty if none.
      published: figures of others by method; empty if none can be compared.
      notes: what a reader must know beyond the numbers.
      figures: (caption, file) of the figures that there are.
    """

    title: str
    setting: Setting
    results: Results
    seeds: dict[str, list[int]]
    compared: pd.DataFrame
    contrasts: pd.DataFrame
    published: dict[str, str]
    notes: tuple[str, ...]
    figures: tuple[tuple[str, pathlib.Path], ...]

    @property
    def table(self) -> list[list[str]]:
        """Text cells, header first."""
        return tables.accuracy_table(self.compared, self.published)


def sections(
    settings: Sequence[Setting],
    baseline: str,
    pairs: Sequence[Pair],
    output: pathlib.Path,
    suffix: str = ".svg",
) -> list[Section]:
    """All tables; draws their figures into the folder, in the format of the suffix."""
    made = []
    for setting in settings:
        every = frame.tidy(setting.results)
        # The baseline first; the sort is stable.
        ordered = every.sort_values("method", key=lambda name: name != baseline, kind="stable")
        domains = sorted(every["domain"].dropna().unique(), key=runs.natural)
        for selection in frame.selections(every):
            values, left_out = frame.values_of(ordered, selection, domains)
            if values.empty:
                continue
            section = _section(setting, selection, values, left_out, baseline, pairs)
            drawn = _figures(section, baseline, output / "figures", suffix)
            made.append(section._replace(figures=drawn))
    return made


def _section(
    setting: Setting,
    selection: str | None,
    values: pd.DataFrame,
    left_out: Sequence[str],
    baseline: str,
    pairs: Sequence[Pair],
) -> Section:
    compared = paired.compare(values, baseline, tested=("accuracy",))
    contrasts, missing = paired.contrasts(values, pairs)
    title = setting.title if selection is None else f"{setting.title}, {_words(selection)}"
    comparable = (
        published.accuracies(setting.config) if selection in (None, runs.SELECTIONS[0]) else {}
    )
    accuracies = values[values["measure"] == "accuracy"].groupby("method", sort=False)["seed"]
    seeds = {method: sorted(own) for method, own in accuracies}
    lines = [*notes(compared, seeds, baseline), *left_out, *missing]
    lines += [f"Contrasts: {line}" for line in limits(contrasts)]
    lines += [PUBLISHED] if comparable else []
    results = {method: setting.results[method] for method in seeds}
    return Section(
        title, setting, results, seeds, compared, contrasts, comparable, tuple(lines), ()
    )


def _words(name: str) -> str:
    return name.replace("_", " ")


def _figures(
    section: Section, baseline: str, folder: pathlib.Path, suffix: str
) -> tuple[tuple[str, pathlib.Path], ...]:
    results, compared = section.results, section.compared
    evaluated_on = section.setting.config.get("evaluate_on", "test")
    drawn = (
        ("accuracy, mean and standard error", "accuracy",
         lambda path: figures.accuracy(compared, path)),
        (f"paired differences to {baseline}", "differences",
         lambda path: figures.differences(_tested(compared), f"difference to {baseline}", path)),
        ("paired differences of the contrasts", "contrasts",
         lambda path: figures.differences(section.contrasts, "difference", path)),
        ("accuracy by class", "per_class",
         lambda path: figures.per_class_accuracy(results, path)),
        ("training", "curves",
         lambda path: figures.training_curves(results, path, evaluated_on)),
        ("effect of the perturbations", "effects",
         lambda path: figures.effect_curves(results, path)),
        ("what the perturbations do to classes", "classes",
         lambda path: class_figures.over_epochs(results, path)),
    )  # fmt: skip
    slug = frame.slug(section.title)
    made = [
        (caption, path)
        for caption, name, draw in drawn
        if draw(path := folder / f"{slug}_{name}{suffix}")
    ]
    for name, (caption, draw, needed) in MEASURED_FIGURES.items():
        found = measured(section.setting, name, needed)
        if found:
            path = folder / f"{slug}_{name}{suffix}"
            draw(found, path)
            made.append((caption, path))
    return tuple(made)


def measured(setting: Setting, name: str, needed: Sequence[str]) -> Found:
    """What `landscape` left beside the runs, by method and seed, all with the same settings.

    Of several settings, the one of most runs counts. Files that lack a needed part do not count.
    """
    if "title" in setting.config:  # rows of a file, whose folders are not opened
        return {}
    by_settings: dict[str, dict[str, dict[int, Mapping[str, Any]]]] = {}
    for method, members in setting.runs.items():
        for run in members:
            try:
                content = read_measured(run.folder / MEASURED / f"{name}.json")
            except ValueError as error:
                print(f"not drawn: {error}", file=sys.stderr)
                continue
            found = {} if content is None else content["measured"]
            if {"values", *needed} <= set(found):
                one = by_settings.setdefault(repr(content["settings"]), {})
                one.setdefault(method, {})[run.config["seed"]] = found
    counted = sorted(by_settings.values(), key=lambda one: -sum(map(len, one.values())))
    return counted[0] if counted else {}


def _tested(compared: pd.DataFrame) -> pd.DataFrame:
    """The methods that are compared to the baseline."""
    rows = tables.accuracies(compared)
    return rows[rows["pairs"] > 0]


def notes(compared: pd.DataFrame, seeds: dict[str, list[int]], baseline: str) -> list[str]:
    """What limits the comparisons of a table."""
    everyone = sorted(set().union(*seeds.values()))
    lines = []
    if baseline not in seeds:
        lines.append(f"No run of the baseline {baseline}: no differences.")
    for method, own in seeds.items():
        lacking = [seed for seed in everyone if seed not in own]
        if lacking:
            lines.append(f"{method} lacks seeds that others have: {ranges(lacking)}.")
    tested = _tested(compared)
    for row in tested.itertuples():
        if row.pairs < len(everyone):
            lines.append(
                f"{row.method} and {baseline} are compared over their "
                f"{row.pairs} common seeds alone."
            )
    return lines + limits(tested)


def limits(compared: pd.DataFrame) -> list[str]:
    """What comparisons with few or equal seeds cannot show; rows with pairs."""
    rows = list(compared.itertuples())
    lines = []
    few = [row.method for row in rows if row.pairs < paired.FEWEST_PAIRS]
    if few:
        lines.append(
            f"Fewer than {paired.FEWEST_PAIRS} common seeds, so no interval and no test: "
            f"{', '.join(few)}."
        )
    tested = [row for row in rows if row.pairs >= paired.FEWEST_PAIRS]
    best = paired.holm([paired.smallest_p(row.pairs) for row in tested])
    hopeless = [
        f"{row.method} ({row.pairs})"
        for row, p_value in zip(tested, best, strict=True)
        if p_value >= paired.LEVEL
    ]
    if hopeless:
        where = "all of them" if len(hopeless) == len(tested) else ", ".join(hopeless)
        lines.append(
            "Too few common seeds for a Holm-corrected p-value below 0.05, however large the "
            f"difference (n seeds give at least 2^(1-n), the smallest of {len(tested)} p-values is "
            f"multiplied by {len(tested)}): {where}."
        )
    equal = [row.method for row in rows if row.difference_low == row.difference_high]
    if equal:
        lines.append(f"The same difference in every seed, so an interval of no width: "
                     f"{', '.join(equal)}.")  # fmt: skip
    return lines


def ranges(numbers: Sequence[int]) -> str:
    """Whole numbers in order, runs of three or more shortened.

    >>> ranges([0, 1, 2, 3, 7, 9, 10])
    '0-3, 7, 9, 10'
    """
    # Within a run of consecutive numbers, number - place is the same.
    grouped = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    parts = [[number for _, number in pairs] for _, pairs in grouped]
    return ", ".join(
        f"{part[0]}-{part[-1]}" if len(part) > 2 else ", ".join(map(str, part)) for part in parts
    )


def write(
    made: Sequence[Section],
    settings: Sequence[Setting],
    problems: Sequence[Problem],
    output: pathlib.Path,
) -> None:
    """Writes report.md, table.csv, runs.csv, table.tex; contrasts.csv, last_epoch.csv if any."""
    files.write_text(output / "report.md", markdown(made, problems, output))
    numbers = [(section.title, tables.accuracy_frame(section.compared)) for section in made]
    files.write_text(output / "table.csv", tables.csv_text(_by_setting(numbers)))
    asked = [section for section in made if not section.contrasts.empty]
    if asked:
        numbers = [(section.title, tables.contrast_frame(section.contrasts)) for section in asked]
        files.write_text(output / "contrasts.csv", tables.csv_text(_by_setting(numbers)))
    # All digits: with six, the tables would not be the same when they are made from the rows.
    rows = tables.csv_text(frame.rows_frame(settings), float_format=None)
    files.write_text(output / runs.ROWS, rows)
    last = frame.last_epoch_frame(settings)
    if not last.empty:
        files.write_text(output / "last_epoch.csv", tables.csv_text(last, float_format=None))
    latex = [tables.latex_table(section.table, section.title) for section in made]
    for section in asked:
        table = tables.contrast_table(section.contrasts)
        latex.append(tables.latex_table(table, f"{section.title}: contrasts"))
    files.write_text(output / "table.tex", "\n".join(latex))


def _by_setting(numbers: Sequence[tuple[str, pd.DataFrame]]) -> pd.DataFrame:
    """One below the other, the title of each in a first column."""
    named = [table.assign(setting=title) for title, table in numbers]
    joined = pd.concat(named, ignore_index=True)
    joined.insert(0, "setting", joined.pop("setting"))
    return joined


def seeds_table(section: Section) -> list[list[str]]:
    """Which seeds count for each method."""
    return [["method", "seeds"], *([name, ranges(own)] for name, own in section.seeds.items())]


def answer(section: Section) -> str:
    """What was compared, and the best method with its uncertainty, in words."""
    rows = tables.accuracies(section.compared).sort_values("mean", ascending=False)
    best, seeds = rows.iloc[0], {len(own) for own in section.seeds.values()}
    runs_of = f"{min(seeds)} to {max(seeds)}" if len(seeds) > 1 else f"{max(seeds)}"
    plural = "" if seeds == {1} else "s"
    if len(rows) == 1:
        return f"{best.method}: {tables.percent(best['mean'], best['se'])} %"
    text = f"Of {len(rows)} methods with {runs_of} seed{plural}, {best.method} has the best "
    text += f"accuracy, {tables.percent(best['mean'], best['se'])} %"
    if best.pairs >= paired.FEWEST_PAIRS:
        low, high = (f"{100 * best[end]:+.1f}" for end in ("difference_low", "difference_high"))
        text += f": {tables.percent(best.difference, np.nan, signed=True)} points to "
        text += f"{best.baseline} (95% interval {low} to {high}, p {best.p_holm:.2g} by Holm)"
    elif best.pairs:
        text += f": {tables.difference(best)} points to {best.baseline}; too few seeds for a test"
    return f"{text}."


def how_to_read(made: Sequence[Section]) -> list[str]:
    """What the columns of all tables mean, each line once."""
    every = [section.table for section in made]
    every += [tables.contrast_table(s.contrasts) for s in made if not s.contrasts.empty]
    return list(dict.fromkeys(line for table in every for line in tables.legend(table)))


def markdown(made: Sequence[Section], problems: Sequence[Problem], output: pathlib.Path) -> str:
    """The report in Markdown; figures are linked relative to the folder."""
    lines = ["# Report", ""]
    for section in made:
        lines += [f"## {section.title}", "", answer(section), ""]
        lines += [tables.markdown_table(section.table)]
        if not section.contrasts.empty:
            table = tables.contrast_table(section.contrasts)
            lines += ["Contrasts:", "", tables.markdown_table(table)]
        lines += [f"- {note}" for note in section.notes] + ([""] if section.notes else [])
        for caption, path in section.figures:
            lines += [f"![{section.title}: {caption}]({path.relative_to(output).as_posix()})", ""]
        lines += ["Seeds:", "", tables.markdown_table(seeds_table(section))]
    lines += ["## How to read the tables", "", *(f"- {line}" for line in how_to_read(made)), ""]
    lines += ["## Not counted", ""]
    lines += [f"- `{problem.folder}`: {problem.reason}" for problem in problems] or ["Nothing."]
    return "\n".join(lines) + "\n"
