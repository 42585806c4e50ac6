"""IRM: one classifier, reduced to a scale on the logits, that is optimal in every domain."""

import jax
import jax.numpy as jnp

from lpa_jax import checks, tables
from lpa_jax.penalties.base import Observed, Penalty, register
from lpa_jax.penalties.common import annealed, domains, mean_where, nan_outside, stateless, zero

Array = jax.Array


@register("irm")
def irm(num_domains: int, weight: float = 100.0, anneal_steps: int = 500) -> Penalty:
    r"""IRMv1: squared gradient of each domain's risk with respect to a scale w = 1 on the logits.

        g_d     = d/dw mean_{i in d} loss(w z_i, t_i) at w = 1,
        penalty = lambda mean_d g_d^2,    lambda = weight from step `anneal_steps` on, 1 before.

    The square is estimated without bias, as in DomainBed, by the product of the gradients over two
    halves of the domain: its examples at even and at odd places in the global batch. So the penalty
    of a batch can be negative. The mean is over domains with at least two examples in the batch,
    one for each half; the others contribute nothing.

    Args:
      num_domains: D (of one it is that domain's penalty alone).
        The batch names each example's domain under `domain`.
      weight: lambda after annealing, >= 0. 0 is no penalty, before annealing either.
      anneal_steps: Steps with lambda = 1, >= 0. DomainBed also resets Adam's moments at the end of
        them, since the objective jumps; the step does not. To do so, call
        `state.replace(opt_state=state.optimizer.init(state.params))` before step `anneal_steps`.

    Raises:
      ValueError: An option out of range; from `apply`, no `domain` in the batch or (outside jit)
        one outside 0..D-1.

    Example:
      >>> irm(num_domains=3).name
      'irm'

    References:
      Arjovsky et al. 2019 (arXiv 1907.02893), equation IRMv1; the two halves, the weight and
      annealing as in DomainBed.
    """
    checks.integer("num_domains", num_domains, 1)
    checks.number("weight", weight)
    checks.integer("anneal_steps", anneal_steps, 0)
    if checks.vanishes(weight):
        return zero("irm")

    def value(observed):
        domain = domains(observed, num_domains, "irm")
        half = 2 * domain + _places(domain, num_domains, observed.axis_name) % 2
        counts = tables.class_counts(half, 2 * num_domains, observed.axis_name)
        slopes = tables.class_means(_slopes(observed), half, counts, observed.axis_name)
        squares = jnp.prod(jnp.reshape(slopes, (num_domains, 2)), axis=1)
        both = jnp.all(jnp.reshape(counts, (num_domains, 2)) > 0, axis=1)
        squares = squares * nan_outside(observed, num_domains)
        return annealed(weight, anneal_steps, observed.step) * mean_where(both, squares)

    return stateless("irm", value)


def _slopes(observed: Observed) -> Array:
    """D loss(w z_i, t_i) / dw at w = 1 for every example, [B]."""
    logits = tables.at_least_float32(observed.logits)
    one = jnp.ones((), logits.dtype)
    return jax.jvp(lambda w: observed.loss(w * logits, observed.targets), (one,), (one,))[1]


def _places(domain: Array, num_domains: int, axis_name: str | None) -> Array:
    """How many examples of its own domain precede each example in the global batch, [B]."""
    members = jax.nn.one_hot(domain, num_domains, dtype=jnp.int32)
    before = jnp.cumsum(members, axis=0) - members
    if axis_name is not None:
        counts = jax.lax.all_gather(jnp.sum(members, axis=0), axis_name)
        earlier = jnp.arange(counts.shape[0]) < jax.lax.axis_index(axis_name)
        before = before + jnp.sum(counts * earlier[:, None], axis=0, keepdims=True)
    return jnp.sum(before * members, axis=1)
