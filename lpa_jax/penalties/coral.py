"""CORAL: features whose mean and covariance agree between domains."""

import jax
import jax.numpy as jnp

from lpa_jax import checks, tables
from lpa_jax.penalties.base import Penalty, register
from lpa_jax.penalties.common import (
    check_vectors,
    domains,
    nan_outside,
    scatter_matrices,
    stateless,
    zero,
)

Array = jax.Array


@register("coral")
def coral(num_domains: int, layer: str, weight: float = 1.0) -> Penalty:
    r"""Mean squared differences of the features' means and covariances over all pairs of domains.

        penalty = weight mean_{d < e} ( ||mu_d - mu_e||^2 / F + ||S_d - S_e||_F^2 / F^2 ),

    with mu_d [F] and S_d [F, F] the mean and the unbiased covariance of domain d's features over
    the global batch. A domain takes part with at least two examples, below which it has no such
    covariance; with fewer than two such domains the penalty is zero.

    It costs D * B * F^2 multiplications and D * F^2 numbers of memory.

    Args:
      num_domains: D (of one there is nothing to compare, the penalty is 0).
        The batch names each example's domain under `domain`.
      layer: The layer of the features, vectors [B, F]: the last hidden one in the publication.
      weight: DomainBed's mmd_gamma, >= 0. 0 is no penalty.

    Raises:
      ValueError: An option out of range; from `init`, features that are not vectors; from `apply`,
        no `domain` in the batch or (outside jit) one outside 0..D-1.

    Example:
      >>> coral(num_domains=3, layer="pool").layers
      ('pool',)

    References:
      Sun and Saenko, ECCV 2016 workshops (arXiv 1607.01719), between all pairs of domains and
      with the means, normalised as in DomainBed.
    """
    checks.integer("num_domains", num_domains, 1)
    checks.number("weight", weight)
    if checks.vanishes(weight):
        return zero("coral")

    def init(shapes, num_classes):
        check_vectors("coral", layer, shapes[layer])
        return ()

    def value(observed):
        domain = domains(observed, num_domains, "coral")
        features = observed.features[layer]
        features = tables.at_least_float32(features)
        counts = tables.class_counts(domain, num_domains, observed.axis_name)
        means = tables.class_means(features, domain, counts, observed.axis_name)
        scatter = scatter_matrices(
            features - means[domain], domain, num_domains, observed.axis_name
        )
        degrees = jnp.maximum(counts - 1.0, 1.0).astype(scatter.dtype)
        covariances = scatter / tables.over_classes(degrees, scatter)
        takes_part = counts > 1
        differences = _mean_pair_difference(means, takes_part)
        weighted = weight * nan_outside(observed, num_domains)
        return weighted * (differences + _mean_pair_difference(covariances, takes_part))

    return stateless("coral", value, (layer,))._replace(init=init)


def _mean_pair_difference(table: Array, takes_part: Array) -> Array:
    """Mean over pairs d < e of the mean square of table_d - table_e, [D, ...] -> scalar.

    Over n rows, sum_{d < e} ||t_d - t_e||^2 = n sum_d ||t_d - mean||^2: no loop over the pairs.
    """
    rows = tables.over_classes(takes_part, table)
    n = jnp.sum(takes_part).astype(table.dtype)
    mean = jnp.sum(jnp.where(rows, table, 0.0), axis=0, keepdims=True) / jnp.maximum(n, 1.0)
    spread = jnp.sum(jnp.where(rows, table - mean, 0.0) ** 2) / table[0].size
    return jnp.where(n > 1, 2.0 / jnp.maximum(n - 1.0, 1.0), 0.0) * spread
