"""What several losses share: class counts, and class constants beside logits."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from lpa_jax import checks
from lpa_jax.tables import at_least_float32


def class_counts(counts: ArrayLike) -> np.ndarray:
    """The counts as float64 [C]; raises ValueError unless positive and finite."""
    return checks.vector("counts", counts, open_low=True)


def log_prior(counts: ArrayLike, tau: float) -> np.ndarray:
    """`tau` times the log of each class's share of the training set, [C]; raises ValueError."""
    counts = class_counts(counts)
    checks.number("tau", tau)
    return tau * np.log(counts / counts.sum())


def prepare(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both in one dtype of at least float32; integer labels for targets fail by their shape."""
    logits, targets = checks.array("logits", logits), checks.array("targets", targets)
    if logits.shape != targets.shape or logits.ndim == 0:
        raise ValueError(
            f"targets must be class probabilities with the shape of logits, {logits.shape}, "
            f"got shape {targets.shape}"
        )
    logits = at_least_float32(logits)
    return logits, targets.astype(logits.dtype)


def per_class(vector: np.ndarray, logits: jax.Array) -> jax.Array:
    """A class constant [C] in the dtype and rank of the logits [..., C]."""
    if vector.size != logits.shape[-1]:
        raise ValueError(
            f"counts must have one entry for each of the {logits.shape[-1]} classes of logits, "
            f"got {vector.size}"
        )
    return jnp.asarray(vector.reshape((1,) * (logits.ndim - 1) + (-1,)), dtype=logits.dtype)
