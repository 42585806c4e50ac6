"""Focal loss: the weight of an example falls with its confidence."""

import jax
import jax.numpy as jnp

from lpa_jax import checks
from lpa_jax.losses.base import Loss, register
from lpa_jax.losses.common import prepare


@register("focal", one_class=True)
def focal(gamma: float = 2.0) -> Loss:
    """Focal loss: examples that are already classified well count less.

        loss(z, t) = -sum_c t_c (1 - p_c)^gamma log p_c,    p = softmax(z)

    This is the softmax form; with one true class it is the published (1 - p_y)^gamma (-log p_y).

    Args:
      gamma: Focusing exponent, at least 0. 0 is cross entropy.

    Raises:
      ValueError: If gamma is negative or not finite.

    Example:
      >>> logits = jnp.log(jnp.array([[1.0, 3.0]]))  # softmax (1/4, 3/4)
      >>> round(float(focal(2.0)(logits, jnp.array([[0.0, 1.0]]))[0]), 4)  # log(4/3) / 16
      0.018

    References:
      Lin et al. 2017, Focal Loss for Dense Object Detection, arXiv 1708.02002, equation 4.
    """
    checks.number("gamma", gamma)

    def loss(logits, targets):
        logits, targets = prepare(logits, targets)
        surprise = -jax.nn.log_softmax(logits)
        # Where p_c rounds to 1 the slope is 0, but for gamma < 1 the chain rule multiplies 0 by
        # infinity: the inner `where` keeps that out of the backward pass.
        uncertain = surprise > 0.0
        safe = jnp.where(uncertain, surprise, 1.0)
        focused = jnp.where(uncertain, safe * (-jnp.expm1(-safe)) ** gamma, 0.0)
        return jnp.sum(targets * focused, axis=-1)

    return loss
