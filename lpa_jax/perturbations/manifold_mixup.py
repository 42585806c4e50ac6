"""Manifold Mixup: activations and targets of two examples interpolated with one coefficient."""

import jax
import jax.numpy as jnp

from lpa_jax import checks, tables
from lpa_jax.perturbations.base import (
    Perturbation,
    Site,
    identity,
    register,
    stateless,
)

Array = jax.Array


@register("manifold_mixup")
def manifold_mixup(alpha: float = 2.0) -> Perturbation:
    r"""Interpolates every example's activation and target with those of another one.

        h~_i = h_i + (1 - lambda) (h_pi(i) - h_i),
        t~_i = t_i + (1 - lambda) (t_pi(i) - t_i),    lambda ~ Beta(alpha, alpha),

    with one lambda for the batch and pi a uniformly random permutation of it. Gradients flow into
    both examples. On several devices each is a batch of its own: it draws its own lambda, and pi
    stays within it, so nothing is communicated. At the injection point `input` this is input Mixup.

    Args:
      alpha: Shape of the Beta distribution, >= 0: 1 is uniform, small values keep lambda near 0 or
        1. 0 is no perturbation, bitwise.

    Raises:
      ValueError: `alpha` out of range.

    Example:
      >>> manifold_mixup(alpha=2.0).name
      'manifold_mixup'

    References:
      Verma et al., ICML 2019 (arXiv 1806.05236), with alpha = 2 for CIFAR, the default. The
      published method also draws the layer at random in every step, and its code trains with the
      binary cross entropy of the softmax. At the input: Zhang et al.,
      ICLR 2018 (arXiv 1710.09412), with alpha = 1 for CIFAR and 0.2 in DomainBed.
    """
    checks.number("alpha", alpha)
    if checks.vanishes(alpha):
        return identity("manifold_mixup")

    def perturb(site):
        site.require_one_class("manifold_mixup", several=True)
        order_rng, share_rng = jax.random.split(site.rng)
        order = jax.random.permutation(order_rng, site.activation.shape[0])
        order = partners_that_count(order, site.labels)
        share = partner_share(share_rng, alpha)
        return (
            interpolate(site.activation, order, share),
            mixed_targets(site, order, share),
        )

    return stateless("manifold_mixup", perturb)


def interpolate(values: Array, partners: Array, shares: Array) -> Array:
    """Every example moved towards its partner by a share of the way.

    Args:
      values: [B, ...].
      partners: [B] integers, places in the batch.
      shares: Shares of the partner, [] or [B].
    """
    wide = tables.at_least_float32(values)
    shares = shares.astype(wide.dtype)
    shares = tables.over_classes(shares, wide) if shares.ndim else shares
    return (wide + shares * (wide[partners] - wide)).astype(values.dtype)


def partners_that_count(partners: Array, labels: Array) -> Array:
    """Partners [B] of the examples, themselves where the partner is one that does not count."""
    counted = tables.counted_rows(labels)[partners]
    return jnp.where(counted, partners, jnp.arange(partners.shape[0]))


def mixed_targets(site: Site, partners: Array, shares: Array) -> Array:
    """`interpolate` of targets; a class that is unknown (-1) in one of two examples stays so."""
    mixed = interpolate(site.targets, partners, shares)
    if not site.several:
        return mixed
    return jnp.where((site.targets < 0) | (site.targets[partners] < 0), -1.0, mixed)


def partner_share(rng: Array, alpha: float, shape: tuple[int, ...] = ()) -> Array:
    r"""Shares 1 - lambda of the partner, lambda ~ Beta(alpha, alpha), exact and without rejection.

        1 - lambda = (1 + T / sqrt(2 alpha + T^2)) / 2,
        T = sqrt(2 alpha (U^(-1/alpha) - 1)) cos(2 pi V),    U, V uniform in (0, 1)

    T follows Student's t with 2 alpha degrees of freedom (Bailey, Mathematics of Computation 62,
    1994). `jax.random.beta` rejects in a loop, which takes four times as long to compile.

    Args:
      rng: A key.
      alpha: Shape of the Beta distribution, > 0.
      shape: How many to draw.

    Example:
      >>> bool(0.0 < partner_share(jax.random.key(0), 1.0) < 1.0)
      True
    """
    radial, angular = jax.random.uniform(rng, (2, *shape))
    cosine = jnp.cos(2.0 * jnp.pi * angular)
    power = radial ** (1.0 / alpha)
    # 2 alpha / (2 alpha + T^2), which stays finite where U^(-1/alpha) overflows, and from it the
    # smaller of the two shares, free of cancellation near 0.
    tail = power / (power + (1.0 - power) * jnp.square(cosine))
    smaller = 0.5 * tail / (1.0 + jnp.sqrt(1.0 - tail))
    return jnp.where(cosine > 0, 1.0 - smaller, smaller)
