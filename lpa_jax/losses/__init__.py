"""Losses on soft targets for balanced and long-tailed classification.

A loss maps logits [..., C] and targets [..., C] (class probabilities) to one value per example
[...], in nats. `cross_entropy` is one; the others are factories that check their arguments on the
host and return one. A returned loss closes over NumPy constants and can be a static argument of
`jax.jit`: build it once, since every call of a factory returns a new function, hence a new
compilation.

Every loss computes in at least float32, whatever the dtype of the logits, has finite gradients
for large finite logits. All but `sigmoid_cross_entropy`, the one for several classes an example,
ignore a shift common to all classes, as the softmax does.
"""

from lpa_jax.losses.balanced_softmax import balanced_softmax
from lpa_jax.losses.base import Loss, create, names, option_types, options, register
from lpa_jax.losses.class_balanced import class_balanced, effective_number_weights
from lpa_jax.losses.cross_entropy import cross_entropy
from lpa_jax.losses.focal import focal
from lpa_jax.losses.label_smoothing import label_smoothing
from lpa_jax.losses.ldam import drw_stages, ldam
from lpa_jax.losses.logit_adjustment import adjust_logits, logit_adjusted
from lpa_jax.losses.sigmoid_cross_entropy import sigmoid_cross_entropy

__all__ = [
    "Loss", "adjust_logits", "balanced_softmax", "class_balanced", "create", "cross_entropy",
    "drw_stages", "effective_number_weights", "focal", "label_smoothing", "ldam",
    "logit_adjusted", "names", "option_types", "options", "register", "sigmoid_cross_entropy",
]  # fmt: skip
