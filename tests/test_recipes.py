"""Recipes cannot rot: their commands parse, their figures are those of the design notes."""

import re
import shlex

import commands
import made_up_runs
import numpy as np
import pytest

import lpa_jax
from experiments import methods, published, report, search

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
    long_tail = {"dataset": "cifar100", "profile": "exponential", "model": "resnet32"}
    assert published.accuracies(long_tail | {"imbalance": 100.0})["logit_adjusted+lpl"] == "46.11"
    assert published.accuracies(long_tail | {"imbalance": 50.0}) == {}


def test_a_recipe_with_a_key_too_many_is_refused_by_name(tmp_path):
    path = tmp_path / "table.toml"
    text = (published.FOLDER / "domainbed.toml").read_text()
    path.write_text(text.replace("hardware", "hardwear", 1))
    with pytest.raises(ValueError, match="hardwear"):
        published.read(path)


def test_a_report_of_a_comparable_setting_shows_the_published_figures(tmp_path):
    settings = {"dataset": "cifar10", "imbalance": 100.0, "model": "resnet32"}
    made_up_runs.write_many(tmp_path / "runs", {"erm": [0.7], "lpa": [0.8]}, settings=settings)
    (section,) = report.make([tmp_path / "runs"], tmp_path / "out")
    assert [line[-1] for line in section.table] == ["published", "71.36", ""]
    assert "published: accuracies of other authors" in (tmp_path / "out/report.md").read_text()
