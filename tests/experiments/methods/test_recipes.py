"""Recipes cannot rot: their commands parse, their figures are those of the design notes."""

import re
import shlex

import numpy as np
import pytest

import lpa_jax
from experiments import report
from experiments.methods import names as methods
from experiments.methods import published, search
from tests.helpers import commands, made_up_runs

# The published tables, in per cent: errors of the CIFAR ones, accuracies of DomainBed's; a second
# number is the spread that was published, None where nothing was.
BALANCED = {
    "columns": ("CIFAR-10, WRN-28-10", "CIFAR-100, WRN-28-10",
                "CIFAR-10, ResNet-110", "CIFAR-100, ResNet-110"),
    "erm": ((3.82, 0.15), (18.53, 0.07), 6.76, 28.67),
    "isda": ((3.58, 0.15), (17.98, 0.15), 6.33, 27.57),
    "lpl": ((3.37, 0.04), (17.61, 0.30), 5.72, 25.87),
    "lpa": (3.06, 16.48, None, None),
}  # fmt: skip
LONG_TAIL = {
    "columns": ("CIFAR-10-LT, 100:1", "CIFAR-10-LT, 10:1",
                "CIFAR-100-LT, 100:1", "CIFAR-100-LT, 10:1"),
    "erm": (28.64, None, 60.13, None),
    "class_balanced": (27.32, 13.10, 61.23, 42.43),
    "ldam_drw": (21.88, 11.63, 57.11, 41.22),
    "logit_adjusted": (22.33, 11.07, 56.11, 41.66),
    "balanced_softmax": (22.46, None, 57.01, None),
    "manifold_mixup": (24.81, None, 60.12, None),
    "lpl": (22.05, 10.59, 55.75, 39.03),
    "logit_adjusted+lpl": (21.46, None, 53.89, None),
}  # fmt: skip
DOMAINBED = {
    "columns": ("VLCS", "PACS", "OfficeHome", "TerraIncognita", "DomainNet"),
    "erm": ((77.5, 0.4), (85.5, 0.2), (66.5, 0.3), (46.1, 1.8), (40.9, 0.1)),
    "mixup": (77.4, 84.6, 68.1, 47.9, 39.2),
    "coral": (78.8, 86.2, 68.7, 47.6, 41.5),
    "SagNet": (77.8, 86.3, 68.1, 48.6, 40.3),
    "rsc": (77.1, 85.2, 65.5, 46.6, 38.9),
    "lpa": (79.1, None, None, None, None),
}
SETTINGS = [
    pytest.param(setting, id=setting.name)
    for recipe in published.recipes()
    for setting in recipe.settings
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_flag_and_method_of_a_command_exists(setting, tmp_path):
    for command in setting.commands:
        commands.check(command, tmp_path)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_command_runs_the_setting_and_the_methods_that_figures_are_published_for(
    setting, tmp_path
):
    planned = [
        job
        for command in setting.commands
        if "experiments.sweep" in command
        for job in commands.jobs_of(shlex.split(command)[3:], tmp_path)
    ]
    ran = {argument.removeprefix("--methods=") for job in planned for argument in job.arguments[:1]}
    assert set(setting.figures) <= ran
    for name, value in setting.match.items():
        # The profile is the experiment's own default: long_tail's or balanced's.
        given = {"exponential": "long_tail", "none": "balanced"}.get(value)
        for job in planned:
            if given:
                assert job.experiment == given
            else:
                text = f"{value:g}" if isinstance(value, float) else value
                assert f"--{name}={text}" in job.arguments
    for method in setting.figures:
        methods.parse(method)


@pytest.mark.parametrize("setting", SETTINGS)
def test_cifar_commands_decay_all_parameters_and_give_ldam_its_head(setting):
    if not setting.match["dataset"].startswith("cifar"):
        return
    for command in setting.commands:
        assert "--decay_biases_and_norms" in command
        assert ("ldam_drw" in command) == ("--head=normalized" in command)


# DomainBed's registry: (low, high) of what is drawn uniformly in the logarithm.
DOMAINBED_RANGES = {"mixup.alpha": (0.1, 10), "coral.weight": (0.1, 10)}


@pytest.mark.parametrize("setting", [s for s in SETTINGS if "resnet50" in str(s.values)])
def test_domainbed_commands_draw_from_its_ranges(setting):
    for command in setting.commands:
        texts = re.findall(r"--space=([^\s']+)", command)
        spaces = dict(search.parse_space(text) for text in texts)
        largest = 2**5 if setting.match["dataset"] == "DomainNet" else 2**5.5
        for name, (low, high) in {**DOMAINBED_RANGES, "batch_size": (8, largest)}.items():
            assert spaces[name].low == low
            assert spaces[name].high == pytest.approx(high, rel=1e-3)
        assert spaces["model_dropout"].values == (0, 0.1, 0.5)
        for share in ("rsc.drop_f", "rsc.drop_b"):
            assert np.mean(spaces[share].values) == pytest.approx(0.25)
            assert all(0 < value < 0.5 for value in spaces[share].values)


def released_lpl_bounds(counts, head_size, step, steps, head_share):
    """What LPL's released code lets a long tail's classes be perturbed by: whole steps of each."""
    counts = np.asarray(counts, float)
    wanted = np.where(
        np.arange(counts.size) < head_size,
        counts / counts[0] * steps * head_share,
        counts[-1] / counts * steps,
    )
    return step * (np.round(wanted - 1) + 1)


@pytest.mark.parametrize("setting", [s for s in SETTINGS if "-LT" in s.id])
def test_the_bound_of_lpl_on_a_long_tail_is_the_varied_one_to_within_a_step(setting):
    (command,) = [c for c in setting.commands if "lpl" in c]
    words = dict(word.split("=", 1) for word in command.split() if "=" in word)
    options = dict(re.findall(r"--option=lpl\.(\w+)=(\S+)", command))
    classes = {"cifar10": 10, "cifar100": 100}[setting.match["dataset"]]
    released = {10: (4, 0.15, 10, 0.6), 100: (40, 0.01, 40, 0.2)}[classes]
    shares = setting.match["imbalance"] ** -np.linspace(0, 1, classes)
    counts = np.floor(50_000 / classes * shares + 1e-6)
    rule = lpa_jax.by_frequency(
        counts, split=float(words["--split"]), kappa=float(options["kappa"])
    )
    sign, multiplier = rule(np.zeros(classes), np.ones(classes, bool))
    scale = np.where(np.asarray(sign) < 0, float(options["negative_scale"]), 1.0)
    bounds = float(words["--lpl_radius"]) * np.asarray(multiplier) * scale
    np.testing.assert_allclose(bounds, released_lpl_bounds(counts, *released), atol=released[1])
    assert np.asarray(sign).tolist() == [-1] * released[0] + [1] * (classes - released[0])


@pytest.mark.parametrize("setting", SETTINGS)
def test_figures_are_those_of_the_published_tables(setting):
    (table,) = [t for t in (BALANCED, LONG_TAIL, DOMAINBED) if setting.name in t["columns"]]
    column = table["columns"].index(setting.name)
    expected = {}
    for method, row in table.items():
        if method != "columns" and row[column] is not None:
            mean, *spread = np.atleast_1d(row[column]).tolist()
            mean = mean if table is DOMAINBED else 100 - mean
            expected[method] = pytest.approx((mean, *spread), abs=1e-9)
    assert {**setting.figures, **setting.others} == expected


def test_every_published_column_has_a_recipe():
    names = [setting.name for recipe in published.recipes() for setting in recipe.settings]
    columns = [name for table in (BALANCED, LONG_TAIL, DOMAINBED) for name in table["columns"]]
    assert sorted(names) == sorted(columns)


def test_every_recipe_says_what_it_costs_where_its_figures_come_from_and_that_it_was_not_run():
    assert len(published.recipes()) == 3
    for recipe in published.recipes():
        assert recipe.status == "not run here" and recipe.hardware and len(recipe.sources) > 1
        for setting in recipe.settings:
            assert setting.hours > 0 and len(setting.estimate) > 8, setting.name
            figures = {**setting.figures, **setting.others}.values()
            assert all(0 < figure[0] < 100 for figure in figures)


def test_errors_are_turned_into_accuracies_and_matched_by_settings():
    wide = {"dataset": "cifar10", "profile": "none", "model": "wrn_28_10", "epochs": 240}
    assert published.accuracies(wide)["lpl"] == "96.63±0.04"
    long_tail = {"dataset": "cifar100", "profile": "exponential", "model": "resnet32",
                 "epochs": 200}  # fmt: skip
    assert published.accuracies(long_tail | {"imbalance": 100.0})["logit_adjusted+lpl"] == "46.11"
    assert published.accuracies(long_tail | {"imbalance": 50.0}) == {}


@pytest.mark.parametrize(
    "changed", [{"epochs": 1}, {"evaluate_on": "validation"}, {"per_class": 50}]
)
def test_figures_stand_beside_no_shorter_or_smaller_run_and_no_validation_accuracy(changed):
    wide = {"dataset": "cifar10", "profile": "none", "model": "wrn_28_10", "epochs": 240,
            "evaluate_on": "test", "per_class": None}  # fmt: skip
    assert published.accuracies(wide) and not published.accuracies(wide | changed)


@pytest.mark.parametrize("changed", [{"train_steps": 300}, {"draws": 1}, {"images_per_domain": 40}])
def test_figures_of_domains_need_the_steps_draws_and_images_of_the_protocol(changed):
    photos = {"dataset": "VLCS", "model": "resnet50", "train_steps": 5000, "draws": 20,
              "images_per_domain": None}  # fmt: skip
    assert published.accuracies(photos) and not published.accuracies(photos | changed)


def test_a_recipe_with_a_key_too_many_is_refused_by_name(tmp_path):
    path = tmp_path / "table.toml"
    text = (published.FOLDER / "domainbed.toml").read_text()
    path.write_text(text.replace("hardware", "hardwear", 1))
    with pytest.raises(ValueError, match="hardwear"):
        published.read(path)


def test_a_report_of_a_comparable_setting_shows_the_published_figures(tmp_path):
    settings = {"dataset": "cifar10", "imbalance": 100.0, "model": "resnet32", "epochs": 200}
    made_up_runs.write_many(tmp_path / "runs", {"erm": [0.7], "lpa": [0.8]}, settings=settings)
    (section,) = report.make([tmp_path / "runs"], tmp_path / "out")
    assert [line[-1] for line in section.table] == ["published", "71.36", ""]
    assert "published: accuracies of other authors" in (tmp_path / "out/report.md").read_text()
