"""What several losses share: checks of their arguments, and class constants beside logits."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpa_jax.tracing import is_known


def require(holds: bool, name: str, value: Any, allowed: str) -> None:
    """Raises ValueError, naming the argument and its value, unless the condition holds."""
    if not holds:
        raise ValueError(f"{name} must be {allowed}; got {value!r}")


def check_counts(counts: Sequence[float]) -> np.ndarray:
    """The counts as float64 [C]; raises ValueError unless 1-D, positive and finite."""
    try:
        array = np.asarray(counts, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(
            "counts must be a 1-D sequence of numbers known on the host; "
            f"got {type(counts).__name__}"
        ) from None
    if array.ndim != 1 or array.size == 0:
        raise ValueError(
            f"counts must be 1-D with one entry for each class; got shape {array.shape}"
        )
    bad = np.flatnonzero(~(np.isfinite(array) & (array > 0.0)))
    if bad.size:
        raise ValueError(
            f"counts must be positive and finite; got {array[bad[0]]:g} for class {bad[0]}"
        )
    return array


def log_prior(counts: Sequence[float], tau: float) -> np.ndarray:
    """`tau` times the log of each class's share of the training set, [C]; raises ValueError."""
    counts = check_counts(counts)
    require(not is_known(tau) or 0.0 <= tau < math.inf, "tau", tau, "finite and at least 0")
    return tau * np.log(counts / counts.sum())


def at_least_float32(array: jax.Array) -> jax.Array:
    """The array in float32, unless it is float64."""
    return array if array.dtype == jnp.float64 else array.astype(jnp.float32)


def prepare(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both in one dtype of at least float32; integer labels for targets fail by their shape."""
    logits, targets = jnp.asarray(logits), jnp.asarray(targets)
    if logits.shape != targets.shape or logits.ndim == 0:
        raise ValueError(
            f"targets must be class probabilities with the shape of logits, {logits.shape}; "
            f"got shape {targets.shape}"
        )
    logits = at_least_float32(logits)
    return logits, targets.astype(logits.dtype)


def per_class(vector: np.ndarray, logits: jax.Array) -> jax.Array:
    """A class constant [C] in the dtype and rank of the logits [..., C]."""
    if vector.size != logits.shape[-1]:
        raise ValueError(
            f"counts must have one entry for each of the {logits.shape[-1]} classes of logits; "
            f"got {vector.size}"
        )
    return jnp.asarray(vector.reshape((1,) * (logits.ndim - 1) + (-1,)), dtype=logits.dtype)
