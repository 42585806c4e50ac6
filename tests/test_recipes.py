"""Recipes cannot rot: their commands parse, their figures are those of the design notes."""

import shlex

import commands
import made_up_runs
import pytest

from experiments import methods, published, report

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
    assert published.accuracies(wide)["lpl"] == "96.63 +- 0.04"
    long_tail = {"dataset": "cifar100", "profile": "exponential", "model": "resnet32",
                 "epochs": 200}  # fmt: skip
    assert published.accuracies(long_tail | {"imbalance": 100.0})["logit_adjusted+lpl"] == "46.11"
    assert published.accuracies(long_tail | {"imbalance": 50.0}) == {}


@pytest.mark.parametrize(
    "changed",
    [{"epochs": 1}, {"evaluate_on": "validation"}, {"per_class": 50}],
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
