"""Flags that the domain generalization experiment and its tuning share."""

from collections.abc import Mapping
from typing import Any

from absl import flags

from experiments.domains.settings import DomainSettings
from experiments.methods import names as methods
from experiments.methods.search import ADAM_LARGE, ADAM_SMALL, Choice, LogUniform, Space
from experiments.training import flags as run_flags
from experiments.training import image_flags
from lpa_jax import data, models, optimizers
from lpa_jax.data.domain_folders import FOLDER_SETS

FLAGS = flags.FLAGS
# Penalties whose weight is 1 for the first `anneal_steps`: DomainBed's 500 of 5000 steps, unless
# drawn, tuned or given; the draws go by shares of the run, too.
ANNEALED = ("irm", "vrex")
ANNEALED_SHARE = 1 / 10
ANNEALED_SHARES = (0, 1 / 6, 1 / 3, 2 / 3)
# DomainBed's default; Manifold Mixup's own is 1.
MIXUP_ALPHA = 0.2


def define_flags(workdir: str) -> None:
    """Data, protocol, training, perturbations."""
    flags.DEFINE_list(
        "methods",
        ["erm", "coral", "lpa", "coral+lpa"],
        "Methods: erm, any perturbation, penalty or loss, or sums such as coral+lpa.",
    )
    flags.DEFINE_list("test_domains", ["all"], "Domains to hold out, each in turn; all of them.")
    flags.DEFINE_string("workdir", workdir, "Folder for everything that is written.")
    flags.DEFINE_enum(
        "dataset",
        "RotatedMNIST",
        data.DOMAIN_SETS,
        "RotatedMNIST and ColoredMNIST are embedded, of 5000 images; the others stand in "
        "--data_dir in DomainBed's folders.",
    )
    flags.DEFINE_string("data_dir", None, "Folder that holds the data set's folder.")
    flags.DEFINE_integer(
        "deal_seed", 0, "Which MNIST image falls to which domain; the same for all seeds."
    )
    flags.DEFINE_integer("image_size", None, "Pixels a side; unset: DomainBed's, 28 or 224.")
    flags.DEFINE_integer(
        "images_per_domain", None, "Images of every domain to use; unset: all. For trials."
    )
    flags.DEFINE_float("holdout_fraction", 0.2, "Share of every domain that validation takes.")
    flags.DEFINE_list(
        "learning_rate_range",
        [],
        "LOW,HIGH of the learning rates that are drawn; unset: DomainBed's for adamw, those of "
        "the other experiments for sgd.",
    )
    run_flags.define_search_flags()
    _define_training_flags()
    run_flags.define_runtime_flags()
    run_flags.define_perturbation_flags()
    # Classes are balanced, or nearly so: their sizes say nothing.
    FLAGS.set_default("assignment", "confidence")


def _define_training_flags() -> None:
    flags.DEFINE_enum("model", "small_cnn", models.names(), "Network architecture.")
    flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "Type of the computation.")
    flags.DEFINE_integer("train_steps", 300, "Steps of training; DomainBed: 5000.")
    flags.DEFINE_integer(
        "batch_size", 16, "Examples of EACH training domain in a step; DomainBed: 32, MNIST 64."
    )
    flags.DEFINE_enum(
        "optimizer", "adamw", optimizers.names(), "Optimiser; adamw without decay is Adam."
    )
    flags.DEFINE_float(
        "learning_rate", None, "Unset: tuned or drawn, else DomainBed's 1e-3 (MNIST) or 5e-5."
    )
    flags.DEFINE_float("weight_decay", None, "Unset: tuned or drawn, else 0.")
    flags.DEFINE_bool("decay_biases_and_norms", False, "Decay biases and norm scales, too.")
    flags.DEFINE_float("clip_norm", 0.0, "Bound of the gradient's global norm; 0 does not clip.")
    flags.DEFINE_enum(
        "schedule",
        "constant",
        ("constant", "cosine"),
        "Learning rate schedule; DomainBed has none.",
    )
    image_flags.define_flags(DomainSettings)
    flags.adopt_module_key_flags(image_flags)
    flags.DEFINE_integer("evaluate_every", 50, "Steps between checkpoints; divides --train_steps.")


