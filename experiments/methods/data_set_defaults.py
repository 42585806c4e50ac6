"""Defaults that depend on the data set: the recipe that published figures were obtained with.

Papers compare methods on CIFAR under one recipe. There, a flag that is not given takes the recipe's
value, not the default for the small embedded sets. `experiments/methods/recipes` has the complete
commands, hardware and published figures. Two differences remain: momentum is Nesterov's here, which
LDAM's code does not use, and LDAM's published head needs --head=normalized.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from lpa_jax.data.domains import DOMAIN_SETS
from lpa_jax.data.sources import base_name

CIFAR = ("cifar10", "cifar100")
_EVERY_CIFAR = {
    "batch_size": 128,
    "learning_rate": 0.1,
    "clip_norm": 0.0,
    # PyTorch, which these recipes were run in, decays all parameters.
    "decay_biases_and_norms": True,
    "schedule": "step",
    "augmentation": "crop+flip",
    "crop_padding": 4,
}
# Li et al., AAAI 2022 and arXiv 2209.05668: epochs 60, 120, 160 and 200 of 240.
LPL = MappingProxyType(
    {
        **_EVERY_CIFAR,
        "model": "wrn_28_10",
        "epochs": 240,
        "weight_decay": 5e-4,
        "milestones": ["0.25", "0.5", "0.6667", "0.8333"],
        "decay_factor": 0.2,
    }
)
# Its logits are perturbed by 40 steps of 0.01.
LPL_OPTIONS = MappingProxyType({"lpl.steps": 40, "lpl.step_size": 1.0, "lpl.radius": 0.4})
# Cao et al., arXiv 1906.07413, which LPL and logit adjustment follow: epochs 160 and 180 of 200.
LDAM = MappingProxyType(
    {
        **_EVERY_CIFAR,
        "model": "resnet32",
        "epochs": 200,
        "weight_decay": 2e-4,
        "warmup_epochs": 5.0,
        "milestones": ["0.8", "0.9"],
        "decay_factor": 0.01,
    }
)


# LPL's wide ResNets have dropout between the convolutions of a block.
_WIDE_RESNET_DROPOUT = {"model_dropout": 0.3}


def set_name(dataset: str) -> str:
    """The data set of `--dataset`, which may add a version as TFDS advises.

    >>> set_name("cifar10:3.0.2"), set_name("RotatedMNIST")
    ('cifar10', 'RotatedMNIST')
    """
    return dataset if dataset in DOMAIN_SETS else base_name(dataset)


def defaults(dataset: str, profile: str, model: str | None = None) -> Mapping[str, Any]:
    """Values of flags that are not given, by name; empty where no recipe is published.

    Args:
      dataset: `--dataset`.
      profile: `--profile`: LPL's recipe for none, LDAM's for every other profile.
      model: `--model` if it is given, else the recipe's.

    >>> defaults("cifar100", "none")["epochs"], defaults("cifar10", "step")["model"]
    (240, 'resnet32')
    >>> defaults("cifar10:3.0.2", "none") == defaults("cifar10", "none")
    True
    >>> dict(defaults("mnist5k", "none"))
    {}
    """
    if set_name(dataset) not in CIFAR:
        return {}
    if profile != "none":
        return LDAM
    wide = (model or LPL["model"]).startswith("wrn")
    return LPL | (_WIDE_RESNET_DROPOUT if wide else {})


def method_options(dataset: str, profile: str) -> Mapping[str, Any]:
    """Options of methods that were not tuned, by `part.option`; empty without a recipe.

    Args:
      dataset: `--dataset`.
      profile: `--profile`; on long tails LPL's steps depend on the set, see
        `experiments/methods/recipes`.

    >>> method_options("cifar10", "none")["lpl.steps"], dict(method_options("cifar10", "step"))
    (40, {})
    """
    return LPL_OPTIONS if set_name(dataset) in CIFAR and profile == "none" else {}
