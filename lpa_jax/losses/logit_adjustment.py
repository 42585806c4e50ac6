"""Logit adjustment: class priors added to the logits in training, or subtracted after it."""

import jax
import jax.numpy as jnp
from numpy.typing import ArrayLike

from lpa_jax.losses.base import Loss, register
from lpa_jax.losses.common import log_prior, per_class
from lpa_jax.losses.cross_entropy import shifted
from lpa_jax.tables import at_least_float32


@register("logit_adjusted", one_class=True)
def logit_adjusted(counts: ArrayLike, tau: float = 1.0) -> Loss:
    """Logit-adjusted cross entropy: class priors are added to the logits while training.

        loss(z, t) = cross_entropy(z + tau log pi, t),    pi_c = N_c / sum_k N_k

    Predictions are taken from z, unadjusted.

    Args:
      counts: Training examples N_c of each class [C].
      tau: Strength, at least 0. 1 is Fisher-consistent for the balanced error, 0 is cross entropy.

    Raises:
      ValueError: If counts are not 1-D, positive and finite, or tau is negative or not finite.

    Example:
      >>> loss = logit_adjusted([3, 1])
      >>> round(float(loss(jnp.zeros((1, 2)), jnp.array([[0.0, 1.0]]))[0]), 4)  # log 4
      1.3863

    References:
      Menon et al. 2021, Long-tail learning via logit adjustment, arXiv 2007.07314, equation 10.
    """
    return shifted(log_prior(counts, tau))


def adjust_logits(logits: jax.Array, counts: ArrayLike, tau: float = 1.0) -> jax.Array:
    """Post-hoc logit adjustment of a network that was trained with plain cross entropy.

        z' = z - tau log pi,    pi_c = N_c / sum_k N_k

    The sign is opposite to `logit_adjusted`, which adds the prior in training: use one only.

    Args:
      logits: Scores [..., C].
      counts: Training examples N_c of each class [C].
      tau: Strength, at least 0.

    Returns:
      Adjusted logits [..., C], at least float32.

    Raises:
      ValueError: If counts are not [C], positive and finite, or tau is negative or not finite.

    Example:
      >>> int(adjust_logits(jnp.array([0.5, 0.0]), [3, 1]).argmax())
      1

    References:
      Menon et al. 2021, arXiv 2007.07314, equation 9.
    """
    logits = at_least_float32(jnp.asarray(logits))
    return logits - per_class(log_prior(counts, tau), logits)
