r"""The radius that keeps the loss change of a sign group near a target: `radius_target` of `lpa`.

The same radius has different effects at different layers, models, stages of training and
augmentations. The loss change that it causes is comparable between them. In every step, for each
sign group g,

    change_g = mean over the group's classes in the batch of  s_c (J_c(delta_c) - J_c(0)),
    wanted_+ = target,     wanted_- = min(negative_scale * target, J_- / 2),
    log scale_g  <-  log scale_g + RATE * clip( log(wanted_g / change_g), -1, 1 ),

with J_- the mean of J_c(0) over the negative classes, because no perturbation lowers a loss below
zero. The radius of the next step is multiplied by scale_g, within [1/BOUND, BOUND]. The clipped
term is 1 if change_g <= 0 and -1 if it is not finite; a group without a class in the batch keeps
its scale. A radius that is ten times too small or too large is within 10% of the right one after
about 75 steps.

All of this is a choice of this library; the papers tune a fixed radius.
"""

import jax
import jax.numpy as jnp

from lpa_jax.perturbations.base import Site
from lpa_jax.tables import BatchClasses, at_least_float32

RATE = 0.05
BOUND = 100.0
# The two sign groups, in the order of all pairs in this module.
GROUP_SIGNS = (1.0, -1.0)

Array = jax.Array


def initial_scale() -> Array:
    """The factors on the radius of positive and negative classes before the first step, [2]."""
    return jnp.ones(2, jnp.float32)


def by_class(scale: Array, sign: Array) -> Array:
    """The factor of each class, [2] and signs [C] -> [C]."""
    return jnp.where(sign < 0, scale[1], scale[0])


def sign_group_means(values: Array, classes: BatchClasses, sign: Array) -> tuple[Array, Array]:
    """Means over the classes of each sign group of the class means, over the global batch.

    Every class counts the same, whatever its share of the batch.

    Args:
      values: [B].
      classes: The classes of the global batch.
      sign: s_c in {-1, 0, +1}, [C].

    Returns:
      Means [2], 0 for a group without a class in the batch, and whether it has one, [2].

    Example:
      >>> classes = BatchClasses.of(jnp.array([0, 0, 1, 2]), num_classes=4)
      >>> signs = jnp.array([1.0, 1.0, 0.0, -1.0])  # class 2 has no sign, class 3 no member
      >>> means, exists = sign_group_means(jnp.array([1.0, 3.0, 8.0, 5.0]), classes, signs)
      >>> means.tolist(), exists.tolist()
      ([5.0, 0.0], [True, False])
    """
    class_means = classes.means(at_least_float32(values))
    of_group = sign[None, :] == jnp.asarray(GROUP_SIGNS)[:, None]
    member = of_group & (classes.counts > 0)[None, :]
    sizes = jnp.sum(member, axis=1)
    totals = jnp.sum(jnp.where(member, class_means[None, :], 0.0), axis=1)
    return totals / jnp.maximum(sizes, 1), sizes > 0


def measured_change(
    before: Array, after: Array, classes: BatchClasses, sign: Array
) -> tuple[Array, Array]:
    """change_g of the module docstring, and whether the group has a class in the batch, both [2].

    Args:
      before: Loss of every example without the perturbation, [B].
      after: With it, [B].
      classes: The classes of the global batch.
      sign: s_c, [C].
    """
    means, exists = sign_group_means(after - before, classes, sign)
    return jnp.asarray(GROUP_SIGNS) * means, exists


def next_scale(scale: Array, change: Array, wanted: Array, exists: Array) -> Array:
    """One update of the factors, equation in the module docstring; all arguments [2].

    Example:
      >>> ones, exists = jnp.ones(2), jnp.array([True, False])
      >>> next_scale(ones, change=ones, wanted=10 * ones, exists=exists).round(3).tolist()
      [1.0509999990463257, 1.0]
    """
    seen = jnp.where(change > 0, change, 1.0)
    growth = jnp.where(change > 0, jnp.clip(jnp.log(wanted / seen), -1.0, 1.0), 1.0)
    growth = jnp.where(jnp.isfinite(change), growth, -1.0)
    adapted = jnp.clip(scale * jnp.exp(RATE * growth), 1.0 / BOUND, BOUND)
    return jnp.where(exists & (wanted > 0), adapted, scale).astype(scale.dtype)


def adapt(
    scale: Array,
    site: Site,
    classes: BatchClasses,
    sign: Array,
    *,
    unperturbed: Array,
    perturbed: Array,
    target: float,
    negative_scale: float,
) -> Array:
    """The factors for the next step, equal on every device, from this step's loss change.

    Args:
      scale: The factors of this step, [2].
      site: What the perturbation sees.
      classes: The classes of the global batch.
      sign: s_c, [C].
      unperturbed: Logits without the perturbation, [B, C].
      perturbed: h~_i, [B, *S]. If nothing above is perturbed, its logits cost nothing: they are
        those of the training pass, which XLA computes once.
      target: Target of the positive classes, in nats.
      negative_scale: Factor on the target of the negative ones.
    """
    targets = jax.lax.stop_gradient(site.targets)
    before = site.loss(jax.lax.stop_gradient(unperturbed), targets)
    after, _ = site.losses_and_logits(jax.lax.stop_gradient(perturbed))
    change, exists = measured_change(before, after, classes, sign)
    loss, _ = sign_group_means(before, classes, sign)
    wanted = jnp.stack([jnp.asarray(target), jnp.minimum(negative_scale * target, loss[1] / 2)])
    return next_scale(scale, change, wanted, exists)
