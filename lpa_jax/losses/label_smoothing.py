"""Label smoothing: targets that keep a share for every class."""

from lpa_jax import checks
from lpa_jax.losses.base import Loss, register
from lpa_jax.losses.common import prepare
from lpa_jax.losses.cross_entropy import cross_entropy


@register("label_smoothing", one_class=True)
def label_smoothing(smoothing: float = 0.1) -> Loss:
    """Cross entropy with targets mixed with the uniform distribution.

        t'_c = (1 - smoothing) t_c + smoothing / C,    loss(z, t) = cross_entropy(z, t')

    Args:
      smoothing: Share of the uniform distribution, in [0, 1). 0 is cross entropy.

    Raises:
      ValueError: If smoothing lies outside [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> loss = label_smoothing(0.5)
      >>> logits = jnp.log(jnp.array([[1.0, 3.0]]))
      >>> round(float(loss(logits, jnp.array([[1.0, 0.0]]))[0]), 4)  # 3/4 log 4 + 1/4 log 4/3
      1.1116

    References:
      Szegedy et al. 2016, Rethinking the Inception Architecture for Computer Vision, section 7.
    """
    checks.number("smoothing", smoothing, high=1.0, open_high=True)

    def loss(logits, targets):
        logits, targets = prepare(logits, targets)
        smoothed = (1.0 - smoothing) * targets + smoothing / logits.shape[-1]
        return cross_entropy(logits, smoothed)

    return loss
