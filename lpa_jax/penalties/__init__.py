"""Penalties: what is added to the training objective."""

from lpa_jax.penalties.base import Observed, Penalty, create, names, option_types, options, register
from lpa_jax.penalties.coral import coral
from lpa_jax.penalties.group_dro import group_dro
from lpa_jax.penalties.irm import irm
from lpa_jax.penalties.isda import isda
from lpa_jax.penalties.spectral_decoupling import spectral_decoupling
from lpa_jax.penalties.vrex import vrex

__all__ = [
    "Observed", "Penalty", "coral", "create", "group_dro", "irm", "isda", "names", "option_types",
    "options", "register", "spectral_decoupling", "vrex",
]  # fmt: skip
