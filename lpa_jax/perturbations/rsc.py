"""Representation Self-Challenging: the features that the prediction rests on most are muted."""

import math

import jax
import jax.numpy as jnp

from lpa_jax import checks, tables
from lpa_jax.perturbations.base import (
    Perturbation,
    identity,
    register,
    stateless,
)


@register("rsc")
def rsc(drop_f: float = 1 / 3, drop_b: float = 1 / 3) -> Perturbation:
    r"""Mutes the features with the largest gradient, in the examples that lean on them most.

        g_i  = grad of decode(h_i)[y_i] with respect to h_i,
        m_i  = 1 where g_i lies below its (1 - drop_f) quantile over the units, else 0,
        c_i  = softmax(decode(h_i))[y_i] - softmax(decode(m_i h_i))[y_i],
        h~_i = m_i h_i where c_i reaches the (1 - drop_b) quantile over the global batch, else h_i.

    Made for the last hidden layer. Quantiles are linearly interpolated, as in DomainBed, and units
    that tie with one are muted: below ReLU layers, where many gradients are zero, that can be more
    than a share drop_f. No gradient flows through the masks. Both shares must be known when the
    step is compiled. It costs two forward passes and one backward pass above the injection point.

    Args:
      drop_f: Share of an example's units to mute, in [0, 1]. 0 is no perturbation, bitwise.
      drop_b: Share of the batch to mute them in, in [0, 1]. 0 is no perturbation, bitwise.

    Raises:
      ValueError: `drop_f` or `drop_b` out of range.

    Example:
      >>> rsc(drop_f=0.5).name
      'rsc'

    References:
      Huang et al., ECCV 2020 (arXiv 2007.02454), equations 1 to 4 and section 3.3, in the
      version and with the shares of DomainBed: single units, no schedule.
    """
    checks.number("drop_f", drop_f, 0.0, 1.0)
    checks.number("drop_b", drop_b, 0.0, 1.0)
    if checks.vanishes(drop_f) or checks.vanishes(drop_b):
        return identity("rsc")

    def perturb(site):
        site.require_one_class("rsc")
        h = jax.lax.stop_gradient(site.activation)

        def own(scores):
            return jnp.take_along_axis(scores, site.labels[:, None], axis=1)[:, 0]

        def confidence(logits):
            return own(jax.nn.softmax(tables.at_least_float32(logits)))

        def own_logits(h):
            # Gradients of the sum: where examples do not interact above the injection point, those
            # are the gradients of each example's own logit.
            logits = site.decode(h)
            return jnp.sum(own(logits)), logits

        gradient, logits = jax.grad(own_logits, has_aux=True)(h)
        gradient = jnp.reshape(gradient, (h.shape[0], -1))
        spared = jnp.reshape(gradient < _threshold(gradient, drop_f), h.shape)
        muted = jnp.where(spared, h, 0.0).astype(h.dtype)
        change = confidence(logits) - confidence(site.decode(muted))
        # Examples that do not count are not among those of which a share is muted.
        changes = jnp.where(site.labels < 0, jnp.inf, change)
        if site.axis_name is not None:
            changes = jax.lax.all_gather(changes, site.axis_name, tiled=True)
        ranks = jnp.asarray([_rank(count, drop_b) for count in range(changes.size + 1)])
        exempt = change < jnp.sort(changes)[ranks[jnp.sum(changes != jnp.inf)]]
        kept = spared | tables.over_classes(exempt, h)
        return jnp.where(kept, site.activation, 0.0), site.targets

    return stateless("rsc", perturb)


def _threshold(values: jax.Array, drop: float) -> jax.Array:
    """The least of `values` [..., n] that is dropped, [..., 1]."""
    rank = _rank(values.shape[-1], drop)
    return jnp.sort(values, axis=-1)[..., rank : rank + 1]


def _rank(count: int, drop: float) -> int:
    """The rank of the least of `count` sorted values that is dropped.

    What lies below the interpolated (1 - drop) quantile lies below the next larger value, and the
    other way round. The rank is computed on the host, where (1 - 1/3) (n - 1) can be trusted.
    """
    return max(0, math.ceil((count - 1) * (1 - drop) - 1e-9))
