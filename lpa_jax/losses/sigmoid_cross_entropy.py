"""Binary cross entropy of every class: for examples that have several classes, or none."""

import jax
import jax.numpy as jnp

from lpa_jax.losses.base import Loss, register
from lpa_jax.losses.common import prepare


@register("sigmoid_cross_entropy")
def sigmoid_cross_entropy() -> Loss:
    """Sum over the classes of the binary cross entropy with the sigmoid of the logit.

        loss(z, t) = sum_c [ log(1 + exp(z_c)) - t_c z_c ] over the classes with t_c >= 0

    A target of -1 is a class that is not known to be absent or present, and has no loss. With one
    class an example it trains C classifiers of one class against the rest.

    Example:
      >>> loss = sigmoid_cross_entropy()
      >>> logits, targets = jnp.zeros((1, 3)), jnp.array([[1.0, 0.0, -1.0]])
      >>> round(float(loss(logits, targets)[0]), 4)  # 2 log 2
      1.3863
    """

    def loss(logits, targets):
        logits, targets = prepare(logits, targets)
        losses = jax.nn.softplus(logits) - targets * logits
        return jnp.sum(jnp.where(targets < 0, 0.0, losses), axis=-1)

    return loss
