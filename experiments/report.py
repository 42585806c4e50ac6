r"""Tables, figures and statistics from any result folders.

    python -m experiments.report runs/long_tail runs/balanced --output=runs/report

Finds every run below the folders and groups them by setting: runs that differ in nothing but
method, seed, options and test domain are compared in one table, by paired seeds, with standard
errors, bootstrap intervals and Holm-corrected Wilcoxon tests. Writes report.md, table.csv (numbers
of the tables), runs.csv (one line a run), table.tex and figures; `--html` adds report.html, one
page that needs nothing else. Runs that are incomplete, failed or unreadable are listed, never
counted.
"""

import pathlib
import sys

from absl import app, flags

from experiments import files, report_data, report_html, report_tables, summary
from experiments.methods import ERM

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Flags of this module."""
    flags.DEFINE_string("output", "runs/report", "Folder for what is written.")
    flags.DEFINE_string("baseline", ERM, "Method that the others are compared to.")
    flags.DEFINE_bool("html", False, "Also write report.html, one page with everything in it.")


def make(
    folders: list[pathlib.Path], output: pathlib.Path, baseline: str = ERM, page: bool = False
) -> list[report_tables.Section]:
    """Reads the runs below the folders and writes the report; returns its sections.

    Prints what is not counted on standard error.

    Raises:
      ValueError: a folder does not exist, or holds no complete run.
    """
    runs, problems = report_data.collect(folders)
    for problem in problems:
        print(f"not counted: {problem.folder}: {problem.reason}", file=sys.stderr)
    if not runs:
        names = ", ".join(str(folder) for folder in folders)
        raise ValueError(f"no complete run in {names} ({len(problems)} not counted)")
    sections = report_tables.sections(report_data.group(runs), baseline, output)
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
        sections = make(folders, output, FLAGS.baseline, FLAGS.html)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for section in sections:
        print(f"\n{section.title}\n\n{summary.markdown_table(section.table)}", end="")
        print("".join(f"- {note}\n" for note in section.notes), end="")
    print(f"\nWritten to {output}")


if __name__ == "__main__":
    define_flags()
    # Folders and flags may come in any order.
    FLAGS.set_gnu_getopt(True)
    app.run(main)
