"""A report's sections, and its text: Markdown, CSV, LaTeX."""

import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from experiments.methods import published
from experiments.reporting import (
    contrasts,
    geometry_plots,
    report_measured,
    summary,
)
from experiments.reporting import (
    figures as plots,
)
from experiments.reporting import (
    paired as statistics,
)
from experiments.reporting import (
    runs as report_data,
)
from experiments.reporting.contrasts import Contrast, Pair
from experiments.reporting.runs import Problem, Run, Setting
from experiments.reporting.summary import Results, Summary
from experiments.runtime import files

PUBLISHED = (
    "published: accuracies of other authors' runs; sources and protocols in `experiments/recipes`. "
    "Seeds, subsets and details differ."
)


class Section(NamedTuple):
    """One table and its figures: a setting, for domain generalization with one model selection.

    Attributes:
      title: heading.
      slug: the same for file names.
      setting: the runs.
      results: what the table summarizes, by method.
      summary: its numbers.
      contrasts: differences that were asked for besides; empty if none.
      published: figures of others by method; empty if none can be compared.
      notes: what a reader must know beyond the numbers.
      figures: (caption, file) of the figures that there are.
    """

    title: str
    slug: str
    setting: Setting
    results: Results
    summary: Summary
    contrasts: tuple[Contrast, ...]
    published: dict[str, str]
    notes: tuple[str, ...]
    figures: tuple[tuple[str, pathlib.Path], ...]

    @property
    def table(self) -> list[list[str]]:
        """Text cells, header first."""
        return summary.text_table(self.summary, self.published)


def sections(
    settings: Sequence[Setting], baseline: str, pairs: Sequence[Pair], output: pathlib.Path
) -> list[Section]:
    """All tables; draws their figures into the folder."""
    made = []
    for setting in settings:
        if not setting.domains:
            results = report_data.results_of(setting)
            made.append(_section(setting, None, results, (), baseline, pairs, output))
            continue
        for selection in report_data.selections(setting) or (None,):
            results, left_out = report_data.domain_results(setting, selection)
            if results:
                made.append(
                    _section(setting, selection, results, left_out, baseline, pairs, output)
                )
    return made


def _section(
    setting: Setting,
    selection: str | None,
    results: Results,
    left_out: Sequence[str],
    baseline: str,
    pairs: Sequence[Pair],
    output: pathlib.Path,
) -> Section:
    # The baseline first; the sort is stable.
    results = dict(sorted(results.items(), key=lambda item: item[0] != baseline))
    numbers = summary.summarize(results, baseline)
    compared = contrasts.contrasts(results, pairs)
    title = setting.title
    if selection is not None:
        title += f", {selection.replace('_', ' ')}"
    slug = report_data.slug(title)
    config = setting.config.get("settings", setting.config)
    drawn = (
        ("accuracy, mean and standard error", "accuracy",
         lambda path: plots.accuracy_bars(numbers, path)),
        (f"paired differences to {baseline}", "differences",
         lambda path: plots.differences(_compared(numbers), f"difference to {baseline}", path)),
        ("paired differences of the contrasts", "contrasts",
         lambda path: plots.differences(compared, "difference", path)),
        ("accuracy by class", "per_class",
         lambda path: plots.per_class_accuracy(results, path)),
        ("training", "curves",
         lambda path: plots.training_curves(results, path, config.get("evaluate_on", "test"))),
        ("effect of the perturbations", "effects",
         lambda path: plots.effect_curves(results, path)),
        ("what the perturbations do to classes", "classes",
         lambda path: geometry_plots.over_epochs(results, path)),
    )  # fmt: skip
    figures = tuple(
        (caption, path)
        for caption, name, draw in drawn
        if draw(path := output / "figures" / f"{slug}_{name}.png")
    ) + tuple(report_measured.figures(setting, output, slug))
    comparable = (
        {} if selection not in (None, report_data.SELECTION) else published.accuracies(config)
    )
    lines = [*notes(numbers), *left_out, *contrasts.missing(results, pairs)]
    lines += [f"Contrasts: {line}" for line in limits(compared)]
    lines += [PUBLISHED] if comparable else []
    return Section(
        title, slug, setting, results, numbers, compared, comparable, tuple(lines), figures
    )


def _compared(table: Summary) -> list[Contrast]:
    """The methods of a table against its baseline."""
    return [
        Contrast(row.method, row.comparison, row.p_holm)
        for row in table.rows
        if row.comparison is not None
    ]


def notes(table: Summary) -> list[str]:
    """What limits the comparisons of a table."""
    everyone = sorted(set().union(*(row.seeds for row in table.rows)))
    lines = []
    if all(row.method != table.baseline for row in table.rows):
        lines.append(f"No run of the baseline {table.baseline}: no differences.")
    for row in table.rows:
        lacking = [seed for seed in everyone if seed not in row.seeds]
        if lacking:
            lines.append(f"{row.method} lacks seeds that others have: {ranges(lacking)}.")
    for row in table.rows:
        if row.comparison is not None and row.comparison.pairs < len(everyone):
            lines.append(
                f"{row.method} and {table.baseline} are compared over their "
                f"{row.comparison.pairs} common seeds alone."
            )
    return lines + limits(_compared(table))


