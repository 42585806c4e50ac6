"""MixStyle: the channel statistics of two examples interpolated, their contents left alone."""

import jax
import jax.numpy as jnp

from lpa_jax import checks, tables
from lpa_jax.perturbations.base import (
    Perturbation,
    identity,
    register,
    stateless,
)
from lpa_jax.perturbations.manifold_mixup import partner_share, partners_that_count

VARIANCE_FLOOR = 1e-6


@register("mixstyle")
def mixstyle(alpha: float = 0.1, probability: float = 0.5) -> Perturbation:
    r"""Restyles every example with a mixture of its own and another example's statistics.

        h~_i = sigma'_i (h_i - mu_i) / sigma_i + mu'_i,
        mu'_i    = lambda_i mu_i    + (1 - lambda_i) mu_pi(i),
        sigma'_i = lambda_i sigma_i + (1 - lambda_i) sigma_pi(i),    lambda_i ~ Beta(alpha, alpha),

    where mu_i and sigma_i are mean and standard deviation of each channel (last axis) over the
    positions of h_i: constants, no gradient flows through them. pi is a random permutation of the
    device's batch. A batch is restyled as a whole with the given probability, else left alone.

    Args:
      alpha: Shape of the Beta distribution, >= 0. 0 is no perturbation, bitwise.
      probability: Chance that a batch is restyled, in [0, 1]. 0 is no perturbation, bitwise.

    Raises:
      ValueError: `alpha` or `probability` out of range, or (from `init`) an activation without
        positions, [B, channels].

    Example:
      >>> mixstyle().init(jax.ShapeDtypeStruct((32, 64), jnp.float32), 10)
      Traceback (most recent call last):
          ...
      ValueError: mixstyle needs an activation [B, positions..., channels], got shape (32, 64)

    References:
      Zhou et al., ICLR 2021 (arXiv 2104.02008), with pi over all domains. Its code divides
      variances by n - 1, this by n.
    """
    checks.number("alpha", alpha)
    checks.number("probability", probability, 0.0, 1.0)
    if checks.vanishes(alpha) or checks.vanishes(probability):
        return identity("mixstyle")

    def perturb(site):
        chance_rng, order_rng, share_rng = jax.random.split(site.rng, 3)
        h = tables.at_least_float32(site.activation)
        order = jax.random.permutation(order_rng, h.shape[0])
        order = partners_that_count(order, site.labels)
        share = partner_share(share_rng, alpha, h.shape[:1]).astype(h.dtype)
        mean, deviation = _style(jax.lax.stop_gradient(h))

        def mix(statistic):
            return statistic + tables.over_classes(share, h) * (statistic[order] - statistic)

        styled = (h - mean) / deviation * mix(deviation) + mix(mean)
        restyle = jax.random.bernoulli(chance_rng, probability)
        return jnp.where(restyle, styled, h), site.targets

    return stateless("mixstyle", perturb)._replace(init=_init)


def _init(activation: jax.ShapeDtypeStruct, num_classes: int) -> tuple[()]:
    if len(activation.shape) < 3:
        raise ValueError(
            "mixstyle needs an activation [B, positions..., channels], "
            f"got shape {tuple(activation.shape)}"
        )
    return ()


def _style(h: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation over positions, [B, 1, ..., 1, channels]."""
    positions = tuple(range(1, h.ndim - 1))
    variance = jnp.var(h, axis=positions, keepdims=True)
    return jnp.mean(h, axis=positions, keepdims=True), jnp.sqrt(variance + VARIANCE_FLOOR)
