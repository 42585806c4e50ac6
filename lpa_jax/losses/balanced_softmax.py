"""Balanced softmax: each exponential weighted by the size of its class."""

import numpy as np
from numpy.typing import ArrayLike

from lpa_jax.losses.base import Loss, register
from lpa_jax.losses.common import class_counts
from lpa_jax.losses.cross_entropy import shifted


@register("balanced_softmax", one_class=True)
def balanced_softmax(counts: ArrayLike) -> Loss:
    """Balanced softmax: each exponential weighted by the size of its class.

        loss(z, t) = cross_entropy(z + log N, t)

    Since the softmax ignores a common shift, this is `logit_adjusted` at tau = 1.

    Args:
      counts: Training examples N_c of each class [C].

    Raises:
      ValueError: If counts are not 1-D, positive and finite.

    Example:
      >>> import jax.numpy as jnp
      >>> loss = balanced_softmax([3, 1])
      >>> round(float(loss(jnp.zeros((1, 2)), jnp.array([[0.0, 1.0]]))[0]), 4)  # log 4
      1.3863

    References:
      Ren et al. 2020, Balanced Meta-Softmax for Long-Tailed Visual Recognition, arXiv 2007.10740.
    """
    return shifted(np.log(class_counts(counts)))
