r"""A loss over any number of batches as a function of a shift, for the measures of flatness.

An objective is a table of R independent functions of R rows of numbers,

    f_r : R^N -> R,    f_r(shift_r) = mean over the examples behind row r of their loss,

with its gradients and Hessian-vector products. In weight space there is one row, the shift of all
parameters (`weight_objective`); in activation space a row is the shift of a class's or an example's
activation (`activation_objective`). Rows are independent, so the Hessian is block diagonal, and one
product advances the estimators of `lpa_jax.diagnostics.curvature` for all rows at once.

The host loops over the batches, with one compiled call for each; they are never concatenated.
(matfree has the same estimators, but traces its matrix-vector products inside a loop primitive,
which excludes a host loop and makes convolutions on CPU an order of magnitude slower.)
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lpa_jax import checks, metrics
from lpa_jax.injection import LOGITS, Network, Pass, Variables, activation_shapes, read_batch
from lpa_jax.labels import one_each

Array = jax.Array
Batch = Mapping[str, Any]
# (variables, shift [R, N], batch) -> (sums of losses [R], numbers of examples [R])
RowLosses = Callable[[Variables, Array, Batch], metrics.Pair]

_FIELDS = ("image", "label", "mask")


class Objective(NamedTuple):
    """R independent functions of the rows of a shift [R, N], averaged over batches.

    Attributes:
      value: Shift [R, N] -> f_r(shift_r), NumPy float64 [R].
      gradient: Shift [R, N] -> gradients [R, N].
      hessian_product: Vectors [R, N] -> H_r v_r at shift zero, [R, N].
      base: f_r(0), [R], nan for a row without examples.
      counts: Examples behind each row, [R].
      dimension: N.
      dtype: Of shifts and gradients.
      lead: Leading shape of results: () for one function, (R,) for a table of them.
    """

    value: Callable[[Array], np.ndarray]
    gradient: Callable[[Array], Array]
    hessian_product: Callable[[Array], Array]
    base: np.ndarray
    counts: np.ndarray
    dimension: int
    dtype: jnp.dtype
    lead: tuple[int, ...]

    @property
    def rows(self) -> int:
        """R."""
        return self.counts.shape[0]

    def shaped(self, table: np.ndarray) -> np.ndarray:
        """[R, ...] -> [*lead, ...], with nan for rows without examples."""
        absent = (self.counts == 0).reshape((-1,) + (1,) * (table.ndim - 1))
        return np.where(absent, np.nan, table).reshape(self.lead + table.shape[1:])


def objective_over(
    row_losses: RowLosses,
    variables: Variables,
    batches: Iterable[Batch],
    *,
    rows: int,
    dimension: int,
    dtype: jnp.dtype = jnp.float32,
    lead: tuple[int, ...] | None = None,
    num_classes: int | None = None,
) -> Objective:
    """The objective of a loss that is computed batch by batch.

    Reads all batches once, so that bad input is refused here and not during a measurement.

    Args:
      row_losses: (variables, shift [R, N], batch) -> (sums of losses [R], numbers of examples [R]),
        twice differentiable in the shift, hashable (it is a static argument of `jax.jit`, so equal
        ones compile once).
      variables: Passed to `row_losses`.
      batches: A list or any other collection that can be iterated over repeatedly.
      rows: R.
      dimension: N.
      dtype: Of the shift, at least float32.
      lead: Leading shape of results, (R,) if None.
      num_classes: C, to check the labels on the host; None does not.

    Raises:
      ValueError: An iterator that can be used once only, no example, a label outside 0..C-1, or a
        loss that is not finite.

    Example:
      >>> def bowl(variables, shift, batch):
      ...     return jnp.sum(batch["image"]) * jnp.sum(shift**2, axis=1), jnp.ones(1)
      >>> batches = [{"image": np.ones(3)}, {"image": np.ones(5)}]
      >>> objective = objective_over(bowl, {}, batches, rows=1, dimension=2, lead=())
      >>> objective.hessian_product(jnp.array([[1.0, 0.0]])).tolist()  # 2 (3 + 5) / 2
      [[8.0, 0.0]]
    """
    _check_collection(batches)

    def over_batches(function, *arguments):
        total = None
        for batch in batches:
            kept = {name: batch[name] for name in _FIELDS if name in batch}
            if num_classes is not None:
                checks.check_labels(kept["label"], num_classes)
            part = function(row_losses, variables, *arguments, kept)
            total = part if total is None else metrics.add(total, part)
        return total

    zero = jnp.zeros((rows, dimension), dtype)
    first = over_batches(_sums, zero)
    if first is None or not np.any(first[1]):
        raise ValueError("batches must hold at least one example, got none")
    base, counts = metrics.compute(first), np.asarray(first[1])
    if not np.isfinite(base[counts > 0]).all():
        worst = base[counts > 0][~np.isfinite(base[counts > 0])][0]
        raise ValueError(f"the loss over batches must be finite, got {worst}")
    share = jnp.asarray(1.0 / np.maximum(counts, 1.0), dtype)[:, None]
    return Objective(
        value=lambda shift: metrics.compute(over_batches(_sums, shift)),
        gradient=lambda shift: over_batches(_gradient, shift) * share,
        hessian_product=lambda vectors: over_batches(_hessian_product, zero, vectors) * share,
        base=base,
        counts=counts,
        dimension=dimension,
        dtype=jnp.dtype(dtype),
        lead=(rows,) if lead is None else lead,
    )


@dataclasses.dataclass(frozen=True)
class ReadBatches:
    """Batches with the entries that a network reads, as `image` and `label`."""

    network: Network
    batches: Iterable[Batch]

    def __iter__(self):
        return (read_batch(self.network, batch) for batch in self.batches)


def batch_losses(
    network: Network,
    loss: Callable[[Array, Array], Array],
    variables: Variables,
    batch: Batch,
    pinned: Mapping[str, Array],
) -> metrics.Pair:
    """Losses [B] of a batch in evaluation mode, 0 for padding, and whether each counts, [B]."""
    logits, _ = network.run(Pass(variables, batch["image"]), pinned, LOGITS)
    losses = one_each(
        loss(logits, jax.nn.one_hot(batch["label"], logits.shape[-1])), logits.shape[:-1]
    )
    counted = jnp.asarray(batch.get("mask", jnp.ones(losses.shape))) != 0
    return jnp.where(counted, losses, 0.0), counted.astype(losses.dtype)


def first_batch_shapes(
    network: Network, variables: Variables, batches: Iterable[Batch], *layers: str
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes at `layers` for the first batch.

    Raises:
      ValueError: Unknown layer, no example, or an iterator that can be used once only.
    """
    _check_collection(batches)
    batch = next(iter(batches), None)
    batch = None if batch is None else read_batch(network, batch)
    if batch is None or not len(batch["label"]):
        raise ValueError("batches must hold at least one example, got none")
    shapes = activation_shapes(network, variables, batch["image"], layers)
    return tuple(shapes[layer] for layer in layers)


def _check_collection(batches: Iterable[Batch]) -> None:
    checks.instance("batches", batches, Iterable, "a list or another collection of batches")
    if iter(batches) is batches:
        raise ValueError(
            "batches must be a collection that can be gone over again, such as a list, "
            f"got {type(batches).__name__}"
        )


@partial(jax.jit, static_argnums=0)
def _sums(row_losses, variables, shift, batch):
    return row_losses(variables, shift, batch)


@partial(jax.jit, static_argnums=0)
def _gradient(row_losses, variables, shift, batch):
    return _gradient_of(row_losses, variables, batch)(shift)


@partial(jax.jit, static_argnums=0)
def _hessian_product(row_losses, variables, shift, vectors, batch):
    return jax.jvp(_gradient_of(row_losses, variables, batch), (shift,), (vectors,))[1]


def _gradient_of(row_losses, variables, batch):
    return jax.grad(lambda shift: jnp.sum(row_losses(variables, shift, batch)[0]))
