"""The landscape experiment: every part of one job, tables, what is measured again, bad input."""

import csv
import html
import json

import numpy as np
import pytest

from experiments import landscape, report
from experiments.measuring import measurements
from experiments.measuring import models as trained
from experiments.reporting import class_figures, measured_figures, measured_tables, sections, style
from lpa_jax.training.interrupts import InterruptedRunError
from tests.helpers import browser, drawn_texts, tiny_models
from tests.helpers.module_call import call, printed_rows

TINY = (
    "--dataset=digits", "--imbalance=10", "--epochs=1", "--evaluate_every=1", "--num_seeds=2",
    "--methods=erm,dropout", "--compilation_cache=", "--quiet", "--measure_batches=1",
    "--measure_batch_size=32", "--measure_layers=hidden1", "--lanczos_steps=4", "--eigenvalues=2",
    "--probes=2", "--spectrum_probes=2", "--directions=1", "--resolution=3", "--power_iterations=5",
    "--corruptions=contrast", "--severities=1,5",
)  # fmt: skip
FILES = ("flatness", "spectrum", "activation", "line", "amplification", "geometry", "calibration")


def arguments(workdir):
    return (*TINY, f"--workdir={workdir}", f"--data_dir={workdir.parent.parent / 'tfds'}")


@pytest.fixture(scope="module", autouse=True)
def small_mlp():
    """The MLP has one small hidden layer, so that less is compiled and drawn."""
    with tiny_models.mlp_of(64):
        yield


@pytest.fixture(scope="module")
def job(data_dir, tmp_path_factory):
    """The folder of a finished job, beside the data."""
    workdir = tmp_path_factory.mktemp("landscape") / "job"
    with drawn_texts.undrawn():
        assert call(landscape, *arguments(workdir))[0] is None
    return workdir


def measured(job, name, method="erm", seed=0):
    path = job / "runs" / method / f"seed_{seed}" / "measured" / f"{name}.json"
    return json.loads(path.read_text())["measured"]


