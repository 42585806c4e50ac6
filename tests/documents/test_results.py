"""What results/ holds is small, reachable from its index, and drawn from its own tables."""

import csv
import re
import runpy

import jax
import matplotlib as mpl
import pytest

from experiments.reporting import runs, style
from tests.helpers import commands
from tests.helpers.drawn_texts import problems
from tests.helpers.paths import DOCS, ROOT

RESULTS = ROOT / "results"
FILES = [path for path in RESULTS.rglob("*") if path.is_file()]
PAGES = sorted(RESULTS.rglob("README.md"))
# What the pages leave to the reader: methods, imbalance, images a class, epochs, a cosine, flags.
CHOICES = {"M": "erm,lpa", "R": "100", "N": "20", "EPOCHS": "2", "K": "0.1", "D": "",
           "O": "lpa.examples=0.25", "T": "0.2", "SIGNS": "all_negative"}  # fmt: skip
DRAWN = [*RESULTS.rglob("*.svg"), *(DOCS / "figures").glob("*.svg")]
TRAINED = DOCS / "figures" / "two_classes.svg"  # by a script of its own


def rows_of(path):
    """The rows of a CSV."""
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def test_it_takes_at_most_five_megabytes():
    assert sum(path.stat().st_size for path in FILES) <= 5e6


def test_the_index_is_short_and_names_every_folder_that_has_a_page():
    index = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert len(index.splitlines()) <= 95
    linked = set(re.findall(r"\]\(([\w/]+?)/?\)", index))
    pages = {path.parent.relative_to(RESULTS).as_posix() for path in PAGES}
    assert linked == pages - {"."}


def test_report_reads_every_row_of_the_committed_runs():
    rows = [row for path in RESULTS.rglob("runs*.csv") for row in runs.read_rows(path)]
    assert rows and not [row for row in rows if isinstance(row, runs.Problem)]


def test_every_figure_is_shown_on_a_page():
    pages = [*RESULTS.rglob("*.md"), *DOCS.glob("*.md"), ROOT / "README.md"]
    for figure in DRAWN + [path for path in FILES if path.suffix in (".png", ".jpg")]:
        assert any(figure.name in page.read_text(encoding="utf-8") for page in pages), figure


def test_the_script_draws_every_figure_from_the_committed_tables(monkeypatch):
    drawn = []
    monkeypatch.setattr(style, "save", lambda figure, path: drawn.append(path))
    with mpl.rc_context():
        runpy.run_path(str(DOCS / "figures" / "make.py"))["main"]()
    assert sorted([*drawn, TRAINED]) == sorted(DRAWN)


@pytest.fixture
def problems_of(monkeypatch):
    """Path -> what texts of a figure overlap; filled instead of drawing files."""
    found = {}
    monkeypatch.setattr(style, "write_figure", lambda f, path: found.update({path: problems(f)}))
    with mpl.rc_context():
        yield found


@pytest.mark.slow
def test_no_texts_of_a_committed_figure_overlap(problems_of):
    runpy.run_path(str(DOCS / "figures" / "make.py"))["main"]()
    assert len(problems_of) > 5 and not any(problems_of.values())


@pytest.mark.slow
def test_the_figure_of_two_classes_comes_from_training_that_gives_the_readmes_numbers(
    problems_of, capsys
):
    with jax.numpy_rank_promotion("allow"):
        runpy.run_path(str(TRAINED.with_suffix(".py")))["main"]()
    assert problems_of == {TRAINED: []} and TRAINED.stat().st_size < 300_000
    (frequent, rare), (frequent_lpa, rare_lpa) = re.findall(
        r"\[([\d.]+) ([\d.]+)\]", capsys.readouterr().out
    )
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"rare {rare} and {rare_lpa} %, frequent {frequent} and {frequent_lpa} %" in readme


@pytest.mark.parametrize(
    "folder",
    [
        "long_tail/mlp_40_trials",
        "long_tail/resnet8_slim_40_trials",
        "long_tail/mlp",
        "long_tail/resnet8_slim",
        "long_tail/small_cnn_cifar10",
        "long_tail/small_cnn_cifar10_augmented",
        "balanced/mlp",
        "balanced/resnet8_slim",
        "balanced/resnet8_slim_cifar10",
        "balanced/small_cnn_cifar10",
        "balanced/small_cnn_cifar10_augmented",
        "domains/small_cnn",
        "domains/mlp",
    ],
)
def test_the_first_table_of_a_page_is_that_of_its_csv(folder):
    """Every accuracy in a page's first table is in a table.csv of the folder, to two digits."""
    rows = []
    for path in (RESULTS / folder).rglob("table.csv"):
        rows += rows_of(path)
    known = [
        (100 * float(row[f"{measure}_mean"]), 100 * float(row[f"{measure}_se"]))
        for row in rows
        for measure in ("accuracy", "many", "medium", "few")
        if row.get(f"{measure}_mean")
    ]
    page = (RESULTS / folder / "README.md").read_text(encoding="utf-8")
    table = re.search(r"(?:^\|.*\n)+", page, flags=re.MULTILINE).group()
    shown = re.findall(r"\| (\d\d\.\d\d)±(\d\.\d\d)", table)
    assert len(shown) >= 8
    for mean, error in shown:
        both = (float(mean), float(error))
        assert any(both == pytest.approx(row, abs=0.0051) for row in known), both


def commands_of(page):
    """The commands of a page in one line each, its shell variables and CHOICES replaced."""
    values, text = dict(CHOICES), page.read_text(encoding="utf-8")
    for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            assigned = re.match(r'([A-Z]+)=(?:"([^"]*)"|(\S+))', line)
            if assigned:
                values[assigned[1]] = assigned[2] or assigned[3]
            elif line.startswith("python "):
                yield re.sub(r"\$([A-Z]+)", lambda name: values[name[1]], line)


@pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.parent.relative_to(RESULTS).as_posix()
)
def test_the_commands_of_a_page_have_flags_that_exist(page, tmp_path):
    for number, command in enumerate(commands_of(page)):
        # The files that a search wrote are not here under the names that it gave them.
        made = re.sub(r"--hparams=\S+", "--hparams=none", command).replace(",...", "")
        commands.check(re.sub(r"\s+", " ", made), tmp_path / str(number))
