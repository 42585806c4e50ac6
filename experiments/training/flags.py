"""Flags that every training experiment shares, and how they become `Settings` and options."""

import logging
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
from absl import flags

from experiments.images.settings import EVALUATION_SPLITS, PROFILES, Settings
from experiments.methods import data_set_defaults, search
from experiments.methods import names as methods
from experiments.runtime import hosts as distributed
from experiments.training import image_flags
from experiments.training.saving import Saving
from lpa_jax import data, losses, models, multihost, optimizers, pgd
from lpa_jax.perturbations.lpa import MODES

FLAGS = flags.FLAGS

# Help of every --seeds.
SEEDS = "Number of seeds, or a list of seeds and ranges such as 0-3,8 (4-4: seed 4 alone)"
# Flags that set an option of every perturbation that has it; None leaves it as tuned or default.
OPTION_FLAGS = (
    "radius",
    "steps",
    "step_size",
    "geometry",
    "norm",
    "shape",
    "mode",
    "assignment",
    "split",
    "kappa",
    "ema",
    "negative_scale",
)


def define_data_flags(dataset: str, profile: str) -> None:
    """Data set, split, profile."""
    flags.DEFINE_string(
        "dataset",
        dataset,
        f"Data set: {', '.join(data.EMBEDDED)} (embedded), or any TFDS image classification set "
        "of up to 8 GiB that is prepared in --data_dir, such as cifar10, cifar100, svhn_cropped; "
        f"{', '.join(data.PUBLISHED)} from the published list files in --data_dir; with "
        "--train_list any name.",
    )
    flags.DEFINE_string(
        "data_dir",
        None,
        "Folder of prepared TFDS sets, TFDS's default if unset; or of the published list files.",
    )
    flags.DEFINE_string(
        "train_list", None, "File of training images, a line each: path within --image_root, label."
    )
    flags.DEFINE_string("eval_list", None, "With --train_list: the same for the test images.")
    flags.DEFINE_string(
        "image_root", None, "Folder of the images that lists name; for published lists --data_dir."
    )
    flags.DEFINE_integer(
        "image_size", 224, "Pixels a side of images from lists, and of TFDS sets where they differ."
    )
    flags.DEFINE_bool(
        "prepare",
        False,
        "Prepare --dataset first: downloads it, and needs TensorFlow for sets of encoded images.",
    )
    flags.DEFINE_enum(
        "evaluate_on",
        "test",
        EVALUATION_SPLITS,
        "test, or validation: a part carved from the training split, the test images unread.",
    )
    flags.DEFINE_float(
        "validation_fraction", 0.2, "Share of the training split that validation takes."
    )
    flags.DEFINE_enum(
        "profile", profile, PROFILES, "How class sizes fall off; none keeps the whole set."
    )
    flags.DEFINE_float("imbalance", 100.0, "Size of the largest class over the smallest.")
    flags.DEFINE_integer(
        "per_class", None, "Training images a class to keep, before any long tail; unset: all."
    )
    flags.DEFINE_integer(
        "split_seed", None, "Seed of the training subset; unset, it is the run's own seed."
    )


