r"""Tables, figures and statistics from any result folders.

    python -m experiments.report runs/long_tail runs/balanced --output=runs/report

Finds every run below the folders and groups them by setting: runs that differ in nothing but
method, seed, options and test domain are compared in one table, by paired seeds, with standard
errors, bootstrap intervals and Holm-corrected Wilcoxon tests. Writes report.md, table.csv (numbers
of the tables), runs.csv (one line a run), table.tex and figures; `--html` adds report.html, one
page that needs nothing else. `--compare=lpa:lpl,lpa+lpl:lpa` adds those differences to every table
that has both methods, Holm-corrected among themselves alone (contrasts.csv): name beforehand what
is to be tested, and the correction is for that and not for a table of twenty methods. What
`landscape` measured of the runs (geometry, amplification, spectrum, loss along lines) is drawn
where it stands beside them. Runs that are incomplete, failed or unreadable are listed, never
counted.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags

from experiments.methods.names import ERM
from experiments.reporting import (
    contrasts,
    summary,
)
from experiments.reporting import (
    html as report_html,
)
from experiments.reporting import (
    runs as report_data,
)
from experiments.reporting import (
    sections as report_tables,
)
from experiments.runtime import files

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Flags of this module."""
    flags.DEFINE_string("output", "runs/report", "Folder for what is written.")
    flags.DEFINE_string("baseline", ERM, "Method that the others are compared to.")
    flags.DEFINE_list(
        "compare",
        [],
        "METHOD:METHOD,...: differences to be tested besides those to the baseline, corrected for "
        "each other only.",
    )
    flags.DEFINE_bool("html", False, "Also write report.html, one page with everything in it.")


def make(
    folders: list[pathlib.Path],
    output: pathlib.Path,
    baseline: str = ERM,
    page: bool = False,
    pairs: Sequence[contrasts.Pair] = (),
) -> list[report_tables.Section]:
    """Reads the runs below the folders and writes the report; returns its sections.

    Prints what is not counted on standard error.

    Args:
      folders: with runs anywhere below.
      output: folder for what is written.
      baseline: method that the others are compared to.
      page: whether to write report.html.
      pairs: of methods, whose differences are tested besides.

    Raises:
      ValueError: a folder does not exist, or holds no complete run, or no table shows a pair.
    """
    runs, problems = report_data.collect(folders)
    for problem in problems:
        print(f"not counted: {problem.folder}: {problem.reason}", file=sys.stderr)
    if not runs:
        names = ", ".join(str(folder) for folder in folders)
        raise ValueError(f"no complete run in {names} ({len(problems)} not counted)")
    settings = report_data.group(runs)
    contrasts.check(pairs, set().union(*(setting.runs for setting in settings)))
    sections = report_tables.sections(settings, baseline, pairs, output)
    report_tables.write(sections, runs, problems, output)
    if page:
        files.write_text(output / "report.html", report_html.page(sections, runs, problems))
    return sections


def main(argv: list[str]) -> None:
    """Entry point."""
    folders = [pathlib.Path(name) for name in argv[1:]]
    output = pathlib.Path(FLAGS.output)
    try:
        if not folders:
            raise ValueError("name at least one folder of results")
        pairs = contrasts.parse(FLAGS.compare)
        sections = make(folders, output, FLAGS.baseline, FLAGS.html, pairs)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for section in sections:
        print(f"\n{section.title}\n\n{summary.markdown_table(section.table)}", end="")
        if section.contrasts:
            table = contrasts.text_table(section.contrasts)
            print(f"\n{summary.markdown_table(table)}", end="")
        print("".join(f"- {note}\n" for note in section.notes), end="")
    print(f"\nWritten to {output}")


if __name__ == "__main__":
    define_flags()
    # Folders and flags may come in any order.
    FLAGS.set_gnu_getopt(True)
    app.run(main)