def limits(compared: Sequence[Contrast]) -> list[str]:
    """What comparisons with few or equal seeds cannot show."""
    lines = []
    single = [line.name for line in compared if line.comparison.pairs == 1]
    if single:
        lines.append(f"One common seed, so no interval and no test: {', '.join(single)}.")
    tested = [line for line in compared if line.comparison.pairs > 1]
    best = statistics.holm([statistics.smallest_p(line.comparison.pairs) for line in tested])
    hopeless = [
        f"{line.name} ({line.comparison.pairs})"
        for line, p_value in zip(tested, best, strict=True)
        if p_value >= statistics.LEVEL
    ]
    if hopeless:
        where = "all of them" if len(hopeless) == len(tested) else ", ".join(hopeless)
        lines.append(
            "Too few common seeds for a Holm-corrected p-value below 0.05, however large the "
            f"difference (n seeds give at least 2^(1-n), the smallest of {len(tested)} p-values is "
            f"multiplied by {len(tested)}): {where}."
        )
    equal = [line.name for line in compared if line.comparison.low == line.comparison.high]
    if equal:
        lines.append(f"The same difference in every seed, so an interval of no width: "
                     f"{', '.join(equal)}.")  # fmt: skip
    return lines


def ranges(numbers: Sequence[int]) -> str:
    """Whole numbers in order, runs of three or more shortened.

    >>> ranges([0, 1, 2, 3, 7, 9, 10])
    '0-3, 7, 9, 10'
    """
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    texts = [
        [f"{part[0]}-{part[-1]}"] if len(part) > 2 else [str(number) for number in part]
        for part in parts
    ]
    return ", ".join(text for group in texts for text in group)


def write(
    made: Sequence[Section], runs: Sequence[Run], problems: Sequence[Problem], output: pathlib.Path
) -> None:
    """Writes report.md, table.csv, runs.csv, table.tex and, if any, contrasts.csv."""
    files.write_text(output / "report.md", markdown(made, problems, output))
    tables = [(section.title, summary.frame(section.summary)) for section in made]
    files.write_text(output / "table.csv", summary.csv_text(_by_setting(tables)))
    compared = [section for section in made if section.contrasts]
    if compared:
        tables = [(section.title, contrasts.frame(section.contrasts)) for section in compared]
        files.write_text(output / "contrasts.csv", summary.csv_text(_by_setting(tables)))
    files.write_text(output / "runs.csv", summary.csv_text(runs_frame(runs)))
    latex = [summary.latex_table(section.table, section.title) for section in made]
    for section in compared:
        table = contrasts.text_table(section.contrasts)
        latex.append(summary.latex_table(table, f"{section.title}: contrasts"))
    files.write_text(output / "table.tex", "\n".join(latex))


def _by_setting(tables: Sequence[tuple[str, pd.DataFrame]]) -> pd.DataFrame:
    """One below the other, the title of each in a first column."""
    named = [table.assign(setting=title) for title, table in tables]
    joined = pd.concat(named, ignore_index=True)
    joined.insert(0, "setting", joined.pop("setting"))
    return joined


def runs_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """One line a run, for statistics of one's own."""
    return pd.DataFrame.from_records(
        [
            {
                "folder": str(run.folder),
                "method": run.config["method"],
                "seed": run.config["seed"],
                "test_domain": run.domain,
                "accuracy": run.result["accuracy"],
                **run.result.get("group_accuracy", {}),
                **run.result["selections"],
                "seconds": run.result.get("seconds", math.nan),
            }
            for run in runs
        ]
    )


def seeds_table(section: Section) -> list[list[str]]:
    """Which seeds count for each method."""
    return [["method", "seeds"], *([r.method, ranges(r.seeds)] for r in section.summary.rows)]


def markdown(made: Sequence[Section], problems: Sequence[Problem], output: pathlib.Path) -> str:
    """The report in Markdown; figures are linked relative to the folder."""
    lines = ["# Report", ""]
    for section in made:
        lines += [f"## {section.title}", "", summary.markdown_table(section.table)]
        if section.contrasts:
            table = contrasts.text_table(section.contrasts)
            lines += ["Contrasts:", "", summary.markdown_table(table)]
        lines += [f"- {note}" for note in section.notes] + ([""] if section.notes else [])
        for caption, path in section.figures:
            lines += [f"![{section.title}: {caption}]({path.relative_to(output).as_posix()})", ""]
        lines += ["Seeds:", "", summary.markdown_table(seeds_table(section))]
    lines += ["## How to read the tables", "", summary.LEGEND, ""]
    lines += ["## Not counted", ""]
    lines += [f"- `{problem.folder}`: {problem.reason}" for problem in problems] or ["Nothing."]
    return "\n".join(lines) + "\n"