def define_training_flags() -> None:
    """Model, optimiser, schedule, augmentation, loss."""
    flags.DEFINE_enum(
        "recipe",
        "auto",
        ("auto", "none"),
        "What flags of the training mean that are not given: auto takes the published recipe of "
        "CIFAR (LPL's for --profile=none, LDAM's for long tails), none the defaults shown here.",
    )
    flags.DEFINE_enum("model", "mlp", models.names(), "Network architecture.")
    flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "Type of the computation.")
    flags.DEFINE_integer("epochs", 60, "Passes over the training set.")
    flags.DEFINE_integer("batch_size", 64, "Examples in a step, over all devices.")
    flags.DEFINE_enum("optimizer", "sgd", optimizers.names(), "Optimiser of the parameters.")
    flags.DEFINE_float("learning_rate", None, "Highest rate; unset: tuned, the recipe's, or 0.02.")
    flags.DEFINE_float("weight_decay", None, "Unset: tuned, the recipe's, or 5e-4.")
    flags.DEFINE_bool("decay_biases_and_norms", False, "Decay biases and norm scales, too.")
    flags.DEFINE_float("clip_norm", 5.0, "Bound of the gradient's global norm; 0 does not clip.")
    flags.DEFINE_enum("schedule", "cosine", optimizers.SCHEDULES, "Learning rate schedule.")
    flags.DEFINE_float("warmup_epochs", 0.0, "Epochs of linear warm-up.")
    flags.DEFINE_list(
        "milestones", [], "Where the step schedule decays, as fractions of the run: 0.3,0.6,0.8."
    )
    flags.DEFINE_float("decay_factor", 0.2, "What each milestone multiplies the rate by.")
    image_flags.define_flags(Settings)
    flags.adopt_module_key_flags(image_flags)
    flags.DEFINE_enum("loss", "cross_entropy", losses.names(), "Training loss.")
    flags.DEFINE_integer(
        "drw_epoch", None, "With --loss=ldam: epoch from which classes are re-weighted (DRW)."
    )
    flags.DEFINE_integer("evaluate_every", 5, "Epochs between evaluations for the curves.")


def define_runtime_flags() -> None:
    """What changes how fast and how loud a run is, but not its numbers."""
    define_console_flags()
    flags.DEFINE_string(
        "checkpoint_every",
        "5minutes",
        "Interval between checkpoints: minutes, epochs or steps, such as 5minutes, 2epochs or "
        "200steps; never saves only when SIGTERM or SIGINT comes.",
    )
    flags.DEFINE_integer(
        "keep_checkpoints", 2, "Newest checkpoints that are kept, besides the best one."
    )
    flags.DEFINE_bool(
        "keep_finished_checkpoints",
        False,
        "Keep the last and the best checkpoint of a finished run, to have its weights.",
    )
    distributed.define_flags()
    # --helpshort shows the flags that a module adopts.
    flags.adopt_module_key_flags(distributed)


def say(line: str) -> None:
    """One line on standard error, of the first host and unless --quiet."""
    if not FLAGS.quiet and multihost.is_first_host():
        print(line, file=sys.stderr)


def define_console_flags() -> None:
    """The runtime flags of one process that saves no checkpoints."""
    flags.DEFINE_string(
        "compilation_cache",
        "runs/compilation_cache",
        "Folder where compiled programs are kept between runs; empty keeps none.",
    )
    flags.DEFINE_bool("quiet", False, "No progress, only the result.")


