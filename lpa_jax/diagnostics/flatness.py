"""The loss over batches as a function of the weights, for `lpa_jax.diagnostics.curvature`."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from lpa_jax import metrics, tables
from lpa_jax.diagnostics.objective import (
    Batch,
    Objective,
    ReadBatches,
    batch_losses,
    first_batch_shapes,
    objective_over,
)
from lpa_jax.injection import LOGITS, Network, Variables, as_network
from lpa_jax.losses import cross_entropy

Array = jax.Array


def weight_objective(
    network: Network,
    variables: Variables,
    batches: Iterable[Batch],
    *,
    loss: Callable[[Array, Array], Array] = cross_entropy,
    filter_normalized: bool = False,
) -> Objective:
    r"""The mean loss over all examples as a function of a shift of all parameters.

        f(s) = (1/M) sum_i loss(z_i(w + T s), y_i),    T = 1,

    or with `filter_normalized` T = diag(t), t_j the l2 norm of the filter that weight j belongs to
    (the weights into one output: every axis but the last) and |w_j| for vectors, such as biases.
    Measures in s then do not change if a filter is scaled and the next layer scaled back. In
    evaluation mode: with running statistics and without dropout.

    Args:
      network: A cut network.
      variables: Its parameters and model state.
      batches: `{"image": [B, ...], "label": [B]}`, with a `"mask"` [B] if padded, preprocessed as
        for the network; any collection that can be iterated over repeatedly.
      loss: (logits [B, C], targets [B, C]) -> [B].
      filter_normalized: Measure shifts in units of the filters' norms.

    Returns:
      An objective of one row, N the number of parameters; results have no leading shape.

    Raises:
      ValueError: An iterator that can be used only once, no example, a label outside 0..C-1, or a
        loss that is not finite.

    Example:
      >>> from lpa_jax.injection import CutFunctions
      >>> network = CutFunctions(lambda p, x: x, lambda p, h: h @ p)
      >>> batch = {"image": jnp.eye(2), "label": jnp.array([0, 1])}
      >>> objective = weight_objective(network, {"params": jnp.zeros((2, 2))}, [batch])
      >>> objective.dimension, objective.base.round(4).tolist()
      (4, [0.6931])

    References:
      Filters as in Li et al., NeurIPS 2018 (arXiv 1712.09913), section 4; T as in ASAM, Kwon
      et al., ICML 2021 (arXiv 2102.11600), section 3.
    """
    network = as_network(network)
    (logits,) = first_batch_shapes(network, variables, batches, LOGITS)
    flat = jax.eval_shape(lambda params: ravel_pytree(params)[0], variables["params"])
    return objective_over(
        _WeightLosses(network, loss, filter_normalized),
        variables,
        ReadBatches(network, batches),
        rows=1,
        dimension=flat.shape[0],
        dtype=tables.perturbation_dtype(flat),
        lead=(),
        num_classes=logits.shape[-1],
    )


def filter_norms(weights: Array) -> Array:
    """l2 norms over every axis but the last, [..., F] -> [1, ..., 1, F].

    Example:
      >>> filter_norms(jnp.array([[3.0, 0.0], [4.0, 1.0]])).tolist()
      [[5.0, 1.0]]
    """
    columns = jnp.moveaxis(weights, -1, 0)
    return jnp.reshape(tables.row_norms(columns), (1,) * (weights.ndim - 1) + (-1,))


@dataclasses.dataclass(frozen=True)
class _WeightLosses:
    """`RowLosses` of one row; equal ones are compiled once."""

    network: Network
    loss: Callable[[Array, Array], Array]
    filter_normalized: bool

    def __call__(self, variables: Variables, shift: Array, batch: Batch) -> metrics.Pair:
        params = variables["params"]
        flat, unravel = ravel_pytree(params)
        step = shift[0]
        if self.filter_normalized:
            step = step * ravel_pytree(jax.tree.map(_scale, params))[0].astype(step.dtype)
        moved = unravel((flat.astype(step.dtype) + step).astype(flat.dtype))
        losses, counted = batch_losses(
            self.network, self.loss, {**variables, "params": moved}, batch, {}
        )
        return jnp.sum(losses)[None], jnp.sum(counted)[None]


def _scale(weights: Any) -> Array:
    if weights.ndim < 2:
        return jnp.abs(weights)
    return jnp.broadcast_to(filter_norms(weights), weights.shape)
