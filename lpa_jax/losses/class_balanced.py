"""Class balance by the effective number of examples of a class."""

import math

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from lpa_jax import checks
from lpa_jax.losses.base import Loss, NamedLoss, register
from lpa_jax.losses.common import class_counts, per_class, prepare
from lpa_jax.losses.cross_entropy import cross_entropy
from lpa_jax.registry import described, shown


def effective_number_weights(counts: ArrayLike, beta: float = 0.9999) -> np.ndarray:
    """Class weights inversely proportional to the effective number of examples.

        E_c = (1 - beta^N_c) / (1 - beta),    w_c = C (1 / E_c) / sum_k (1 / E_k)

    Args:
      counts: Training examples N_c of each class [C].
      beta: In [0, 1). 0 weights all classes equally, towards 1 by inverse frequency.

    Returns:
      Weights [C], float64, that sum to C.

    Raises:
      ValueError: If counts are not 1-D, positive and finite, or beta lies outside [0, 1).

    Example:
      >>> effective_number_weights([1, 2], beta=0.5)  # E = (1, 1.5)
      array([1.2, 0.8])

    References:
      Cui et al. 2019, Class-Balanced Loss Based on Effective Number of Samples, arXiv 1901.05555,
      proposition 1 and the normalisation of section 4.
    """
    counts = class_counts(counts)
    checks.number("beta", beta, high=1.0, open_high=True)
    # expm1 keeps the digits that 1 - beta**N loses for beta near 1.
    inverse = 1.0 / -np.expm1(counts * (math.log(beta) if beta > 0.0 else -math.inf))
    return inverse * (counts.size / inverse.sum())


@register("class_balanced", one_class=True)
def class_balanced(counts: ArrayLike, beta: float = 0.9999, base: Loss = cross_entropy) -> Loss:
    """Any loss, weighted by the effective number of examples of the target's class.

        loss(z, t) = (sum_c t_c w_c) base(z, t),    w = effective_number_weights(counts, beta)

    A soft target takes its expected weight. The mean over a batch is left unnormalised: it divides
    by the number of examples, not by the sum of their weights as PyTorch's weighted loss does.

    Args:
      counts: Training examples N_c of each class [C].
      beta: In [0, 1), see `effective_number_weights`.
      base: The loss to weight, for example ``focal(2.0)`` or ``ldam(counts)``.

    Raises:
      ValueError: If counts are not 1-D, positive and finite, beta lies outside [0, 1) or base is
        not a function.

    Example:
      >>> from lpa_jax.losses import focal
      >>> loss = class_balanced([1, 2], beta=0.5, base=focal(0.0))  # weights (1.2, 0.8)
      >>> round(float(loss(jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]]))[0]), 4)  # 1.2 log 2
      0.8318

    References:
      Cui et al. 2019, arXiv 1901.05555, section 4.
    """
    weights = effective_number_weights(counts, beta)
    checks.require(callable(base), "base", "a loss(logits, targets)", base)
    loss = weighted(weights, base)
    options = {"counts": counts, "beta": beta, "base": base}
    loss.description = described("class_balanced", options)
    return loss


def weighted(weights: np.ndarray, base: Loss) -> Loss:
    """A loss times the expected weight of the target's class: (sum_c t_c w_c) base(z, t)."""

    def loss(logits, targets):
        logits, targets = prepare(logits, targets)
        return jnp.sum(targets * per_class(weights, logits), axis=-1) * base(logits, targets)

    return NamedLoss(loss, f"weighted({shown(weights)}, {base!r})", one_class=True)
