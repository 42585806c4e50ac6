"""The loss along straight lines and planes in weight space, as arrays."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from lpa_jax import checks, tables
from lpa_jax.diagnostics.flatness import filter_norms
from lpa_jax.diagnostics.objective import Objective

Array = jax.Array


def filter_normalized_directions(rng: Array, params: Any, count: int = 2) -> Array:
    r"""Random directions whose filters have the norms of the network's filters.

        d_f <- d_f ||w_f|| / ||d_f||,    d ~ N(0, I),

    for every filter f (the weights into one output: all axes but the last); biases and the
    parameters of normalisation layers do not move. A step of length a then moves every filter by a
    times its norm, so that slices are comparable between networks with weights of different scale.

    Args:
      rng: A key.
      params: The parameters w.
      count: D, number of independent directions, >= 1.

    Returns:
      [D, N], rows in the order of `ravel_pytree(params)`.

    Raises:
      ValueError: `count` out of range.

    Example:
      >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 2.0]]), "bias": jnp.ones(2)}
      >>> bias, kernel = jnp.split(filter_normalized_directions(jax.random.key(0), params)[0], [2])
      >>> bias.tolist(), filter_norms(kernel.reshape(2, 2)).round(4).tolist()
      ([0.0, 0.0], [[5.0, 2.0]])

    References:
      Li et al., NeurIPS 2018 (arXiv 1712.09913), section 4.
    """
    checks.integer("count", count, minimum=1)
    checks.key("rng", rng)
    _, unravel = ravel_pytree(params)

    def direction(weights, random):
        if weights.ndim < 2:
            return jnp.zeros_like(weights)
        lengths = filter_norms(random)
        return random * (filter_norms(weights) / jnp.where(lengths > 0, lengths, 1.0))

    size = sum(weights.size for weights in jax.tree.leaves(params))
    dtype = jax.eval_shape(lambda tree: ravel_pytree(tree)[0], params).dtype
    rows = []
    for key in jax.random.split(rng, count):
        random = unravel(jax.random.normal(key, (size,), dtype))
        rows.append(ravel_pytree(jax.tree.map(direction, params, random))[0])
    return jnp.stack(rows).astype(tables.perturbation_dtype(rows[0]))


def loss_slice(
    objective: Objective, directions: Array, coordinates: Sequence[Sequence[float]]
) -> np.ndarray:
    r"""The loss on a grid along one, two or more directions.

        L[j_1, ..., j_D] = f( sum_k coordinates[k][j_k] directions[k] )

    Costs one forward pass over all batches per grid point. If the loss overflows, the value is inf
    or nan.

    Args:
      objective: Of one row, from `weight_objective`.
      directions: [D, N], from `filter_normalized_directions`, differences of two networks'
        parameters (flattened by `ravel_pytree`), or Hessian eigenvectors.
      coordinates: D sequences of steps; 0 is the network itself.

    Returns:
      [len(coordinates[0]), ..., len(coordinates[D-1])], float64.

    Raises:
      ValueError: An objective with several rows, or directions and coordinates that do not fit it.

    Example:
      >>> from lpa_jax.diagnostics.objective import objective_over
      >>> def bowl(variables, shift, batch):
      ...     return jnp.sum(shift**2, axis=1), jnp.ones(1)
      >>> objective = objective_over(bowl, {}, [{}], rows=1, dimension=2, lead=())
      >>> loss_slice(objective, jnp.eye(2), [(0, 1), (0, 1, 2)]).tolist()
      [[0.0, 1.0, 4.0], [1.0, 2.0, 5.0]]
    """
    directions = jnp.asarray(directions, objective.dtype)
    if objective.lead != ():
        raise ValueError(f"objective must have one row, got one with {objective.rows}")
    if directions.ndim != 2 or directions.shape[1] != objective.dimension:
        raise ValueError(
            f"directions must have shape [D, {objective.dimension}], got {directions.shape}"
        )
    if len(coordinates) != len(directions) or not all(map(len, coordinates)):
        raise ValueError(
            f"coordinates must be {len(directions)} non-empty sequences, one a direction, "
            f"got lengths {[len(steps) for steps in coordinates]}"
        )
    losses = []
    for point in itertools.product(*coordinates):
        steps = jnp.asarray(point, objective.dtype)
        losses.append(objective.value(jnp.sum(steps[:, None] * directions, axis=0)[None])[0])
    return np.reshape(losses, [len(steps) for steps in coordinates])
