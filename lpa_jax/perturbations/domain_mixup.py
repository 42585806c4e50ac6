"""Mixup of the examples of one domain with those of another."""

import jax
import jax.numpy as jnp

from lpa_jax import checks
from lpa_jax.perturbations.base import Perturbation, identity, stateless
from lpa_jax.perturbations.manifold_mixup import (
    interpolate,
    mixed_targets,
    partner_share,
    partners_that_count,
)
from lpa_jax.registry import described


def domain_mixup(alpha: float = 0.2, *, num_domains: int) -> Perturbation:
    r"""Interpolates the examples and targets of every domain with those of the next one.

        h~_i = h_i + (1 - lambda_d) (h_pi(i) - h_i),
        t~_i = t_i + (1 - lambda_d) (t_pi(i) - t_i),    lambda_d ~ Beta(alpha, alpha), d = d_i,

    where pi(i) has the rank among the examples of its domain that i has among those of d, and its
    domain follows d in a random order of the domains, the first of which follows the last. Domains
    are read from `batch["domain"]`, equally many examples of each (`data.domain_batches`). On
    several devices each is a batch of its own. One domain alone is left as it is.

    Args:
      alpha: Shape of the Beta distribution, >= 0. 0 is no perturbation, bitwise.
      num_domains: D, of which `batch["domain"]` names 0..D-1.

    Raises:
      ValueError: An option out of range, or (when the step is compiled) a batch that names no
        domains or whose size on a device is no multiple of D.

    Example:
      >>> domain_mixup(num_domains=3).name
      'domain_mixup'

    References:
      Mixup of DomainBed (Gulrajani and Lopez-Paz, ICLR 2021), which mixes images this way,
      with alpha = 0.2; after Zhang et al., ICLR 2018 (arXiv 1710.09412).
    """
    checks.number("alpha", alpha)
    checks.integer("num_domains", num_domains, 1)
    if checks.vanishes(alpha):
        return identity("domain_mixup")

    def perturb(site):
        site.require_one_class("domain_mixup", several=True)
        if site.domain is None:
            raise ValueError(
                "domain_mixup needs batch['domain'], which names each example's domain"
            )
        size = site.activation.shape[0]
        if size % num_domains:
            raise ValueError(
                f"domain_mixup needs equally many examples of {num_domains} domains on a device, "
                f"got {size} examples"
            )
        order_rng, share_rng = jax.random.split(site.rng)
        cycle = jax.random.permutation(order_rng, num_domains)
        following = jnp.zeros_like(cycle).at[cycle].set(jnp.roll(cycle, -1))
        members = jnp.argsort(site.domain, stable=True).reshape(num_domains, -1)
        partners = jnp.zeros(size, members.dtype).at[members].set(members[following])
        partners = partners_that_count(partners, site.labels)
        shares = partner_share(share_rng, alpha, (num_domains,))[site.domain]
        return (
            interpolate(site.activation, partners, shares),
            mixed_targets(site, partners, shares),
        )

    options = {"alpha": alpha, "num_domains": num_domains}
    description = described("domain_mixup", options)
    return stateless("domain_mixup", perturb)._replace(description=description)
