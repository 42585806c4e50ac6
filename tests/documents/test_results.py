"""What results/ holds is small, reachable from its index, and drawn from its own tables."""

import csv
import re
import runpy

import matplotlib as mpl
import pytest

from tests.helpers.paths import DOCS, ROOT

RESULTS = ROOT / "results"
FILES = [path for path in RESULTS.rglob("*") if path.is_file()]
DRAWN = [*RESULTS.rglob("*.svg"), *(DOCS / "figures").glob("*.svg")]


def test_it_takes_at_most_five_megabytes():
    assert sum(path.stat().st_size for path in FILES) <= 5e6


def test_the_index_is_short_and_names_every_folder_that_has_a_page():
    index = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert len(index.splitlines()) <= 95
    linked = set(re.findall(r"\]\(([\w/]+?)/?\)", index))
    pages = {path.parent.relative_to(RESULTS).as_posix() for path in RESULTS.rglob("README.md")}
    assert linked == pages - {"."}


def test_every_figure_is_shown_on_a_page():
    pages = [*RESULTS.rglob("*.md"), *DOCS.glob("*.md"), ROOT / "README.md"]
    for figure in DRAWN + [path for path in FILES if path.suffix in (".png", ".jpg")]:
        assert any(figure.name in page.read_text(encoding="utf-8") for page in pages), figure


def test_the_script_draws_every_figure_from_the_committed_tables(tmp_path, monkeypatch):
    with mpl.rc_context():
        names = runpy.run_path(str(DOCS / "figures" / "make.py"))
        drawn = []
        functions = names["main"].__globals__
        monkeypatch.setitem(functions, "save", lambda figure, path: drawn.append(path))
        names["main"]()
    assert sorted(drawn) == sorted(DRAWN)


@pytest.mark.parametrize(
    "folder", ["long_tail/mlp_40_trials", "long_tail/mlp", "long_tail/resnet8_slim"]
)
def test_the_table_of_a_page_is_that_of_its_csv(folder):
    """Every accuracy of a page's first table is in the folder's table.csv, to two digits."""
    with (RESULTS / folder / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    known = [(100 * float(row["accuracy_mean"]), 100 * float(row["accuracy_se"])) for row in rows]
    page = (RESULTS / folder / "README.md").read_text(encoding="utf-8")
    table = re.search(r"(?:^\|.*\n)+", page, flags=re.MULTILINE).group()
    shown = re.findall(r"\| (\d\d\.\d\d) \+- (\d\.\d\d)", table)
    assert len(shown) >= 4
    for mean, error in shown:
        both = (float(mean), float(error))
        assert any(both == pytest.approx(row, abs=0.0051) for row in known), both
