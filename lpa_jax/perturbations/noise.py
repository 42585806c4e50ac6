"""Gaussian noise on the activation, in units of the activation's own root mean square."""

import jax
import jax.numpy as jnp

from lpa_jax import checks, tables
from lpa_jax.perturbations.base import Perturbation, identity, register, stateless


@register("gaussian_noise")
def gaussian_noise(sigma: float = 0.1) -> Perturbation:
    r"""Isotropic Gaussian noise, relative to the size of the activation.

        h~_i = h_i + sigma * rms(h) * n_i,    n_i ~ N(0, I),
        rms(h) = sqrt(mean of h^2 over all entries of the global batch)

    rms(h) is a constant of the step: no gradient flows through it. Relative noise has the same
    meaning at every layer, and a network cannot escape it by scaling its activation up.

    Args:
      sigma: Standard deviation of the noise in units of rms(h), >= 0. 0 is no perturbation,
        bitwise.

    Raises:
      ValueError: `sigma` out of range.

    Example:
      >>> gaussian_noise(0.1).name
      'gaussian_noise'

    References:
      Bishop, Neural Computation 7 (1995), noise at the input; relative scale chosen here.
    """
    checks.number("sigma", sigma)
    if checks.vanishes(sigma):
        return identity("gaussian_noise")

    def perturb(site):
        h = tables.at_least_float32(site.activation)
        squares = jnp.square(jax.lax.stop_gradient(h))
        # First the mean within an example, so that examples, not entries, are averaged globally.
        rms = jnp.sqrt(site.global_mean(jnp.mean(squares, axis=tuple(range(1, h.ndim)))))
        return h + sigma * rms * jax.random.normal(site.rng, h.shape, h.dtype), site.targets

    return stateless("gaussian_noise", perturb)
