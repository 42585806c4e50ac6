"""Dropout: every unit of the activation is zeroed at random, independently of all others."""

import jax
import jax.numpy as jnp

from lpa_jax import checks, tables
from lpa_jax.perturbations.base import Perturbation, identity, register, stateless

Array = jax.Array


@register("dropout")
def dropout(rate: float = 0.5) -> Perturbation:
    r"""Inverted dropout, unbiased: E[h~_i] = h_i.

        h~_i = h_i * m_i / (1 - rate),    m_i ~ Bernoulli(1 - rate), one for every unit

    Args:
      rate: Probability p of zeroing a unit, in [0, 1). 0 is no perturbation, bitwise.

    Raises:
      ValueError: `rate` out of range.

    Example:
      >>> dropout(0.5).name
      'dropout'

    References:
      Srivastava et al., JMLR 15 (2014), in the inverted form that leaves evaluation alone.
      The default is that of the publication for hidden layers; it takes 0.2 at the input.
    """
    checks.number("rate", rate, 0.0, 1.0, open_high=True)
    if checks.vanishes(rate):
        return identity("dropout")

    def perturb(site):
        dropped = jax.random.bernoulli(site.rng, rate, site.activation.shape)
        return inverted_dropout(site.activation, dropped, 1.0 - rate), site.targets

    return stateless("dropout", perturb)


def inverted_dropout(activation: Array, dropped: Array, keep_probability: Array | float) -> Array:
    """Zeroes `activation` where `dropped` and divides the rest by E[m], in at least float32.

    Args:
      activation: h_i, [B, *S].
      dropped: Booleans that broadcast over `activation` at the same rank.
      keep_probability: E[m], a scalar or an array that broadcasts over `activation`. In bfloat16
        its rounding would bias every unit the same way, hence the wider type.

    Example:
      >>> inverted_dropout(jnp.array([[1.0, 2.0]]), jnp.array([[True, False]]), 0.5).tolist()
      [[0.0, 4.0]]
    """
    dtype = tables.perturbation_dtype(activation)
    kept = activation.astype(dtype) / jnp.asarray(keep_probability, dtype)
    return jnp.where(dropped, 0.0, kept)
