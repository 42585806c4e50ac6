"""Adversarial feature perturbation: one perturbation per example, found by gradient ascent."""

import jax
import jax.numpy as jnp

from lpa_jax import pgd, tables
from lpa_jax.checks import choice, number, vanishes
from lpa_jax.perturbations.base import Perturbation, identity, register, stateless
from lpa_jax.perturbations.class_level import SCALES


@register("adversarial")
def adversarial(
    radius: float = 0.03,
    steps: int = 1,
    *,
    step_size: float = 1.5,
    norm: str = "l2",
    scale: str = "relative",
) -> Perturbation:
    r"""Raises the loss of every example within a ball: LPA with one delta per example, no sign.

        delta_i <- Proj_{||delta|| <= eps}( delta_i + eta g_i / ||g_i|| ),    from zero,
        g_i = grad of loss(decode(h_i + delta_i), t_i),    eta = step_size eps / steps,
        eps = radius * scale.

    With `norm="linf"` the step is eta sign(g_i) and the ball a box. No gradient of the training
    loss flows through delta. At the injection point `input` this is adversarial training.

    Args:
      radius: eps before scaling, >= 0. 0 is no perturbation, bitwise. The default is that of `lpa`,
        so that both compare at the same radius.
      steps: PGD steps, each one forward and one backward pass above the injection point. 0 is no
        perturbation, bitwise.
      step_size: Path length of all steps together, in radii.
      norm: `"l2"` or `"linf"`.
      scale: `"relative"` multiplies the radius by the global batch mean of ||h_i||, in the chosen
        norm; `"absolute"` by 1.

    Raises:
      ValueError: An option out of range.

    Example:
      >>> adversarial(radius=0.05, steps=3).name
      'adversarial'

    References:
      Madry et al., ICLR 2018 (arXiv 1706.06083), at the input. It starts at random; this starts
      at zero, so that it differs from LPA only in the level and the sign.
    """
    number("radius", radius)
    choice("scale", scale, SCALES)
    options = pgd.PGDOptions(steps, step_size, "free", norm, "full").validate()
    if vanishes(radius) or steps == 0:
        return identity("adversarial")

    def perturb(site):
        h = jax.lax.stop_gradient(site.activation)
        wide = tables.at_least_float32(h)
        eps = jnp.asarray(radius, wide.dtype)
        if scale == "relative":
            eps = eps * site.global_mean(tables.row_norms(wide, norm))

        def gradient_fn(delta):
            # Gradients of the sum: where examples do not interact above the injection point, those
            # are the gradients of each example's own loss.
            perturbed = h if delta is None else (wide + delta).astype(h.dtype)
            gradient = jax.grad(lambda h: jnp.sum(site.losses_and_logits(h)[0]))(perturbed)
            return gradient.astype(wide.dtype)

        # An example is a class of its own, raised (sign +1), without a half-space.
        rows = jnp.ones(h.shape[0], wide.dtype)
        delta = pgd.ascend(gradient_fn, rows, eps * rows, None, options)
        activation = site.activation.astype(wide.dtype) + jax.lax.stop_gradient(delta)
        return activation, site.targets

    return stateless("adversarial", perturb)