def settings() -> DomainSettings:
    """`DomainSettings` from the parsed flags.

    Raises:
      ValueError: naming the first flag that is out of range.
    """
    rate = FLAGS.learning_rate
    if rate is None:
        rate = 5e-5 if FLAGS.dataset in FOLDER_SETS else 1e-3
    return DomainSettings(
        dataset=FLAGS.dataset,
        data_dir=FLAGS.data_dir,
        deal_seed=FLAGS.deal_seed,
        image_size=FLAGS.image_size,
        images_per_domain=FLAGS.images_per_domain,
        holdout_fraction=FLAGS.holdout_fraction,
        model=FLAGS.model,
        dtype=FLAGS.dtype,
        train_steps=FLAGS.train_steps,
        batch_size=FLAGS.batch_size,
        optimizer=FLAGS.optimizer,
        learning_rate=rate,
        weight_decay=FLAGS.weight_decay or 0.0,
        decay_biases_and_norms=FLAGS.decay_biases_and_norms,
        clip_norm=FLAGS.clip_norm or None,
        schedule=FLAGS.schedule,
        evaluate_every=FLAGS.evaluate_every,
        **image_flags.values(),
    ).check()


def domains_to_test(names: tuple[str, ...]) -> list[str]:
    """The domains to hold out.

    Args:
      names: the domains that there are.

    Raises:
      ValueError: an unknown domain, one twice, or none.
    """
    chosen = list(names) if FLAGS.test_domains == ["all"] else FLAGS.test_domains
    for domain in chosen:
        if domain not in names:
            raise ValueError(
                f"--test_domains: {FLAGS.dataset} has no domain {domain!r}; "
                f"it has: {', '.join(names)}"
            )
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"--test_domains must name different domains, got {','.join(chosen)!r}")
    return chosen


def search_ranges() -> dict[str, Space]:
    """Ranges of what is drawn, where they are not those of the other experiments.

    Raises:
      ValueError: a learning rate range that is none.
    """
    ranges: dict[str, Space] = {}
    if FLAGS.optimizer == "adamw":
        ranges |= ADAM_LARGE if FLAGS.dataset in FOLDER_SETS else ADAM_SMALL
    annealing = Choice(tuple(round(share * FLAGS.train_steps) for share in ANNEALED_SHARES))
    ranges |= {f"{name}.anneal_steps": annealing for name in ANNEALED}
    ranges |= run_flags.searched_space()
    if not FLAGS.learning_rate_range:
        return ranges
    try:
        low, high = (float(text) for text in FLAGS.learning_rate_range)
        if not 0 < low <= high < float("inf"):
            raise ValueError
    except ValueError:
        given = ",".join(FLAGS.learning_rate_range)
        raise ValueError(
            f"--learning_rate_range must be two numbers, 0 < LOW <= HIGH, got {given!r}"
        ) from None
    return ranges | {"learning_rate": LogUniform(low, high)}


def options_for(method: str, found: Mapping[str, Any], train_steps: int) -> dict[str, Any]:
    """Options of a method: this experiment's defaults, what was tuned or drawn, flags.

    Args:
      method: its name.
      found: what was tuned or drawn.
      train_steps: length of the run.

    Raises:
      ValueError: a flag's option that does not exist, or a penalty that would never reach its
        weight.
    """
    names = [part.name for part in methods.parse(method)]
    annealed = [f"{name}.anneal_steps" for name in names if name in ANNEALED]
    usual = dict.fromkeys(annealed, int(ANNEALED_SHARE * train_steps))
    if methods.MIXUP in names:
        usual[f"{methods.MIXUP}.alpha"] = MIXUP_ALPHA
    options = methods.options_for(method, usual | dict(found), run_flags.explicit_options())
    for key in annealed:
        if isinstance(options[key], int | float) and options[key] >= train_steps:
            raise ValueError(
                f"--option={key} must be below --train_steps={train_steps}, or the penalty never "
                f"reaches its weight, got {options[key]}"
            )
    return options | run_flags.explicit_run_options()