def apply_runtime_flags() -> None:
    """Turns the compilation cache on and JAX's notes about backends that are not there off."""
    logging.getLogger("jax").setLevel(logging.WARNING)
    if FLAGS.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.abspath(FLAGS.compilation_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def define_perturbation_flags() -> None:
    """Where and how to perturb."""
    flags.DEFINE_string(
        "layer",
        None,
        "Injection point of perturbations that name none: input, a hidden layer or logits; unset: "
        "tuned, else the first hidden layer. LPL always stands at the logits, and RSC at the last "
        "hidden layer unless it is written rsc@LAYER.",
    )
    flags.DEFINE_float("radius", None, "Radius of lpa and adversarial, relative to mean ||h||.")
    flags.DEFINE_float("lpl_radius", None, "Radius of lpl, in units of the logits.")
    flags.DEFINE_integer("steps", None, "PGD steps.")
    flags.DEFINE_float("step_size", None, "Path length of all PGD steps together, in radii.")
    flags.DEFINE_enum("geometry", None, pgd.GEOMETRIES, "Half-space of lpa and lpl.")
    flags.DEFINE_enum("norm", None, pgd.NORMS, "Norm of the radius.")
    flags.DEFINE_enum("shape", None, pgd.SHAPES, "One value an activation entry, or a channel.")
    flags.DEFINE_enum("mode", None, MODES, "How lpa reuses earlier work.")
    flags.DEFINE_enum("assignment", None, methods.ASSIGNMENTS, "Which classes get which sign.")
    flags.DEFINE_float("split", None, "Head classes of the frequency rule, a share or a number.")
    flags.DEFINE_float("kappa", None, "Strength of the radius multiplier of the assignment.")
    flags.DEFINE_float("ema", None, "Smoothing of the confidence rule over steps, in [0, 1).")
    flags.DEFINE_float("negative_scale", None, "Factor on the radius of negative classes.")
    flags.DEFINE_multi_string(
        "option",
        [],
        "Any other option, as PART.OPTION=VALUE, for example dropout.rate=0.3 or lpl.steps=10.",
    )


def define_search_flags() -> None:
    """Where a random search places perturbations."""
    flags.DEFINE_list(
        "search_layers",
        [],
        "Layers among which a random search draws where perturbations stand; unset: --layer, else "
        "all hidden layers.",
    )
    flags.DEFINE_multi_string(
        "space",
        [],
        "Range of an option that a random search draws, in the place of the usual one or beside "
        "them: lpa.radius_target=0.03:2 (uniform in the logarithm) or lpa.steps=1|3|5.",
    )


def searched_space() -> dict[str, search.Space]:
    """Ranges that replace those of the search, or add to them: those of `--head`, then `--space`.

    Raises:
      ValueError: no such option or no such range, or an option twice.
    """
    spaces = [search.parse_space(text) for text in FLAGS.space]
    names = [name for name, _ in spaces]
    if len(set(names)) < len(names):
        raise ValueError(f"--space must name different options, got {', '.join(names)}")
    return (search.COSINE_SCALE if FLAGS.head == "normalized" else {}) | dict(spaces)


def searched_layers(model: str) -> search.HiddenLayers:
    """Where drawn perturbations may stand.

    Raises:
      ValueError: a layer that the model does not have.
    """
    return search.hidden_layers(model, tuple([FLAGS.layer] if FLAGS.layer else FLAGS.search_layers))


def settings() -> Settings:
    """`Settings` from the parsed flags.

    Raises:
      ValueError: naming the first flag that is out of range.
    """
    recipe = follow_recipe()
    try:
        milestones = tuple(float(text) for text in FLAGS.milestones)
    except ValueError:
        raise ValueError(f"--milestones must be numbers, got {FLAGS.milestones!r}") from None
    defaults = Settings()
    return Settings(
        dataset=_dataset_name(),
        data_dir=FLAGS.data_dir,
        train_list=FLAGS.train_list,
        eval_list=FLAGS.eval_list,
        image_root=FLAGS.image_root,
        image_size=FLAGS.image_size,
        evaluate_on=FLAGS.evaluate_on,
        validation_fraction=FLAGS.validation_fraction,
        profile=FLAGS.profile,
        imbalance=FLAGS.imbalance,
        per_class=FLAGS.per_class,
        split_seed=FLAGS.split_seed,
        model=FLAGS.model,
        dtype=FLAGS.dtype,
        epochs=FLAGS.epochs,
        batch_size=FLAGS.batch_size,
        optimizer=FLAGS.optimizer,
        learning_rate=_or(FLAGS.learning_rate, recipe.get("learning_rate", defaults.learning_rate)),
        weight_decay=_or(FLAGS.weight_decay, recipe.get("weight_decay", defaults.weight_decay)),
        decay_biases_and_norms=FLAGS.decay_biases_and_norms,
        clip_norm=FLAGS.clip_norm or None,
        schedule=FLAGS.schedule,
        warmup_epochs=FLAGS.warmup_epochs,
        milestones=milestones,
        decay_factor=FLAGS.decay_factor,
        loss=FLAGS.loss,
        drw_epoch=FLAGS.drw_epoch,
        evaluate_every=FLAGS.evaluate_every,
        **image_flags.values(),
    ).check()


def follow_recipe() -> Mapping[str, Any]:
    """Sets the flags that are not given to what `--recipe` says, and returns the recipe.

    Learning rate and weight decay stay unset: what a method was tuned to comes before a recipe.
    """
    if FLAGS.recipe == "none":
        return {}
    model = FLAGS.model if FLAGS["model"].present else None
    recipe = data_set_defaults.defaults(FLAGS.dataset, FLAGS.profile, model)
    for name in set(recipe) - {*methods.RUN_OPTIONS}:
        FLAGS.set_default(name, recipe[name])
    return recipe


def recipe_options(method: str) -> dict[str, Any]:
    """Options that `--recipe` gives a method that was not tuned."""
    if FLAGS.recipe == "none":
        return {}
    parts = {part.name for part in methods.parse(method)}
    known = data_set_defaults.method_options(FLAGS.dataset, FLAGS.profile)
    return {name: value for name, value in known.items() if name.partition(".")[0] in parts}


def _dataset_name() -> str:
    """`--dataset`; the name of `--train_list` where only that is given."""
    if FLAGS.train_list is None or FLAGS["dataset"].present:
        return FLAGS.dataset
    return pathlib.Path(FLAGS.train_list).stem


def saving() -> Saving:
    """Checkpointing from the parsed flags.

    Raises:
      ValueError: naming the flag that is out of range.
    """
    return Saving(FLAGS.checkpoint_every, FLAGS.keep_checkpoints, FLAGS.keep_finished_checkpoints)


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


def explicit_options() -> dict[str, Any]:
    """Options of perturbations that were given as flags.

    Raises:
      ValueError: an `--option` that is not PART.OPTION=VALUE.
    """
    options = {name: FLAGS[name].value for name in OPTION_FLAGS}
    options |= {"lpl.radius": FLAGS.lpl_radius, "layer": FLAGS.layer}
    options = {name: value for name, value in options.items() if value is not None}
    for text in FLAGS.option:
        key, equals, value = text.partition("=")
        if not equals or "." not in key:
            raise ValueError(f"--option must be PART.OPTION=VALUE, got {text!r}")
        options[key] = methods.parsed_value(value)
    return options


def explicit_run_options() -> dict[str, float]:
    """Learning rate and weight decay, where they were given as flags."""
    given = {name: FLAGS[name].value for name in methods.RUN_OPTIONS}
    return {name: value for name, value in given.items() if value is not None}


def seeds(texts: list[str]) -> list[int]:
    """Seeds from a flag: one number n means 0..n-1, several and ranges mean themselves.

    Raises:
      ValueError: not whole numbers >= 0 or ranges of them, none, or one twice.

    >>> seeds(["3"]), seeds(["4", "7"]), seeds(["0-3", "8"]), seeds(["4-4"])
    ([0, 1, 2], [4, 7], [0, 1, 2, 3, 8], [4])
    """
    given = ",".join(texts)
    if len(texts) == 1 and texts[0].strip().isdecimal():
        texts = [f"0-{int(texts[0]) - 1}"] if int(texts[0]) else []
    numbers = []
    for text in texts:
        first, dash, last = (part.strip() for part in text.partition("-"))
        last = last if dash else first
        if not first.isdecimal() or not last.isdecimal():
            raise ValueError(
                f"--seeds must be whole numbers >= 0 or ranges such as 4-7, got {given!r}"
            )
        if int(last) < int(first):
            raise ValueError(f"--seeds: the range {text.strip()!r} ends before it begins")
        numbers += range(int(first), int(last) + 1)
    if not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"--seeds must name different seeds, got {given!r}")
    return numbers


def resolved() -> dict[str, Any]:
    """All flags of the project with their values, for the record."""
    own = ("experiments.", "__main__")
    return {
        flag.name: flag.value
        for module, module_flags in FLAGS.flags_by_module_dict().items()
        if module.startswith(own) or pathlib.Path(module).parent.name == "experiments"
        for flag in module_flags
    }


def _or(value, default):
    return default if value is None else value
