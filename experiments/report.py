r"""Tables, figures and statistics from any result folders.

    python -m experiments.report runs/long_tail runs/balanced --output=runs/report

Finds every run below the folders and groups them by setting: runs that differ in nothing but
method, seed, options and test domain are compared in one table, by paired seeds, with standard
errors, bootstrap intervals and Holm-corrected Wilcoxon tests. Writes report.md, table.csv (numbers
of the tables), runs.csv (one line a run), last_epoch.csv (what the runs logged last about training
and perturbations), table.tex and figures; `--html` adds report.html, one page that needs no other
file. `--compare=lpa:lpl,lpa+lpl:lpa` adds those differences to every table
that has both methods, Holm-corrected among themselves alone (contrasts.csv): name the comparisons
beforehand, and the correction is not for a table of twenty methods. If `landscape` measured the
runs (geometry, amplification, spectrum, loss along lines), the report draws that too. Runs that are
incomplete, failed or unreadable are listed and not counted.

    python -m experiments.report results/long_tail/mlp --output=/tmp/report

A folder without runs but with a runs.csv gives the same tables, and the figures that need no
more than accuracies: rows have no training curves, no accuracies of single classes, no settings.
"""

import itertools
import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from experiments.methods.names import ERM
from experiments.reporting import frame, html, paired, runs, screen, sections, tables
from experiments.runtime import files
from experiments.runtime import main as entry_point

FLAGS = flags.FLAGS


def define_flags() -> None:
    files.define_path("output", "runs/report", "Folder for what is written.", folder=True)
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
    pairs: Sequence[paired.Pair] = (),
    suffix: str = ".svg",
) -> list[sections.Section]:
    """Reads the runs below the folders and writes the report; returns its sections.

    Prints what is not counted on standard error.

    Args:
      folders: with runs anywhere below, or with the rows of an earlier report, or such rows.
      output: folder for what is written.
      baseline: method that the others are compared to.
      page: whether to write report.html.
      pairs: of methods, whose differences are tested besides.
      suffix: format of the figures, .png or .svg.

    Raises:
      ValueError: a folder does not exist, or holds no complete run, or no table shows a pair.
    """
    found, problems = runs.collect(folders)
    for problem in problems:
        print(f"not counted: {problem.folder}: {problem.reason}", file=sys.stderr)
    for line in runs.damaged_logs(folders):
        print(f"damaged log: {line}; tables need none", file=sys.stderr)
    if not found:
        names = ", ".join(str(folder) for folder in folders)
        raise ValueError(f"no complete run in {names} ({len(problems)} not counted)")
    settings = frame.group(found)
    methods = set().union(*(setting.runs for setting in settings))
    paired.check_methods("compare", itertools.chain(*pairs), methods)
    if baseline != ERM:  # the default: a report of other methods has no differences
        paired.check_methods("baseline", [baseline], methods)
    made = sections.sections(settings, baseline, pairs, output, suffix)
    sections.write(made, settings, problems, output)
    if page:
        files.write_text(output / "report.html", html.page(made, found, problems))
    return made


def main(argv: list[str]) -> None:
    output = pathlib.Path(FLAGS.output)
    try:
        folders = [pathlib.Path(files.local_path(name)) for name in argv[1:]]
        if not folders:
            raise ValueError("name at least one folder of results")
        pairs = paired.parse_pairs(FLAGS.compare)
        made = make(folders, output, FLAGS.baseline, FLAGS.html, pairs)
    except (ValueError, OSError) as error:
        sys.exit(entry_point.refusal(error))
    for section in made:
        screen.show(f"\n{section.title}\n")
        screen.show_table(section.table, tables.SECONDARY)
        if not section.contrasts.empty:
            screen.show()
            screen.show_table(tables.contrast_table(section.contrasts), tables.SECONDARY)
        for note in section.notes:
            screen.show(note)
    screen.show(f"\nWritten to {output}")


if __name__ == "__main__":
    # Folders and flags may come in any order.
    FLAGS.set_gnu_getopt(True)
    entry_point.start(define_flags, main)
