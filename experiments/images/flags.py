"""Flags of classification: `Settings` from the command line, by the data set's recipe."""

import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from absl import flags

from experiments.images.settings import Settings
from experiments.methods import data_set_defaults, names
from experiments.runtime import fields
from lpa_jax import data

FLAGS = flags.FLAGS


def define(profile: str = "exponential") -> None:
    """Defines the flags of data and training, with an experiment's default of `--profile`."""
    fields.define(Settings, profile=profile)
    flags.DEFINE_bool(
        "prepare",
        False,
        "Prepare --dataset first: downloads it, and needs TensorFlow for sets of encoded images.",
    )
    fields.place("data", "prepare")
    fields.place("training", "recipe")
    flags.DEFINE_enum(
        "recipe",
        "auto",
        ("auto", "none"),
        "Values of training flags that are not given: auto takes the published recipe of CIFAR "
        "(LPL's for --profile=none, LDAM's for long tails), none the defaults shown here.",
    )


def settings() -> Settings:
    """`Settings` from the parsed flags.

    Raises:
      ValueError: naming the first flag that is out of bounds or does not fit.
    """
    recipe = _follow_recipe()
    # What a method was tuned to comes before a recipe, so that these two flags stay unset.
    given = {
        name: recipe[name]
        for name in names.RUN_OPTIONS
        if name in recipe and FLAGS[name].value is None
    }
    if FLAGS.train_list is not None and not FLAGS["dataset"].present:
        given["dataset"] = pathlib.Path(FLAGS.train_list).stem
    return fields.read(Settings, **given).check()


def _follow_recipe() -> Mapping[str, Any]:
    """Sets the flags that are not given to the values of `--recipe`, and returns the recipe."""
    if FLAGS.recipe == "none":
        return {}
    model = FLAGS.model if FLAGS["model"].present else None
    recipe = data_set_defaults.defaults(FLAGS.dataset, FLAGS.profile, model)
    for name in set(recipe) - {*names.RUN_OPTIONS}:
        FLAGS.set_default(name, recipe[name])
    return recipe


def recipe_options(method: str) -> dict[str, Any]:
    """Options that `--recipe` gives a method that was not tuned."""
    if FLAGS.recipe == "none":
        return {}
    parts = {part.name for part in names.parse(method)}
    known = data_set_defaults.method_options(FLAGS.dataset, FLAGS.profile)
    return {name: value for name, value in known.items() if name.partition(".")[0] in parts}


def prepare_data() -> None:
    """Prepares the data set in `--data_dir`, if `--prepare` says so.

    Raises:
      ValueError: it cannot be prepared here.
    """
    if not FLAGS.prepare:
        return
    if FLAGS.train_list is not None or FLAGS.dataset in data.PUBLISHED:
        raise ValueError("--prepare: list files and their images are read as they are")
    print(f"Preparing {FLAGS.dataset} ...", file=sys.stderr, flush=True)
    try:
        data.prepare(FLAGS.dataset, FLAGS.data_dir)
    except RuntimeError as error:
        raise ValueError(f"--prepare: {error}") from None
