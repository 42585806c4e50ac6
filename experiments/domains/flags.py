"""Flags that the domain generalization experiment and its tuning share."""

from collections.abc import Mapping
from typing import Any

from absl import flags

from experiments.domains.settings import DomainSettings
from experiments.methods import flags as method_flags
from experiments.methods import names
from experiments.methods.search import ADAM_LARGE, ADAM_SMALL, Choice, LogUniform, Space
from experiments.runtime import fields, files
from experiments.training import flags as run_flags
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
    """Defines the flags of data, protocol, training and perturbations."""
    flags.DEFINE_list(
        "methods",
        ["erm", "coral", "lpa", "coral+lpa"],
        "Methods: erm, any perturbation, penalty or loss, or sums such as coral+lpa.",
    )
    flags.DEFINE_list(
        "test_domains", ["all"], "Domains to hold out, one at a time; all means every domain."
    )
    files.define_path("workdir", workdir, "Folder for everything that is written.", folder=True)
    flags.DEFINE_list(
        "learning_rate_range",
        [],
        "LOW,HIGH of the learning rates that are drawn; unset: DomainBed's for adamw, those of "
        "the other experiments for sgd.",
    )
    fields.define(DomainSettings)
    fields.define(method_flags.Searching)
    # Classes are balanced, or nearly so: their sizes decide no signs.
    fields.define(method_flags.Perturbing, assignment="confidence")
    run_flags.define_runtime_flags()


def settings() -> DomainSettings:
    """`DomainSettings` from the parsed flags.

    Raises:
      ValueError: naming the first flag that is out of bounds or does not fit.
    """
    of_files = FLAGS.learning_rate is None and FLAGS.dataset in FOLDER_SETS
    given = {"learning_rate": 5e-5} if of_files else {}
    return fields.read(DomainSettings, **given).check()


def domains_to_test(domains: tuple[str, ...]) -> list[str]:
    """The domains to hold out.

    Args:
      domains: the domains that there are.

    Raises:
      ValueError: an unknown domain, one twice, or none.
    """
    chosen = list(domains) if FLAGS.test_domains == ["all"] else FLAGS.test_domains
    for domain in chosen:
        if domain not in domains:
            raise ValueError(
                f"--test_domains: {FLAGS.dataset} has no domain {domain!r}; "
                f"it has: {', '.join(domains)}"
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
    ranges |= method_flags.searched_space()
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
    parts = [part.name for part in names.parse(method)]
    annealed = [f"{name}.anneal_steps" for name in parts if name in ANNEALED]
    usual = dict.fromkeys(annealed, int(ANNEALED_SHARE * train_steps))
    if names.MIXUP in parts:
        usual[f"{names.MIXUP}.alpha"] = MIXUP_ALPHA
    options = method_flags.options_for(method, usual | dict(found))
    for key in annealed:
        if isinstance(options[key], int | float) and options[key] >= train_steps:
            raise ValueError(
                f"--option={key} must be below --train_steps={train_steps}, or the penalty never "
                f"reaches its weight, got {options[key]}"
            )
    return options