def test_every_part_has_a_table_over_seeds_and_a_figure(job):
    for name in FILES:
        with (job / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert {row["method"] for row in rows} == {"erm", "dropout"}
        for row in rows:
            if row["mean"]:
                seeds = [
                    measured(job, name, row["method"], s)["values"][row["measure"]] for s in (0, 1)
                ]
                assert float(row["mean"]) == pytest.approx(np.mean(seeds), rel=1e-4, abs=1e-12)
        assert "vs erm" in (job / f"{name}.md").read_text()
        assert (job / f"{name}.png").exists()
    assert (job / "plane.png").exists()


@pytest.fixture(scope="module")
def report_of_job(job, tmp_path_factory):
    """The folder of a report with its page."""
    output = tmp_path_factory.mktemp("report")
    assert call(report, f"--output={output}", "--html", str(job))[0] is None
    return output


def test_a_report_of_the_job_shows_what_was_measured(report_of_job):
    page = (report_of_job / "report.html").read_text()
    for name, (caption, *_) in sections.MEASURED_FIGURES.items():
        assert html.escape(caption) in page or caption in page, name
    for name in sections.MEASURED_FIGURES:
        (figure,) = report_of_job.glob(f"figures/*_{name}.svg")
        assert figure.stat().st_size > 10_000


@browser.needs_browser
def test_a_phone_shows_all_that_was_measured_and_no_page_wider_than_itself(report_of_job, tmp_path):
    found = browser.facts(report_of_job / "report.html", tmp_path, browser.PHONE)
    assert found["width"] <= found["visible"] <= browser.PHONE
    assert len(found["figures"]) > len(sections.MEASURED_FIGURES)
    assert all(width > 100 for width in found["figures"])


def test_the_spectrum_is_within_its_ends_and_reaches_as_far_as_the_largest_eigenvalue(job):
    found, flat = measured(job, "spectrum"), measured(job, "flatness")["values"]
    nodes, weights = (np.array(found[name], float) for name in ("nodes", "weights"))
    assert nodes.shape == weights.shape == (2, 4)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    values = found["values"]
    assert values["smallest"] <= 0 < values["largest"] == pytest.approx(flat["lambda1"], rel=0.2)
    assert 0 <= values["negative share"] < 0.5
    assert found["errors"]["trace"] > 0


def test_a_figure_of_spectra_holds_methods_that_differ_by_orders_of_magnitude(tmp_path):
    narrow = {"values": {"largest": 1e-3}, "nodes": [[-1e-4, 0.0, 1e-3, None]] * 2,
              "weights": [[0.1, 0.8, 0.1, 0.0]] * 2}  # fmt: skip
    wide = {**narrow, "values": {"largest": 1e3}, "nodes": [[-1.0, 0.0, 1e3, None]] * 2}
    measured_figures.spectra({"erm": {0: narrow}, "lpa": {0: wide, 1: wide}}, tmp_path / "a.png")
    flat = {**narrow, "values": {"largest": 0.0}, "nodes": [[0.0] * 4] * 2}  # a dead network
    measured_figures.spectra({"erm": {0: flat}}, tmp_path / "b.png")
    assert (tmp_path / "a.png").exists() and (tmp_path / "b.png").exists()


def test_lines_and_plane_pass_through_the_loss_that_flatness_is_measured_at(job):
    loss = measured(job, "flatness")["values"]["loss"]
    line, plane = measured(job, "line"), measured(job, "plane")
    assert line["steps"][3] == 0 and line["losses"][0][3] == pytest.approx(loss, rel=1e-6)
    assert plane["steps"][1] == 0 and plane["losses"][1][1] == pytest.approx(loss, rel=1e-6)
    # The first direction is the same: the plane's axis is that line, every second point of it.
    axis = [row[1] for row in plane["losses"]]
    assert axis == pytest.approx([line["losses"][0][i] for i in (0, 3, 6)], rel=1e-5)


def test_the_plane_is_measured_for_the_first_seed_alone(job):
    assert len(list(job.glob("runs/*/seed_0/measured/plane.json"))) == 2
    assert not list(job.glob("runs/*/seed_1/measured/plane.json"))


def test_no_gain_into_the_linear_head_exceeds_its_largest_singular_value(job):
    found = measured(job, "amplification")
    last = found["layers"].index("hidden1")
    gains = {probe: found["maps"][probe][last][-1] for probe in measurements.PROBES}
    # Five power iterations may still lie a little below the truth.
    assert 0 < gains["random"] < gains["bound"] and gains["lpa"] < 1.1 * gains["bound"]
    for table in found["maps"].values():
        assert all(value is None for row, line in enumerate(table) for value in line[: row + 1])


def test_calibration_is_of_the_model_that_was_evaluated(job):
    for method in ("erm", "dropout"):
        result = json.loads((job / "runs" / method / "seed_1" / "result.json").read_text())
        values = measured(job, "calibration", method, 1)["values"]
        assert values["accuracy"] == pytest.approx(result["accuracy"], abs=1e-6)
        assert values["nll"] == pytest.approx(result["loss"], rel=1e-4)


def test_geometry_states_signs_and_radii_of_the_probe(job):
    classes = measured(job, "geometry")["classes"]["signed"]["hidden1"]
    present = [c for c, norm in enumerate(classes["delta_norm"]) if norm is not None]
    assert {classes["sign"][c] for c in present} == {1.0, -1.0}
    assert all(
        (classes["loss_change"][c] > 0) == (classes["sign"][c] > 0)
        for c in present
        if classes["delta_norm"][c] > 0
    )


@pytest.mark.parametrize(
    ("options", "rule"),
    [((), "frequency"), (("--profile=none", "--assignment=confidence"), "confidence")],
)
def test_probes_take_their_signs_by_the_rule_of_the_training(options, rule, job, monkeypatch):
    """Equal counts ranked would make digits 0 to 3 negative in every balanced model."""
    seen = []

    def stop(models, how, interrupts):
        seen.append(how.probe_assignment)
        raise ValueError("far enough")

    monkeypatch.setattr(landscape, "measure", stop)
    monkeypatch.setattr(trained, "train_or_load", lambda *_: None)
    message, _ = call(landscape, *arguments(job), *options, f"--workdir={job.parent / 'none'}")
    assert (message, seen) == ("error: far enough", [rule])


def test_a_sign_that_changed_between_batches_belongs_to_the_group_that_more_images_were_in():
    found = {name: np.array([1.0, 2.0, 4.0]) for name in measurements._CLASS_MEASURES}
    means = measurements._by_sign({**found, "sign": np.array([0.33, -1.0, 0.1])})
    assert means["norm_ratio positive"] == 2.5 and means["radius negative"] == 2.0


def test_losses_of_both_signs_stay_on_the_axis():
    _, axes = style.panels(1, 1, 2.0)
    axes[0, 0].plot([0, 1, 2], [0.2, -0.1, 0.3])
    class_figures._log_of_losses(axes[0, 0])
    low, high = axes[0, 0].get_ylim()
    assert low < -0.1 and high > 0.3


def test_a_model_that_cannot_be_measured_is_named(job, monkeypatch):
    def broken(model, how):
        raise ValueError("the loss over batches must be finite, got nan")

    monkeypatch.setitem(landscape.MEASUREMENTS, "flatness", (broken, ("probes",)))
    message, _ = call(landscape, *arguments(job))
    assert message == "error: erm seed 0, flatness: the loss over batches must be finite, got nan"


def test_geometry_has_every_form_from_input_to_logits_by_sign_and_by_class(job):
    found = measured(job, "geometry")
    assert found["layers"] == ["input", "hidden1", "logits"]
    assert list(found["classes"]) == ["signed", "free"]
    classes = {name: np.array(v, float) for name, v in found["classes"]["free"]["logits"].items()}
    rare = np.nan_to_num(classes["sign"]) == 1
    np.testing.assert_allclose(classes["shared_shift"][np.isfinite(classes["sign"])], 1, atol=1e-4)
    mean = np.nanmean(classes["norm_ratio"][rare])
    assert found["values"]["free at logits: norm_ratio positive"] == pytest.approx(mean)
    with (job / "geometry_classes.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "erm"]
    assert len(rows) == 2 * 3 * 10
    row = next(
        r for r in rows if (r["geometry"], r["layer"], r["class"]) == ("free", "logits", "0")
    )
    other = measured(job, "geometry", seed=1)["classes"]["free"]["logits"]
    expected = np.mean([classes["loss_change"][0], other["loss_change"][0]])
    assert float(row["loss_change"]) == pytest.approx(expected, rel=1e-4)
    assert row["seeds"] == "2" and float(row["loss_change_se"]) >= 0
    assert "### free at logits\n" in (job / "geometry.md").read_text()
    for name in ("geometry", "geometry_signed", "geometry_signed_classes", "geometry_free_classes"):
        assert (job / f"{name}.png").exists()


def test_only_what_a_changed_flag_decides_is_measured_again(job, monkeypatch):
    calls = []

    def counted(name):
        function, fields = measurements.MEASUREMENTS[name]

        def measure(model, how):
            calls.append((name, model.method, model.seed))
            return function(model, how)

        return measure, fields

    monkeypatch.setattr(
        landscape, "MEASUREMENTS", {name: counted(name) for name in measurements.MEASUREMENTS}
    )
    parts = "--parts=landscape,calibration"
    with drawn_texts.undrawn():
        assert call(landscape, *arguments(job), parts)[0] is None
    assert calls == []
    (job / "runs" / "erm" / "seed_1" / "measured" / "calibration.json").write_text("{")
    with drawn_texts.undrawn():
        message, _ = call(landscape, *arguments(job), parts, "--severities=1")
    assert message is None
    assert sorted(calls) == [
        ("calibration", method, seed) for method in ("dropout", "erm") for seed in (0, 1)
    ]


def test_a_signal_stops_between_measurements():
    with pytest.raises(InterruptedRunError, match="what was measured is kept"):
        trained.stop_if_asked(lambda: True)


def test_table_pairs_seeds_and_leaves_out_what_is_unknown():
    numbers = {"erm": [1.0, 2.0], "lpa": [3.0, 5.0, None]}
    found = {
        method: {seed: {"values": {"trace": value}} for seed, value in enumerate(own)}
        for method, own in numbers.items()
    }
    compared = measured_tables.compare(found, "erm")
    row = compared.set_index("method").loc["lpa"]
    assert (row["seeds"], row["pairs"], row["mean"], row["difference"]) == (2, 2, 4.0, 2.5)
    assert row["difference_se"] == pytest.approx(0.5)
    text = measured_tables.markdown(compared, "title")
    assert "| lpa | 4±1 |" in text and "| lpa | +2.5±0.5 |" in text


def test_many_measures_of_few_methods_are_lines_on_a_narrow_screen(capsys, monkeypatch):
    values = {f"at {layer}: lambda{k}": k for layer in ("input", "logits") for k in range(1, 9)}
    found = {"erm": {0: {"values": values}}, "lpa": {0: {"values": values}}}
    for columns, first, row in (
        ("60", "measure", ["eigenvalue 8", "8", "8"]),
        ("300", "method", ["lpa", *"12345678"]),
    ):
        monkeypatch.setenv("COLUMNS", columns)
        measured_tables.show(measured_tables.compare(found, "erm"), "title")
        out = capsys.readouterr().out
        assert out.count("\nat input\n") == 1 and printed_rows(out)[0][0] == first
        assert row in printed_rows(out)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--parts=flat", "error: --parts must be one of flatness, spectrum, activation, "),
        ("--parts=", "error: --parts must be one of flatness, "),
        ("--measure_layers=stage9", "error: --measure_layers: "),
        ("--eigenvalues=0", "error: --eigenvalues must be a whole number in 1..1000, got 0"),
        ("--lanczos_steps=2", "error: --lanczos_steps must be >= 3 (--eigenvalues), got 2"),
        ("--probes=1", "error: --probes must be a whole number in 2..100000, got 1"),
        ("--sharpness_radius=nan", "error: --sharpness_radius must be finite and > 0, got nan"),
        ("--probe_radius=0", "error: --probe_radius must be finite and > 0, got 0.0"),
        ("--probe_geometries=round", "error: --probe_geometries must be one of signed, free, "),
        ("--corruptions=rain", "error: --corruptions must be one of brightness, "),
        ("--severities=6", "error: --severities must be a whole number in 1..5, got 6"),
        ("--severities=one", "error: --severities must be whole numbers, got 'one'"),
        ("--measure_on=test", "flag --measure_on=test: value should be one of <train|evaluation>"),
    ],
)
def test_bad_input_is_refused_in_one_line_before_anything_is_written(tmp_path, argument, expected):
    message, _ = call(landscape, f"--workdir={tmp_path / 'new'}", "--dataset=digits", argument)
    assert message.startswith(expected) and "\n" not in message
    assert not (tmp_path / "new").exists()
