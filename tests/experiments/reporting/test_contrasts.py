"""Contrasts that a reader names beforehand, by hand and from the command line of the report."""

import csv

import numpy as np
import pandas as pd
import pytest

from experiments import report
from experiments.reporting import frame, paired, sections
from tests.helpers import made_up_runs, module_call

ACCURACIES = {
    "erm": [0.60, 0.62, 0.61, 0.63, 0.60, 0.62, 0.61, 0.63],
    "lpl": [0.61, 0.64, 0.60, 0.64, 0.62, 0.65, 0.63, 0.64],
    "lpa": [0.65, 0.66, 0.67, 0.66, 0.64, 0.67, 0.66, 0.68],
    "lpa+lpl": [0.66, 0.66, 0.66, 0.67, 0.65, 0.68],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of two settings; the second has no run of lpl."""
    root = tmp_path_factory.mktemp("runs")
    made_up_runs.write_many(root / "a", ACCURACIES)
    few = {"erm": [0.5], "lpa": [0.6]}
    made_up_runs.write_many(root / "b", few, settings={"epochs": 9})
    return root


@pytest.fixture(scope="module")
def made(runs, tmp_path_factory):
    """(folder of the report, what the command printed)."""
    output = tmp_path_factory.mktemp("out")
    asked = ("--html", "--compare=lpa:lpl,lpa+lpl:lpa", f"--output={output}")
    message, printed = module_call.call(report, *asked, str(runs))
    assert message is None
    return output, printed


def test_contrasts_are_paired_on_common_seeds_and_holm_counts_them_alone(made):
    output, printed = made
    with (output / "contrasts.csv").open() as file:
        first, second = csv.DictReader(file)
    lpa, lpl, both = (np.array(ACCURACIES[name]) for name in ("lpa", "lpl", "lpa+lpl"))
    p_values = []
    for row, differences in ((first, lpa - lpl), (second, both - lpa[:6])):
        differences = np.round(differences, 6)
        standard = np.std(differences, ddof=1) / np.sqrt(len(differences))
        assert float(row["difference_mean"]) == pytest.approx(differences.mean(), rel=1e-5)
        assert float(row["difference_se"]) == pytest.approx(standard, rel=1e-5)
        assert int(row["pairs"]) == len(differences)
        assert int(row["first_is_higher"]) == (differences > 0).sum()
        p_values.append(float(row["p_value"]))
    assert p_values[0] == pytest.approx(2**-7, rel=1e-5)
    # Holm over two tests, although the table beside them has three.
    assert float(first["p_holm"]) == pytest.approx(2 * p_values[0], rel=1e-5)
    assert float(second["p_holm"]) == pytest.approx(p_values[1], rel=1e-5)
    rows = [cells for cells in module_call.printed_rows(printed) if " - " in cells[0]]
    assert [cells[0] for cells in rows] == ["lpa - lpl", "lpa+lpl - lpa"]
    assert "+3.3±0.6" in rows[0] and "8 of 8" in rows[0] and "4 of 6" in rows[1]


def test_every_form_of_the_report_has_the_contrasts(made):
    output, _ = made
    for name, expected in (
        ("report.md", "| lpa - lpl | 8 |"),
        ("table.tex", "lpa - lpl & 8 &"),
        ("report.html", "<td>lpa - lpl</td><td>8</td>"),
    ):
        assert expected in (output / name).read_text(encoding="utf-8")
    figures = (output / "figures").glob("*_contrasts.svg")
    assert len(list(figures)) == 1, "the setting without lpl has no such figure"
    text = (output / "report.md").read_text(encoding="utf-8")
    assert "- lpa - lpl: no run of lpl in this setting." in text
    assert "- vs erm: mean difference to erm over seeds" in text
    assert "- difference: mean difference to the second method over seeds" in text


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--compare=lpa", "--compare must name pairs METHOD:METHOD, got 'lpa'"),
        ("--compare=lpa:", "got 'lpa:'"),
        ("--compare=lpa:lpa", "got 'lpa:lpa'"),
        ("--compare=lpa:lpl:erm", "got 'lpa:lpl:erm'"),
        ("--compare=lpa:lpl,lpl:lpa", "--compare must name each pair once, got 'lpa:lpl' twice"),
        ("--baseline=lpk", "--baseline must name methods with runs (erm, lpa, lpa+lpl, lpl), got"),
        (
            "--compare=lpa:lpk",
            "--compare must name methods with runs (erm, lpa, lpa+lpl, lpl), got 'lpk'",
        ),
    ],
)
def test_a_wrong_contrast_is_one_line_and_nothing_is_written(runs, tmp_path, argument, expected):
    out = tmp_path / "out"
    message, _ = module_call.call(report, argument, f"--output={out}", str(runs))
    assert expected in message and "\n" not in message
    assert not out.exists()


def test_pairs_without_a_common_seed_are_named_and_not_tested():
    results = {
        "a": [{"seed": 0, "accuracy": 0.5}],
        "b": [{"seed": 1, "accuracy": 0.5}],
        "c": [{"seed": 0, "accuracy": 0.25}],
    }
    pairs = (("a", "b"), ("a", "c"), ("a", "d"))
    values, _ = frame.values_of(frame.tidy(results))
    made, left_out = paired.contrasts(values, pairs)
    (row,) = made.itertuples()
    assert row.method == "a - c" and row.difference == 0.25
    assert left_out == ["a - b: no common seed.", "a - d: no run of d in this setting."]


def test_a_comparison_is_hopeless_only_if_no_outcome_could_be_significant():
    """Six seeds of one contrast are enough beside eight of another, but not beside six."""

    def made(name, pairs):
        results = {
            "x": [{"seed": s, "accuracy": 0.6 + 0.01 * s} for s in range(pairs)],
            "y": [{"seed": s, "accuracy": 0.5} for s in range(pairs)],
        }
        values, _ = frame.values_of(frame.tidy(results))
        return paired.contrasts(values, [("x", "y")])[0].assign(method=name)

    # Holm: 2 * 2^-7 = 0.016 and then 1 * 2^-5 = 0.031.
    assert sections.limits(pd.concat([made("eight", 8), made("six", 6)])) == []
    (line,) = sections.limits(pd.concat([made("one", 6), made("two", 6)]))
    assert line.endswith("all of them.")
