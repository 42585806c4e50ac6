r"""The labels of a batch: one class an example, one a position, or several classes an example.

| labels | logits | rows |
|---|---|---|
| one class, `[B]` | `[B, C]` | the B examples |
| one class a position, `[B, *P]` | `[B, *P, C]` | the B * prod(P) positions |
| several classes, `[B, *P, C]` of 0 and 1 | `[B, *P, C]` | the same without the last axis |

The shape of the logits tells them apart. All that is computed from labels is computed from rows:
with labels of positions, every position is a member of its class, as an example is elsewhere.
-1 marks what does not count: an example, a position, or (of several classes) a class that is not
known to be absent or present.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpa_jax import checks
from lpa_jax.tables import counted_rows, weight_of_counted

Array = jax.Array
Loss = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Labels:
    """The labels of one device's share of a batch, made by `Labels.of`.

    Attributes:
      values: `[B, *P]` classes, or `[B, *P, C]` of 0, 1 and -1 for several classes an example.
      num_classes: C.
      several: Whether `values` name several classes an example.
    """

    values: Array
    num_classes: int
    several: bool = False

    @classmethod
    def of(cls, batch: Mapping[str, Any], logits: jax.ShapeDtypeStruct) -> "Labels":
        """The labels of a batch, -1 where its mask is 0.

        Args:
          batch: `label` and, optionally, `mask`, whose axes are the first of those of `label`.
          logits: Shape of the network's logits for this batch.

        Raises:
          ValueError: The shapes do not fit; outside jit, a label out of range.
        """
        labels = cls.of_shape(values := counted_labels(batch), logits)
        if labels.several:
            known = checks.is_known(values)
            fits = not known or bool(np.isin(np.asarray(values), (-1, 0, 1)).all())
            checks.require(fits, "labels", "0, 1 or -1 for several classes an example", values)
        else:
            checks.check_labels(values, labels.num_classes, may_ignore=True)
            whole = jnp.issubdtype(values.dtype, jnp.integer)
            checks.require(bool(whole), "labels", "integers", values.dtype)
        return labels

    @classmethod
    def of_shape(cls, values: Any, logits: jax.ShapeDtypeStruct) -> "Labels":
        """Labels of which only the shape is known; of one class an example where it is not (None).

        Raises:
          ValueError: The shapes do not fit.
        """
        shape = tuple(logits.shape)
        kind = np.dtype(getattr(values, "dtype", np.int32)).kind
        checks.require(kind in "biuf", "labels", "integers", values)
        if values is None:
            values = jax.ShapeDtypeStruct(shape[:-1], jnp.int32)
        several = len(shape) > 1 and np.shape(values) == shape
        if np.shape(values) != shape[:-1] and not several:
            raise ValueError(
                f"batch['label'] must have shape {shape[:-1]}, one class each, or {shape}, several "
                f"classes each, for logits of shape {shape}, got {np.shape(values)}"
            )
        return cls(values, shape[-1], several)

    @property
    def lead(self) -> tuple[int, ...]:
        """The axes of examples and positions, (B, *P)."""
        return self.values.shape[:-1] if self.several else self.values.shape

    @property
    def rows(self) -> Array:
        """Labels of the rows, [N], or [N, C] of several classes."""
        return jnp.reshape(self.values, (-1, self.num_classes) if self.several else (-1,))

    @property
    def targets(self) -> Array:
        """Soft targets of the rows, [N, C]; 0 for a row that does not count, -1 for an unknown."""
        if self.several:
            return self.rows.astype(jnp.float32)
        return jax.nn.one_hot(self.rows, self.num_classes)

    @property
    def may_interact(self) -> bool:
        """Whether a row that does not count can change the losses of others: another position."""
        return self.several or len(self.lead) > 1

    def counted(self, losses: Array) -> Array:
        """Losses of the rows: 0 where a row does not count, NaN for labels that jit cannot refuse.

        Raises:
          ValueError: There is not one loss for each row.
        """
        rows = self.rows
        losses = jnp.reshape(one_each(losses, self.lead), (-1,))
        if self.several:
            losses = jnp.where(counted_rows(rows), losses, 0.0)
            known = (rows == -1) | (rows == 0) | (rows == 1)
            return jnp.where(jnp.all(known, axis=1), losses, jnp.nan)
        losses = jnp.where(rows == -1, 0.0, losses)
        return jnp.where((rows >= -1) & (rows < self.num_classes), losses, jnp.nan)

    def mean(self, losses: Array, axis_name: str | None = None) -> Array:
        """This device's part of the mean over the rows of the global batch that count.

        The mean of the parts over the devices is that of the global batch.
        """
        return jnp.mean(losses) * weight_of_counted(self.rows, axis_name).astype(losses.dtype)

    def of_counted(self, loss: Loss) -> Loss:
        """The loss, checked; 0 where a label does not count, if that can matter to other rows."""

        def counted(logits, targets):
            losses = one_each(loss(logits, targets), logits.shape[:-1])
            if not self.may_interact:
                return losses
            return jnp.where(jnp.reshape(counted_rows(self.rows), losses.shape), losses, 0.0)

        return counted


def one_each(losses: Any, lead: tuple[int, ...]) -> Array:
    """The losses, if there is one for each label of shape `lead`; raises ValueError."""
    shape = getattr(losses, "shape", type(losses).__name__)
    if shape not in (lead, (math.prod(lead),)):
        raise ValueError(f"loss must return one value for each label, shape {lead}, got {shape}")
    return losses


jax.tree_util.register_dataclass(Labels, ["values"], ["num_classes", "several"])


def counted_labels(batch: Mapping[str, Array]) -> Array:
    """The labels of a batch, -1 for what does not count: labels of -1, masks of 0.

    A mask has the first axes of the labels: [B] masks whole examples, [B, *P] positions.

    Example:
      >>> counted_labels({"label": jnp.array([[0, 1], [2, 3]]), "mask": jnp.array([1, 0])}).tolist()
      [[0, 1], [-1, -1]]
    """
    labels = jnp.asarray(batch["label"])
    if labels.dtype == bool or jnp.issubdtype(labels.dtype, jnp.unsignedinteger):
        labels = labels.astype(jnp.int32)
    if "mask" not in batch:
        return labels
    mask = jnp.asarray(batch["mask"])
    if mask.shape != labels.shape[: mask.ndim]:
        raise ValueError(
            f"batch['mask'] must have the first axes of batch['label'], {labels.shape}, "
            f"got shape {mask.shape}"
        )
    if checks.is_known(mask):
        for odd in np.extract(~np.isin(mask, (0, 1)), mask)[:1]:
            checks.require(False, "batch['mask']", "0 or 1", odd)
    mask = jnp.reshape(mask, mask.shape + (1,) * (labels.ndim - mask.ndim))
    # Under jit, a mask of anything else gives a label that is refused by a loss of NaN.
    return jnp.where(mask == 1, labels, jnp.where(mask == 0, -1, -2))


def majority(labels: Array, activation: jax.ShapeDtypeStruct, num_classes: int) -> Array:
    """The most frequent class of every block of positions: labels for a coarser feature map.

    Labels that do not count have no vote; a block of only such labels gets -1. Of equally frequent
    classes the first wins.

    Args:
      labels: [B, *P], classes in 0..C-1 or -1.
      activation: [B, *Q, ...] at the layer, every axis of Q a divisor of that of P.
      num_classes: C.

    Returns:
      [B, *Q].

    Raises:
      ValueError: The positions of the activation do not divide those of the labels.

    Example:
      >>> labels = jnp.array([[0, 1, 1, -1, -1, -1]])
      >>> majority(labels, jax.ShapeDtypeStruct((1, 2, 8), jnp.float32), num_classes=2).tolist()
      [[1, -1]]
      >>> majority(labels, jax.ShapeDtypeStruct((1, 4, 8), jnp.float32), num_classes=2)
      Traceback (most recent call last):
        ...
      ValueError: labels of shape (1, 6) must divide into the positions of an activation (1, 4, 8)
    """
    fine, coarse = labels.shape[1:], tuple(activation.shape[1 : labels.ndim])
    fits = len(coarse) == len(fine) and all(c and not f % c for f, c in zip(fine, coarse))  # noqa: B905
    if not fits:
        raise ValueError(
            f"labels of shape {labels.shape} must divide into the positions of an activation "
            f"{tuple(activation.shape)}"
        )
    sizes = [size for f, c in zip(fine, coarse, strict=True) for size in (c, f // c)]
    blocks = jnp.reshape(labels, (labels.shape[0], *sizes))
    blocks = jnp.moveaxis(blocks, range(2, 2 * len(fine) + 1, 2), range(-len(fine), 0))
    blocks = jnp.reshape(blocks, (labels.shape[0], *coarse, -1))
    votes = jnp.sum(jax.nn.one_hot(blocks, num_classes, dtype=jnp.int32), axis=-2)
    return jnp.where(jnp.any(votes > 0, axis=-1), jnp.argmax(votes, axis=-1), -1)


def rows_of_positions(activation: Array, lead: tuple[int, ...]) -> Array:
    """[B, *P, *R] -> [N, *R]: one row for each label."""
    if len(lead) == 1:
        return activation
    return jnp.reshape(activation, (math.prod(lead), *activation.shape[len(lead) :]))
