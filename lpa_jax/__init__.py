"""Learning to Perturb Activations (LPA): class-level perturbation of hidden layers in JAX.

A perturbation is a value (`lpa`, `lpl`, `dropout`, ...), an injection point is a layer's name, and
a training step is a pure function of both::

    step = functools.partial(lpa_step, perturbations={"stage3": lpa(radius=0.05)})
"""

import importlib
import typing

from lpa_jax import injection, losses, metrics, optimizers, parallel, penalties, perturbations
from lpa_jax.assignment import (
    Assignment,
    all_negative,
    all_positive,
    by_confidence,
    by_frequency,
    custom,
)
from lpa_jax.injection import CutFunctions, Network, decode, encode, inject, with_batch_names
from lpa_jax.losses import cross_entropy
from lpa_jax.penalties import Penalty
from lpa_jax.perturbations import (
    Perturbation,
    Site,
    adversarial,
    chain,
    dropout,
    gaussian_noise,
    lpa,
    lpl,
    manifold_mixup,
    mixstyle,
    rsc,
    spatial_dropout,
)
from lpa_jax.pgd import class_perturbation
from lpa_jax.training import TrainState, eval_step, initial_states, lpa_step, perturbed_forward

if typing.TYPE_CHECKING:
    from lpa_jax import data, diagnostics, models
    from lpa_jax.diagnostics import suggest_radius

__version__ = "0.1.0"
__all__ = [
    "Assignment", "CutFunctions", "Network", "Penalty", "Perturbation", "Site", "TrainState",
    "adversarial", "all_negative", "all_positive", "by_confidence", "by_frequency", "chain",
    "class_perturbation", "cross_entropy", "custom", "data", "decode", "diagnostics", "dropout",
    "encode", "eval_step", "gaussian_noise", "initial_states", "inject", "injection", "losses",
    "lpa", "lpa_step", "lpl", "manifold_mixup", "metrics", "mixstyle", "models", "optimizers",
    "parallel", "penalties", "perturbations", "perturbed_forward", "rsc", "spatial_dropout",
    "suggest_radius", "with_batch_names",
]  # fmt: skip


def __getattr__(name: str) -> typing.Any:
    """What a training step does not need is imported when it is first asked for."""
    if name == "suggest_radius":
        return importlib.import_module("lpa_jax.diagnostics").suggest_radius
    if name in ("data", "diagnostics", "models"):
        return importlib.import_module(f"lpa_jax.{name}")
    raise AttributeError(f"module 'lpa_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names alone, for tab completion."""
    return sorted(__all__)
