"""What several penalties share: statistics by domain or class, annealing and checks."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lpa_jax import checks, tables
from lpa_jax.penalties.base import Observed, Penalty

Array = jax.Array


def stateless(
    name: str,
    value: Callable[[Observed], Array],
    layers: tuple[str, ...] = (),
    sown: tuple[str, ...] = (),
) -> Penalty:
    """A penalty without state from a function observed -> scalar.

    Example:
      >>> stateless("energy", lambda observed: jnp.sum(observed.logits**2)).init({}, 10)
      ()
    """
    return Penalty(
        name,
        layers,
        init=lambda shapes, num_classes: (),
        apply=lambda state, observed: (value(observed), state),
        sown=sown,
    )


def zero(name: str) -> Penalty:
    """The penalty that adds exactly zero: what a method of zero strength returns.

    Example:
      >>> zero("coral").layers
      ()
    """
    return stateless(name, lambda observed: jnp.zeros((), jnp.float32))


def annealed(weight: float, anneal_steps: int, step: Array) -> Array:
    """1 in the first `anneal_steps` steps, `weight` from then on, as DomainBed has it.

    Example:
      >>> [float(annealed(100.0, 2, jnp.asarray(step))) for step in range(3)]
      [1.0, 1.0, 100.0]
    """
    return jnp.where(step >= anneal_steps, weight, 1.0)


def batch_mean(observed: Observed, values: Array) -> Array:
    """Mean of all entries of `values` [B, ...] over the examples of the global batch that count."""
    counted = tables.over_classes(tables.counted_rows(observed.labels), values)
    total = observed.global_sum(jnp.sum(jnp.where(counted, values, 0.0)))
    mean = total / observed.global_sum(jnp.asarray(values.size, values.dtype))
    return mean * tables.weight_of_counted(observed.labels, observed.axis_name).astype(mean.dtype)


class Risks(NamedTuple):
    """Mean loss of every domain in the global batch, 0 for absent ones, and who is present, [D]."""

    means: Array
    present: Array


def domain_risks(observed: Observed, num_domains: int, name: str) -> Risks:
    """The risks l_d that penalty `name` asks for; raises as `domains` does."""
    domain = domains(observed, num_domains, name)
    counts = tables.class_counts(domain, num_domains, observed.axis_name)
    means = tables.class_means(observed.losses, domain, counts, observed.axis_name)
    return Risks(means * nan_outside(observed, num_domains), counts > 0)


def mean_where(condition: Array, values: Array) -> Array:
    """Mean of the `values` [D] for which the condition holds, 0 if it holds for none."""
    chosen = jnp.sum(jnp.where(condition, values, 0.0))
    return chosen / jnp.maximum(jnp.sum(condition), 1).astype(chosen.dtype)


def scatter_matrices(
    centred: Array, groups: Array, num_groups: int, axis_name: str | None = None
) -> Array:
    """Sums of outer products of rows [B, F] by group over the global batch -> [G, F, F].

    One matrix product with the rows spread over their groups: the B outer products themselves
    would be larger than the result. In full precision, since accelerators round its factors.
    """
    members = jax.nn.one_hot(groups, num_groups, dtype=centred.dtype)
    spread = members[:, :, None] * centred[:, None, :]
    sums = jnp.einsum("bgf,bh->gfh", spread, centred, precision=jax.lax.Precision.HIGHEST)
    return sums if axis_name is None else jax.lax.psum(sums, axis_name)


def domains(observed: Observed, num_domains: int, name: str) -> Array:
    """Each example's domain, [B].

    Raises:
      ValueError: The batch has no `domain`, or (outside jit) one outside 0..num_domains-1.
    """
    domain = observed.domain
    if domain is None:
        raise ValueError(
            f"batch['domain'] must be each example's domain in 0..{num_domains - 1} for the "
            f"penalty {name!r}, got None"
        )
    checks.require(jnp.ndim(domain) == 1, "batch['domain']", "one number an example, [B]", domain)
    checks.check_labels(domain, num_domains, "batch['domain']")
    return jnp.where(tables.counted_rows(observed.labels), domain, -1)


def nan_outside(observed: Observed, num_domains: int) -> Array:
    """1, or NaN where an example that counts has a domain out of range, which jit cannot refuse.

    The same on every device, as the penalty is, so that `shard_map` may take it for replicated.
    """
    unknown = (observed.domain < 0) | (observed.domain >= num_domains)
    counted = tables.counted_rows(observed.labels)
    outside = observed.global_sum(jnp.sum(unknown & counted))
    return jnp.where(outside > 0, jnp.nan, 1.0).astype(observed.losses.dtype)


def check_vectors(name: str, layer: str, shape: jax.ShapeDtypeStruct) -> None:
    """Raises ValueError unless the activations at `layer` are vectors, [B, F]."""
    if len(shape.shape) != 2:
        raise ValueError(
            f"layer {layer!r} must be vectors [B, F] for the penalty {name!r}, "
            f"got shape {tuple(shape.shape)}"
        )
