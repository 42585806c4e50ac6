"""Flags that are not given follow the published recipe of the data set."""

import pytest
from absl import flags

from experiments import balanced, layer_sweep, long_tail
from experiments.images import compare
from experiments.images import flags as image_flags
from experiments.methods import data_set_defaults
from experiments.methods import flags as method_flags
from tests.helpers.module_call import forget_flags

FLAGS = flags.FLAGS


def parsed(module, *arguments):
    """The settings and run options that a command line means."""
    try:
        module.define_flags()
        FLAGS([module.__name__, *arguments])
        return image_flags.settings(), method_flags.explicit_run_options()
    finally:
        forget_flags()


def test_balanced_cifar_is_trained_by_the_recipe_of_lpl():
    settings, explicit = parsed(balanced, "--dataset=cifar100")
    assert (settings.model, settings.epochs, settings.batch_size) == ("wrn_28_10", 240, 128)
    assert (settings.learning_rate, settings.weight_decay) == (0.1, 5e-4)
    assert settings.clip_norm is None and settings.augmentation == "crop+flip"
    assert [round(m * settings.epochs) for m in settings.milestones] == [60, 120, 160, 200]
    assert (settings.schedule, settings.decay_factor, settings.crop_padding) == ("step", 0.2, 4)
    assert settings.model_dropout == settings.network(10).dropout == 0.3
    assert settings.decay_biases_and_norms, "as PyTorch does"
    assert explicit == {}, "a recipe's learning rate is no reason to ignore a tuned one"


def test_long_tailed_cifar_is_trained_by_the_recipe_of_ldam():
    settings, _ = parsed(long_tail, "--dataset=cifar10")
    assert (settings.model, settings.epochs, settings.warmup_epochs) == ("resnet32", 200, 5)
    assert (settings.learning_rate, settings.weight_decay) == (0.1, 2e-4)
    assert settings.decay_biases_and_norms, "as PyTorch does"
    assert [round(m * settings.epochs) for m in settings.milestones] == [160, 180]


def test_flags_override_single_values_of_a_recipe_and_none_overrides_it_whole():
    given = ("--epochs=7", "--learning_rate=0.3", "--clip_norm=5")
    other, _ = parsed(balanced, "--dataset=cifar10", "--model=resnet110")
    assert (other.epochs, other.model_dropout) == (240, 0), "only wide ResNets have dropout"
    settings, explicit = parsed(long_tail, "--dataset=cifar10", *given)
    assert (settings.epochs, settings.learning_rate, settings.clip_norm) == (7, 0.3, 5)
    assert (settings.model, settings.batch_size) == ("resnet32", 128)
    assert explicit == {"learning_rate": 0.3}
    plain, _ = parsed(long_tail, "--dataset=cifar10", "--recipe=none")
    embedded, _ = parsed(long_tail)
    assert plain.as_dict() | {"dataset": "mnist5k"} == embedded.as_dict()


def options(*arguments, pooled):
    """Options of `lpl`, without its rule, that a command line means."""
    try:
        balanced.define_flags()
        FLAGS(["balanced", "--methods=erm,lpl", *arguments])
        image_flags.settings()
        found = compare.resolve_options(pooled)
        return {name: value for name, value in found["lpl"].items() if name != "lpl.assignment"}
    finally:
        forget_flags()


def test_lpl_takes_the_steps_of_its_recipe_on_cifar_unless_it_was_tuned_or_told_otherwise():
    published = {"lpl.steps": 40, "lpl.step_size": 1.0, "lpl.radius": 0.4}
    cifar = "--dataset=cifar10"
    assert options(cifar, pooled={}) == published
    assert options(cifar, "--steps=7", pooled={}) == published | {"lpl.steps": 7}
    tuned = {"lpl": {"lpl.radius": 2.0}}
    assert options(cifar, pooled=tuned) == {"lpl.radius": 2.0}
    assert options(cifar, "--recipe=none", pooled={}) == {}
    assert options(pooled={}) == {}


def test_a_layer_sweep_gives_lpl_the_steps_of_its_recipe_too():
    def steps_of(tuned):
        try:
            layer_sweep.define_flags()
            FLAGS(["layer_sweep", "--methods=lpa+lpl", "--dataset=cifar10", "--profile=none"])
            found = layer_sweep.resolve_options(("stage2",), tuned)
            return found["lpa@stage2+lpl"].get("lpl.steps")
        finally:
            forget_flags()

    assert steps_of({}) == 40
    assert steps_of({"lpa+lpl": {"lpl.radius": 2.0}}) is None


@pytest.mark.parametrize("recipe", [data_set_defaults.LPL, data_set_defaults.LDAM])
def test_a_recipe_names_flags(recipe):
    try:
        long_tail.define_flags()
        assert set(recipe) <= set(FLAGS)
    finally:
        forget_flags()
