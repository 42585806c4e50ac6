"""Cross entropy on soft targets, and with a constant of each class added to the logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lpa_jax.losses.base import Loss, NamedLoss, register
from lpa_jax.losses.common import per_class, prepare


@functools.partial(NamedLoss, description="cross_entropy", one_class=True)
def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross entropy between soft targets and the softmax of the logits.

        loss(z, t) = -sum_c t_c log softmax(z)_c

    Args:
      logits: Scores [..., C] of any floating dtype.
      targets: Class probabilities [..., C].

    Returns:
      One loss per example [...], in nats, at least float32.

    Raises:
      ValueError: If the shapes of logits and targets differ.

    Example:
      >>> logits = jnp.log(jnp.array([[1.0, 3.0]]))  # softmax (1/4, 3/4)
      >>> round(float(cross_entropy(logits, jnp.array([[1.0, 0.0]]))[0]), 4)  # log 4
      1.3863
    """
    logits, targets = prepare(logits, targets)
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)


register("cross_entropy")(lambda: cross_entropy)


def shifted(shift: np.ndarray) -> Loss:
    """Cross entropy of the logits plus a constant of each class, `shift` [C]."""

    def loss(logits, targets):
        logits, targets = prepare(logits, targets)
        return cross_entropy(logits + per_class(shift, logits), targets)

    return loss
