"""What is done at an injection point: one method a file, one interface, one registry."""

from lpa_jax.perturbations.adversarial import adversarial
from lpa_jax.perturbations.base import (
    Applied,
    Feedback,
    Perturbation,
    Site,
    chain,
    create,
    identity,
    names,
    option_types,
    options,
    register,
    stateless,
    with_labels,
)
from lpa_jax.perturbations.domain_mixup import domain_mixup
from lpa_jax.perturbations.dropout import dropout
from lpa_jax.perturbations.lpa import lpa
from lpa_jax.perturbations.lpl import lpl
from lpa_jax.perturbations.manifold_mixup import manifold_mixup
from lpa_jax.perturbations.mixstyle import mixstyle
from lpa_jax.perturbations.noise import gaussian_noise
from lpa_jax.perturbations.rsc import rsc
from lpa_jax.perturbations.spatial_dropout import spatial_dropout

__all__ = [
    "Applied",
    "Feedback",
    "Perturbation",
    "Site",
    "adversarial",
    "chain",
    "create",
    "domain_mixup",
    "dropout",
    "gaussian_noise",
    "identity",
    "lpa",
    "lpl",
    "manifold_mixup",
    "mixstyle",
    "names",
    "option_types",
    "options",
    "register",
    "rsc",
    "spatial_dropout",
    "stateless",
    "with_labels",
]
