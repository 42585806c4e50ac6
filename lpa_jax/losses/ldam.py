"""LDAM, margins that grow with the rarity of a class, and its deferred re-weighting (DRW)."""

import numpy as np
from numpy.typing import ArrayLike

from lpa_jax import checks
from lpa_jax.losses.base import Loss, register
from lpa_jax.losses.class_balanced import effective_number_weights, weighted
from lpa_jax.losses.common import class_counts, per_class, prepare
from lpa_jax.losses.cross_entropy import cross_entropy


@register("ldam", one_class=True)
def ldam(counts: ArrayLike, max_margin: float = 0.5, scale: float = 30.0) -> Loss:
    """Label-distribution-aware margin loss: rare classes must win by a larger margin.

        Delta_c = max_margin (min_k N_k / N_c)^(1/4)
        loss(z, t) = cross_entropy(scale (z - t * Delta), t)

    The published loss has one true class y and subtracts Delta_y from its logit. Soft targets are
    our generalisation: every class gives up its own margin in proportion to its share of the
    target, t_c Delta_c. The published scale of 30 belongs to a classifier with normalised features
    and weights, whose logits lie in [-1, 1]; for an ordinary linear output layer 1 is natural.

    Args:
      counts: Training examples N_c of each class [C].
      max_margin: Margin of the rarest class, at least 0, in units of the logits.
      scale: Inverse temperature, positive.

    Raises:
      ValueError: If counts are not 1-D, positive and finite, max_margin is negative or scale is
        not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> loss = ldam([16, 1], max_margin=0.5, scale=2.0)  # margins (1/4, 1/2)
      >>> logits = jnp.array([[0.0, 0.5]])
      >>> round(float(loss(logits, jnp.array([[0.0, 1.0]]))[0]), 4)  # no lead left: log 2
      0.6931

    References:
      Cao et al. 2019, Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss,
      arXiv 1906.07413, equations 12 and 13; the scale is the released code's.
    """
    counts = class_counts(counts)
    checks.number("max_margin", max_margin)
    checks.number("scale", scale, open_low=True)
    margins = max_margin * (counts.min() / counts) ** 0.25

    def loss(logits, targets):
        logits, targets = prepare(logits, targets)
        return cross_entropy(scale * (logits - targets * per_class(margins, logits)), targets)

    return loss


def drw_stages(
    counts: ArrayLike,
    switch_epoch: int,
    *,
    max_margin: float = 0.5,
    scale: float = 30.0,
    beta: float = 0.9999,
) -> tuple[tuple[int, Loss], tuple[int, Loss]]:
    """Deferred re-weighting (DRW): LDAM first, LDAM with class weights from `switch_epoch` on.

        loss(z, t) = (sum_c t_c w_c) ldam(z, t) / w_mean    from `switch_epoch` on
        w = effective_number_weights(counts, beta),    w_mean = sum_c N_c w_c / sum_c N_c

    The released code divides the sum over a batch by the batch's sum of weights, as PyTorch's
    weighted cross entropy does, so that the steps keep their size at the switch; `class_balanced`
    divides by the number of examples, and frequent classes, whose weights are small, would make the
    steps shrink with it. Here w_mean, the mean weight of a training example, replaces that of the
    batch: it is the same for every batch, so that the loss of an example does not depend on
    which others share its batch, device or accumulation step. Where batches are drawn from other
    priors than `counts`, such as balanced ones, it is not their mean.

    Args:
      counts: Training examples N_c of each class [C].
      switch_epoch: First epoch (from 0) with weights, at least 1. The paper takes 160 of 200.
      max_margin: See `ldam`.
      scale: See `ldam`.
      beta: See `effective_number_weights`.

    Returns:
      Pairs (first epoch, loss), in order: the last pair whose epoch has come is in force.

    Raises:
      ValueError: If switch_epoch is not an integer of at least 1, or where `ldam` or
        `effective_number_weights` raises.

    Example:
      >>> (start, plain), (switch, weighted) = drw_stages([16, 1], switch_epoch=160)
      >>> start, switch
      (0, 160)

    References:
      Cao et al. 2019, arXiv 1906.07413, algorithm 1, with the weights of the released
      code (https://github.com/kaidic/LDAM-DRW).
    """
    checks.integer("switch_epoch", switch_epoch, 1)
    margin_loss = ldam(counts, max_margin, scale)
    weights = effective_number_weights(counts, beta)
    mean_weight = np.average(weights, weights=class_counts(counts))
    return (0, margin_loss), (switch_epoch, weighted(weights / mean_weight, margin_loss))
