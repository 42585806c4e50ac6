"""Reports of made-up result folders."""

import base64
import contextlib
import csv
import hashlib
import html.parser
import json
import pathlib
import re

import numpy as np
import pandas as pd
import pytest
from absl import flags

from experiments import report
from experiments.reporting import frame, runs, sections, tables
from experiments.runtime import files
from experiments.training.folder import write_measured
from tests.helpers import drawn_texts, made_up_runs
from tests.helpers.module_call import printed_rows, run_main
from tests.helpers.paths import ROOT

FLAGS = flags.FLAGS


ACCURACIES = {
    "erm": [0.60, 0.62, 0.61, 0.63, 0.60, 0.62, 0.61, 0.63],
    "lpa": [0.65, 0.66, 0.67, 0.66, 0.64, 0.67, 0.66, 0.68],
    "manifold_mixup@input|hidden1": [0.61, 0.61, 0.62, 0.62],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report of two settings, and the folder it stands in."""
    root = tmp_path_factory.mktemp("report")
    made_up_runs.write_many(root / "runs" / "lt", ACCURACIES)
    made_up_runs.write_many(root / "runs" / "other", {"erm": [0.5]}, settings={"epochs": 9})
    output = root / "out"
    return report.make([root / "runs"], output), output


@pytest.fixture(autouse=True)
def _figures(request):
    """Figures are drawn where a test says so."""
    with contextlib.nullcontext() if "drawn" in request.fixturenames else drawn_texts.undrawn():
        yield


@pytest.fixture
def drawn():
    """Has the figures of a test drawn."""


@pytest.fixture
def command(capsys):
    """(*arguments) -> (exit message or None, standard output, standard error)."""

    def run(*arguments):
        FLAGS.set_gnu_getopt(True)
        message = run_main(report, *map(str, arguments))
        FLAGS.set_gnu_getopt(False)
        return message, *capsys.readouterr()

    return run


def test_runs_are_one_table_a_setting_and_titles_say_what_differs(made):
    found, _ = made
    assert [section.title for section in found] == [
        "digits, exponential 10:1, mlp, test accuracy, epochs 2",
        "digits, exponential 10:1, mlp, test accuracy, epochs 9",
    ]
    assert [list(section.seeds) for section in found] == [list(ACCURACIES), ["erm"]]


def test_the_csv_holds_the_numbers_that_a_hand_would_work_out(made):
    _, output = made
    with (output / "table.csv").open() as file:
        rows = {(row["setting"][-1], row["method"]): row for row in csv.DictReader(file)}
    lpa = rows["2", "lpa"]
    values, baseline = np.array(ACCURACIES["lpa"]), np.array(ACCURACIES["erm"])
    differences = values - baseline
    assert float(lpa["accuracy_mean"]) == pytest.approx(values.mean(), rel=1e-5)
    assert float(lpa["accuracy_se"]) == pytest.approx(values.std(ddof=1) / 8**0.5, rel=1e-5)
    assert float(lpa["difference_mean"]) == pytest.approx(differences.mean(), rel=1e-5)
    assert float(lpa["difference_low"]) > 0 and int(lpa["pairs"]) == 8
    assert float(lpa["p_value"]) == pytest.approx(2**-7, rel=1e-5)
    # The other method has too few seeds for a test, so it does not count here.
    assert float(lpa["p_holm"]) == pytest.approx(2**-7, rel=1e-5)
    assert float(lpa["few_mean"]) == pytest.approx(values.mean() - 0.1, rel=1e-5)
    assert rows["2", "erm"]["difference_mean"] == "" and rows["9", "erm"]["accuracy_se"] == ""


def test_markdown_and_latex_escape_what_would_break_a_table(made):
    found, output = made
    text = (output / "report.md").read_text()
    table = [line for line in text.splitlines() if "manifold_mixup" in line]
    cells = table[0].replace("\\|", "").count("|")
    assert "manifold\\_mixup@input\\textbar{}hidden1" in (output / "table.tex").read_text()
    assert cells == text.splitlines()[6].count("|") and "input\\|hidden1" in table[0]
    mixup = "manifold_mixup@input|hidden1"
    assert f"{mixup} lacks seeds that others have: 4-7." in text
    assert f"{mixup} and erm are compared over their 4 common seeds alone." in text
    assert "lpa and erm are compared over" not in text, "both have all seeds"
    assert f"Fewer than 5 common seeds, so no interval and no test: {mixup}." in text
    differences = re.search(r" \((?:[-+]\d+\.\d ?){4}\) \|  \|  \|  \| ", table[0])
    assert differences, "the differences of the seeds, and no interval and no p-value"
    assert len(found[0].table[0]) == len(found[0].table[-1])


def test_every_figure_named_in_the_report_is_there(made):
    found, output = made
    text = (output / "report.md").read_text()
    paths = [path for section in found for _, path in section.figures]
    # Accuracy, differences, classes, curves of the first setting; no baseline's own differences.
    assert len(paths) == 4 + 3
    for path in paths:
        assert b"<svg" in path.read_bytes()[:1000]
        assert f"({path.relative_to(output)})" in text


def test_without_compare_there_is_no_file_and_no_heading_of_contrasts(made):
    _, output = made
    assert not (output / "contrasts.csv").exists()
    assert "ontrast" not in (output / "report.md").read_text(encoding="utf-8")


def test_what_does_not_count_is_named_with_its_reason_and_changes_no_number(tmp_path, command):
    root = tmp_path / "runs"
    made_up_runs.write_many(root, {"erm": [0.5, 0.6], "lpa": [0.7, 0.8]})
    whole = (root / "lpa/seed_1/result.json").read_text()
    broken = {
        "cut": ("result.json is cut short", lambda f: (f / "result.json").write_text(whole[:99])),
        "gone": ("incomplete: interrupted", lambda f: (f / "result.json").unlink()),
        "no_config": ("config.json is missing", lambda f: (f / "config.json").unlink()),
        "list": (
            "result.json: it must be an object, got [1, 2]",
            lambda f: (f / "result.json").write_text("[1, 2]"),
        ),
        "other": ("seed is 9 in config.json, 1", lambda f: (f / "result.json").write_text(whole)),
    }
    for name, (_, damage) in broken.items():
        damage(made_up_runs.write(root / name, "lpa", 9, 0.1))
    made_up_runs.write(root / "partial", "lpa", 9, 0.1, complete=False)
    made_up_runs.write(root / "curve", "lpa", 9, 0.1, curve=[{"epoch": "one"}])
    made_up_runs.write(root / "groups", "lpa", 9, 0.1, group_accuracy={"many": "high"})
    made_up_runs.write(root / "selections", "lpa", 9, 0.1, selections=[0.1])
    diverged = made_up_runs.write(root / "nan", "lpa", 9, 0.125) / "result.json"
    diverged.write_text(diverged.read_text().replace('"accuracy": 0.125', '"accuracy": null'))
    message, out, err = command(root, f"--output={tmp_path / 'out'}")
    text = (tmp_path / "out" / "report.md").read_text()
    assert message is None
    assert printed_rows(out)[2][:2] == ["lpa", "75.0±5.0"]
    reasons = {name: reason for name, (reason, _) in broken.items()}
    reasons |= {"partial": "does not say that it is complete", "nan": "has no accuracy"}
    reasons |= {"curve": "curve[0].epoch must be a whole number"}
    reasons |= {"groups": 'group_accuracy.many must be a number between 0 and 1, got "high"'}
    reasons |= {"selections": "selections must be an object, got [0.1]"}
    for name, reason in reasons.items():
        line = next(line for line in err.splitlines() if f"/{name}:" in line)
        assert reason in line
        assert line.removeprefix("not counted: ").split(": ", 1)[1] in text
    assert err.count("not counted") == len(reasons)


def test_a_run_found_twice_counts_once(tmp_path):
    made_up_runs.write(tmp_path / "a", "erm", 0, 0.5)
    made_up_runs.write(tmp_path / "copy", "erm", 0, 0.5)
    found, problems = runs.collect([tmp_path, tmp_path / "a", tmp_path])
    assert len(found) == 1
    assert [problem.reason for problem in problems] == [f"repeats {tmp_path / 'a'}"]


def test_options_tell_methods_apart_only_where_a_seed_ran_with_several(tmp_path):
    for i, radius in enumerate((0.1, 0.2)):
        options = {"lpa.radius": radius, "learning_rate": 0.02}
        made_up_runs.write(tmp_path / f"{i}", "lpa", 0, 0.5, options=options)
        # Hyperparameters drawn anew for every seed are one method.
        made_up_runs.write(tmp_path / f"drawn{i}", "lpl", i, 0.5, options={"lpl.radius": radius})
    (setting,) = frame.group(runs.collect([tmp_path])[0])
    assert list(setting.runs) == ["lpa (lpa.radius=0.1)", "lpa (lpa.radius=0.2)", "lpl"]


def test_domains_are_averaged_within_seeds_and_selections_stand_side_by_side(tmp_path):
    numbers = {("erm", 0): (0.90, 0.80), ("erm", 1): (0.92, 0.84), ("coral", 0): (0.95, 0.85)}
    for (method, seed), accuracies in numbers.items():
        for domain, accuracy in zip(("d2", "d15"), accuracies, strict=True):
            made_up_runs.write_domain_run(
                tmp_path / "runs" / method / f"{seed}" / domain, method, seed, domain,
                training_domain_validation=accuracy, oracle=accuracy + 0.01,
                leave_one_domain_out=None,
            )  # fmt: skip
    made_up_runs.write_domain_run(tmp_path / "runs/half", "coral", 1, "d2",
                                  training_domain_validation=0.1, oracle=0.1)  # fmt: skip
    first, second = report.make([tmp_path / "runs"], tmp_path / "out")
    assert first.title.endswith("training domain validation") and second.title.endswith("oracle")
    rows = first.compared.set_index(["measure", "method"])
    assert tables.groups(first.compared) == ["d2", "d15"]
    assert rows["mean"]["accuracy", "erm"] == pytest.approx((0.85 + 0.88) / 2)
    assert rows["mean"]["d15", "erm"] == pytest.approx(0.82)
    assert first.seeds["coral"] == [0], "a seed that lacks a domain has no average"
    assert rows["difference"]["accuracy", "coral"] == pytest.approx(0.05)
    assert "coral seed 1: no result for d15" in first.notes
    oracle = second.compared.set_index(["measure", "method"])["mean"]
    assert oracle["accuracy", "erm"] == pytest.approx(rows["mean"]["accuracy", "erm"] + 0.01)


def test_a_selection_is_shown_of_the_methods_that_made_it_and_the_others_are_named(tmp_path):
    for method, left in (("erm", 0.7), ("coral", 0.8), ("rsc", None)):
        made_up_runs.write_domain_run(
            tmp_path / "runs" / method, method, 0, "d2",
            training_domain_validation=0.9, leave_one_domain_out=left,
        )  # fmt: skip
    every, some = report.make([tmp_path / "runs"], tmp_path / "out")
    assert list(every.seeds) == ["erm", "coral", "rsc"]
    assert some.title.endswith("leave one domain out")
    assert list(some.seeds) == ["erm", "coral"]
    assert "rsc: its models were not selected so" in some.notes


def test_without_the_baseline_there_are_no_differences_and_the_report_says_so(tmp_path, command):
    made_up_runs.write_many(tmp_path / "runs", {"lpa": [0.5, 0.6], "lpl": [0.6, 0.6]})
    _, out, _ = command(tmp_path / "runs", f"--output={tmp_path / 'out'}")
    assert "No run of the baseline erm" in out and "vs erm" not in out
    _, out, _ = command(tmp_path / "runs", "--baseline=lpl", f"--output={tmp_path / 'out'}")
    lpa = printed_rows(out)[2]
    assert lpa[0] == "lpa" and {"55.0±5.0", "-5.0 (-10.0 +0.0)"} <= set(lpa)


@pytest.mark.parametrize(
    ("folders", "expected"),
    [([], "name at least one folder"), (["nowhere"], "nowhere is not a folder"),
     (["empty"], "no complete run in")],
)  # fmt: skip
def test_nothing_to_report_is_one_line_exit_1_and_no_file(tmp_path, command, folders, expected):
    (tmp_path / "empty").mkdir()
    message, out, _ = command(*(tmp_path / f for f in folders), f"--output={tmp_path / 'out'}")
    # sys.exit with a text prints it and leaves status 1.
    assert expected in message and "\n" not in message and not out
    assert not (tmp_path / "out").exists()


def test_the_answer_names_the_best_method_and_what_is_known_of_it(made):
    found, _ = made
    lpa, erm = (np.array(ACCURACIES[name]) for name in ("lpa", "erm"))
    text = sections.answer(found[0])
    assert text.startswith("Of 3 methods with 4 to 8 seeds, lpa has the best accuracy, ")
    assert f"{100 * (lpa - erm).mean():+.1f} points to erm (95% interval +" in text
    assert text.endswith("p 0.0078 by Holm).")


def test_injected_names_stay_text(tmp_path, command, drawn):
    name = "<script>alert(1)</script>$\\frac{$"
    made_up_runs.write_many(tmp_path / "runs", {"erm": [0.5], name: [0.6]})
    message, *_ = command(tmp_path / "runs", f"--output={tmp_path / 'out'}", "--html")
    page = (tmp_path / "out" / "report.html").read_text()
    assert message is None and page.count("<script") == 1 and "&lt;script&gt;alert" in page
    for figure in (tmp_path / "out" / "figures").glob("*.svg"):
        text = figure.read_text()
        assert "<script" not in text and ("&lt;script&gt;" in text or "curves" in figure.name)


def test_a_comparison_explains_its_columns_and_quiet_prints_the_table_alone(tmp_path, capsys):
    results = {
        "erm": [{"seed": 0, "accuracy": 0.5, "group_accuracy": {}, "seconds": 1.0}],
        "lpa": [{"seed": 0, "accuracy": 0.6, "group_accuracy": {}, "seconds": 3.0}],
    }
    tables.write_comparison("A title", results, tmp_path, ["A note."], pair=("lpa", "erm"))
    text, printed = (tmp_path / "table.md").read_text(), capsys.readouterr().out
    assert "## A title" in text and "| lpa | 1 | 60.0 | +10.0 |" in text
    assert text.endswith("compilation.\n\nA note.\n") and "many" not in text + printed
    assert "standard error" not in text and "interval" not in text, "one seed has neither"
    assert "lpa - erm: +10.0\n" in printed
    tables.write_comparison("A title", results, tmp_path, ["A note."], ("lpa", "erm"), quiet=True)
    title, _, *table = capsys.readouterr().out.splitlines()
    assert title == "A title" and len(table) == 7 and not table[-1]


def test_a_comparison_has_a_table_a_selection_that_all_made_and_domains_in_their_order(
    tmp_path, capsys
):
    results = {
        method: [
            {"seed": 0, "accuracy": value, "test_domain": domain,
             "selections": {"oracle": value, "training_domain_validation": value - 0.25,
                            "leave_one_domain_out": value if method == "erm" else None}}
            for domain, value in (("+90%", 0.5), ("+80%", 0.75))
        ]
        for method in ("erm", "lpa")
    }  # fmt: skip
    tables.write_comparison("A title", results, tmp_path)
    text, printed = (tmp_path / "table.md").read_text(), capsys.readouterr().out
    headings = [line for line in text.splitlines() if line.startswith("### ")]
    assert [line.partition("selection: ")[2][:8] for line in headings] == ["training", "oracle ("]
    assert "| lpa | 1 | 37.5 | +0.0 | 25.0 | 50.0 |" in text
    assert "| test +90% | test +80% |" in text
    assert tables.DOMAIN_LEGEND in text and "\ntest NAME: accuracy on that held-out domain" in text
    assert "+90%" in printed and "leave-one" not in printed
    with (tmp_path / "table.csv").open() as file:
        rows = [(row["selection"], row["method"]) for row in csv.DictReader(file)]
    assert rows == [(name, method) for name in ("training_domain_validation", "oracle")
                    for method in ("erm", "lpa")]  # fmt: skip


def test_runs_csv_has_one_line_a_run(made):
    _, output = made
    with (output / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(map(len, ACCURACIES.values())) + 1
    folder = pathlib.Path(rows[0]["folder"])
    result = json.loads((folder / "result.json").read_text())
    assert float(rows[0]["accuracy"]) == pytest.approx(result["accuracy"])
    assert sections.ranges([3]) == "3"


def test_last_epoch_csv_has_the_last_value_of_every_measure(made):
    _, output = made
    with (output / "runs.csv").open() as file:
        folder = pathlib.Path(next(csv.DictReader(file))["folder"])
    curve = json.loads((folder / "result.json").read_text())["curve"]
    with (output / "last_epoch.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["seed"] == folder.name[5:]]
    own = {row["measure"]: float(row["value"]) for row in rows if row["method"] == "erm"}
    assert own["train/loss"] == curve[-1]["train/loss"]


def test_a_report_of_its_own_rows_has_the_same_tables_and_rows(tmp_path, command):
    """All digits count: thirds, three selections, methods told apart by options, a missing seed."""
    runs_of = tmp_path / "runs"
    made_up_runs.write_many(runs_of / "lt", ACCURACIES)
    made_up_runs.write_many(runs_of / "other", {"erm": [0.5]}, settings={"epochs": 9})
    for i, radius in enumerate((0.1, 0.2)):
        made_up_runs.write(runs_of / f"{i}", "lpa", 0, 1 / 3 + i / 7, options={"radius": radius},
                           settings={"epochs": 7})  # fmt: skip
    numbers = np.random.default_rng(0).integers(1, 700, 32) / 700
    places = [(m, s, d) for m in ("erm", "coral") for s in range(4) for d in ("d2", "d15")]
    for i, (method, seed, domain) in enumerate(places[:-1]):
        made_up_runs.write_domain_run(
            runs_of / "dg" / f"{i}", method, seed, domain,
            training_domain_validation=numbers[i], oracle=numbers[i + 16],
            leave_one_domain_out=numbers[-i] if method == "erm" else None,
        )  # fmt: skip
    asked = ("--compare=lpa:manifold_mixup@input|hidden1,coral:erm",)
    assert command(runs_of, f"--output={tmp_path / 'a'}", *asked)[0] is None
    message, out, err = command(tmp_path / "a", f"--output={tmp_path / 'b'}", *asked)
    assert message is None and not err and "lpa (radius=0.2)" in out
    for name in ("table.csv", "table.tex", "contrasts.csv", "runs.csv"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text(), name
    drawn = {path.name.rpartition("_")[2] for path in (tmp_path / "b" / "figures").iterdir()}
    assert drawn == {"accuracy.svg", "differences.svg", "contrasts.svg"}
    for path in (tmp_path / "b" / "figures").iterdir():
        assert path.read_bytes() == (tmp_path / "a" / "figures" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("name", "pairs"),
    [("long_tail/mlp_40_trials", "lpa:lpl,lpa+lpl:lpl,lpa+lpl:lpa"), ("domains/mlp", "")],
)
def test_the_committed_rows_give_the_committed_tables(tmp_path, command, name, pairs):
    message, _, err = command(ROOT / "results" / name, f"--compare={pairs}", f"--output={tmp_path}")
    assert message is None and not err
    for table in ("table.csv", "contrasts.csv") if pairs else ("table.csv",):
        committed, made = (pd.read_csv(of / table) for of in (ROOT / "results" / name, tmp_path))
        pd.testing.assert_frame_equal(made, committed, rtol=1e-5)


def test_rows_without_the_column_setting_are_told_apart_by_their_folders(tmp_path, command):
    lines = ["folder,method,seed,test_domain,accuracy,seconds"]
    lines += [
        f"runs/{of}/runs/{method}/seed_0,{method},0,,{accuracy},1.5"
        for of in ("bal_20", "bal_50")
        for method, accuracy in (("erm", 0.5), ("lpa", 0.75))
    ]
    (tmp_path / "runs.csv").write_text("\n".join(lines))
    message, out, _ = command(tmp_path / "runs.csv", f"--output={tmp_path / 'out'}")
    assert message is None and "\nruns/bal_20\n" in out and "\nruns/bal_50\n" in out
    rows = [cells[:4] for cells in printed_rows(out) if cells[0] == "lpa"]
    assert rows == [["lpa", "1", "75.0", "+25.0"]] * 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "must have one column 'method', got 0"),
        (b"method,seed,value\nerm,0,0.5", "must have one column 'accuracy', got 0"),
        (b"method,seed,accuracy,few,few\nerm,0,0.5,1,1", "must have one column 'few', got 2"),
        (b"method,seed,accuracy\nerm,0", "line 2: must have 3 cells, got 2"),
        (b"method,seed,accuracy\nerm,0,0.5,1", "line 2: must have 3 cells, got 4"),
        (b"method,seed,accuracy\nerm,zero,0.5", "line 2: seed must be a whole number, got 'zero'"),
        (b"method,seed,accuracy\nerm,0,high", "line 2: accuracy must be a number, got 'high'"),
        (b"method,seed,accuracy\nerm,0,", "line 2: accuracy must be a number, got none"),
        (b"method,seed,accuracy\nerm,0,nan", "accuracy must be between 0 and 1, got nan"),
        (b"method,seed,accuracy\nerm,0,76.5", "accuracy must be between 0 and 1, got 76.5"),
        (b"method,seed,accuracy,few\nerm,0,0.5,-1", "few must be between 0 and 1, got -1"),
        (b"method,seed,accuracy,seconds\nerm,0,0.5,inf", "seconds must be between 0 and inf"),
        (b'method,seed,accuracy\n"e\nm",0,0.5', "names must be printable"),
        (b"method,seed,accuracy\n,0,0.5", "the method not empty"),
        (b"\xff\xfe\x00method", "is no CSV: 'utf-8' codec"),
        (b'method,seed,accuracy\n"erm,0,0.5', "is no CSV: unexpected end of data"),
        (b"[" * 200_000, "is no CSV: field larger than field limit"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_one_line_and_does_not_count(tmp_path, command, content, reason):
    (tmp_path / "runs.csv").write_bytes(content)
    message, _, err = command(tmp_path, f"--output={tmp_path / 'out'}")
    assert reason in err and err.count("\n") == 1 and err.startswith("not counted: ")
    assert "no complete run in" in message and "\n" not in message
    assert not (tmp_path / "out").exists()


def test_a_repeated_row_counts_once_and_the_good_rows_of_a_file_count(tmp_path, command):
    lines = ("method,seed,accuracy", "erm,0,0.5", "erm,0,0.9", "erm,1,x", "erm,2,0.7")
    (tmp_path / "runs.csv").write_text("\n".join(lines))
    message, out, err = command(tmp_path, f"--output={tmp_path / 'out'}")
    assert message is None and printed_rows(out)[1:] == [["erm", "2", "60.0±10.0"]]
    assert (
        err.count("not counted") == 2
        and "repeats" in err
        and "line 4: accuracy must be a number, got 'x'" in err
    )


def test_a_folder_with_runs_is_not_counted_again_from_its_rows(tmp_path, command):
    made_up_runs.write_many(tmp_path, {"erm": [0.5, 0.6]})
    (tmp_path / "runs.csv").write_text("method,seed,accuracy\nerm,9,0.1\n")
    message, out, err = command(tmp_path, f"--output={tmp_path / 'out'}")
    assert message is None and not err
    assert [cells[:3] for cells in printed_rows(out)[1:]] == [["erm", "2", "55.0±5.0"]]


def test_figures_are_svg_with_text_and_the_same_every_time(tmp_path, drawn):
    made_up_runs.write_many(tmp_path / "runs", {"erm": [0.5, 0.6], "lpa": [0.6, 0.7]})
    first, second = (
        {path.name: path.read_bytes() for section in report.make(
            [tmp_path / "runs"], tmp_path / name) for _, path in section.figures}
        for name in ("a", "b")
    )  # fmt: skip
    assert len(first) == 4 and first == second
    assert all(b"<svg" in content and b"</text>" in content for content in first.values())


class PageReader(html.parser.HTMLParser):
    """Collects what a page would load, and its tags, and checks that they close."""

    VOID = ("meta", "img")

    def __init__(self):
        super().__init__()
        self.loaded, self.open, self.names = [], [], {}

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.names[tag] = [*self.names.get(tag, []), attributes]
        self.loaded += [attributes[key] for key in ("src", "href") if key in attributes]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_no_other_file_and_holds_tables_figures_and_environment(tmp_path, command):
    effect = [{"epoch": e, "train/loss": 1.0, "effect/hidden1/loss_change/positive": 0.1 * e}
              for e in (1, 2)]  # fmt: skip
    for seed in (0, 1):
        options = {"<lpa.radius>": 0.25 + seed}
        made_up_runs.write(tmp_path / f"runs/{seed}", "lpa", seed, 0.5, options=options,
                           curve=effect, environment={"jax": "9.9.9"})  # fmt: skip
    message, *_ = command(tmp_path / "runs", f"--output={tmp_path / 'out'}", "--html")
    text = (tmp_path / "out" / "report.html").read_text()
    reader = PageReader()
    reader.feed(text)
    assert message is None and reader.open == []
    assert all(url.startswith(("data:image/svg+xml;base64,", "#")) for url in reader.loaded)
    assert "url(" not in text and "@import" not in text and reader.names["script"] == [{}]
    script = re.search(r"<script>(.*)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policies = [tag["content"] for tag in reader.names["meta"] if "http-equiv" in tag]
    assert len(policies) == 1 and policies[0].endswith(f"script-src 'sha256-{digest}'")
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in reader.names[
        "meta"
    ]
    drawn = list((tmp_path / "out" / "figures").glob("*.svg"))
    assert len(reader.names["img"]) == len(drawn) == 4
    assert any(figure.name.endswith("effects.svg") for figure in drawn)
    assert "Of 1 methods" not in text and '<p class="answer">' in text
    assert "&lt;lpa.radius&gt;: 0.25, 1.25" in text and "prefers-color-scheme: dark" in text
    assert "9.9.9" in text and files.git_revision() in text
    assert "<td>imbalance</td><td>10.0</td>" in text


def test_the_page_shows_what_landscape_left_beside_the_runs_and_nothing_of_other_settings(
    tmp_path, command
):
    spectrum = {"values": {"largest": 1.0}, "nodes": [[-0.1, 0.0, 1.0]] * 2,
                "weights": [[0.1, 0.8, 0.1]] * 2}  # fmt: skip
    for seed, settings in ((0, {"probes": 2}), (1, {"probes": 2}), (2, {"probes": 9})):
        folder = made_up_runs.write(tmp_path / f"runs/{seed}", "lpa", seed, 0.5)
        (folder / "measured").mkdir()
        write_measured(folder / "measured" / "spectrum.json", settings, spectrum)
        # Of an earlier form, changed, cut short, and no object: none of them counts.
        old = {"values": {}, "classes": {}}
        write_measured(folder / "measured" / "geometry.json", {}, old)
        changed = {"settings": {}, "measured": {"values": {}, "steps": "x", "losses": "x"}}
        (folder / "measured" / "line.json").write_text(json.dumps(changed))
        (folder / "measured" / "activation.json").write_text("{")
        (folder / "measured" / "amplification.json").write_text("[1]")
    message, *_ = command(tmp_path / "runs", f"--output={tmp_path / 'out'}", "--html")
    text = (tmp_path / "out" / "report.html").read_text()
    assert message is None and "density of the eigenvalues" in text
    assert "geometry: what" not in text and "amplification: mean" not in text
    (setting,) = frame.group(runs.collect([tmp_path / "runs"])[0])
    assert list(sections.measured(setting, "spectrum", ("nodes",))["lpa"]) == [0, 1]


def test_without_git_the_revision_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert files.git_revision() == "unknown"
