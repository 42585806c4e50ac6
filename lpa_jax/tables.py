"""Tables with one row per class, [C, ...], or per example, [B, ...].

Norms, products and directions of rows, and the statistics of the classes of a global batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lpa_jax.parallel.explicit_axes import in_auto_axes

Array = jax.Array


def over_classes(vector: Array, table: Array) -> Array:
    """Reshapes one number per row, [C] or [B], to broadcast over a table [C, ...] or [B, ...]."""
    return jnp.reshape(vector, (-1,) + (1,) * (table.ndim - 1))


def perturbation_dtype(values) -> jnp.dtype:
    """The dtype of `values`, but at least float32: projections hold at every precision."""
    return jnp.promote_types(values.dtype, jnp.float32)


def at_least_float32(values: Array) -> Array:
    """The values in `perturbation_dtype`: float64 stays, everything else becomes float32."""
    return values.astype(perturbation_dtype(values))


def as_rows(table: Array) -> Array:
    """[C, *S] -> [C, S], a view: TPUs pad the last axis of an array to a multiple of 128 entries.

    Example:
      >>> as_rows(jnp.zeros((10, 8, 8, 32))).shape, as_rows(jnp.zeros(10)).shape
      ((10, 2048), (10,))
    """
    return jnp.reshape(table, (table.shape[0], -1)) if table.ndim > 2 else table


def inner_products(a: Array, b: Array) -> Array:
    """Row-wise inner products of two tables, [C, ...] x [C, ...] -> [C]."""
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)))


def row_norms(table: Array, norm: str = "l2") -> Array:
    """Row-wise norms, [C, ...] -> [C], of rows of any size: no square under- or overflows.

    Example:
      >>> print(row_norms(jnp.array([[3.0, 4.0], [3e-30, 4e-30], [3e30, 4e30], [0.0, 0.0]])))
      [5.e+00 5.e-30 5.e+30 0.e+00]
    """
    if norm == "linf":
        return jnp.max(jnp.abs(table), axis=tuple(range(1, table.ndim)))
    # On a TPU, one read takes a third fewer cycles (its compiler's estimate); on a CPU, which reads
    # the table once per sum, twice the time.
    return jax.lax.platform_dependent(table, tpu=_norms_in_one_read, default=_norms_in_two_reads)


def _norms_in_two_reads(table: Array) -> Array:
    """Squares of the rows divided by their largest entries."""
    axes = tuple(range(1, table.ndim))
    largest = jnp.max(jnp.abs(table), axis=axes)
    scale = jnp.where(largest > 0, largest, 1.0)
    return scale * jnp.sqrt(jnp.sum(jnp.square(table / over_classes(scale, table)), axis=axes))


def _norms_in_one_read(table: Array) -> Array:
    """Squares of the rows as they are, scaled up and scaled down: one of the sums is accurate."""
    axes = tuple(range(1, table.ndim))
    # In float32 2^80: a row whose sum of squares is below 2^-80 loses to underflow what matters,
    # but scaled up it reaches from 2^-92, the square of the smallest entry, to 2^80 at most.
    up = 2.0 ** (jnp.finfo(table.dtype).maxexp * 5 // 8)
    plain, small, large = (
        jnp.sum(jnp.square(table * scale), axis=axes) for scale in (1.0, up, 1 / up)
    )
    return jnp.where(
        plain < 1 / up,
        jnp.sqrt(small) / up,
        jnp.where(plain < jnp.inf, jnp.sqrt(plain), jnp.sqrt(large) * up),
    )


def unit_rows(table: Array) -> Array:
    """Every row divided by its l2 norm; zero rows stay zero."""
    rows = as_rows(table)
    norms = row_norms(rows)
    return jnp.reshape(rows / over_classes(jnp.where(norms > 0, norms, 1.0), rows), table.shape)


def rows_of(table: Array, labels: Array, fill: float = 0.0) -> Array:
    """The row of every example's class, [C, ...] -> [B, ...]; `fill` for labels outside 0..C-1.

    Example:
      >>> rows_of(jnp.array([1.0, 2.0]), jnp.array([1, -1, 0])).tolist()
      [2.0, 0.0, 1.0]
    """
    # An index of -1 would be the last row, one of C is out of range.
    return table.at[beyond_if_ignored(labels, table.shape[0])].get(mode="fill", fill_value=fill)


def beyond_if_ignored(labels: Array, num_classes: int) -> Array:
    """Labels with C in place of negative ones, so that reads and writes at them have no effect."""
    return jnp.where(labels < 0, num_classes, labels)


@in_auto_axes()
def class_sums(
    values: Array, labels: Array, num_classes: int, axis_name: str | None = None
) -> Array:
    """Sums of `values` [B, ...] by label over the global batch -> [C, ...].

    Examples with a label outside 0..C-1, such as -1, have no part in them.
    """
    sums = jax.ops.segment_sum(as_rows(values), labels, num_segments=num_classes)
    sums = sums if axis_name is None else jax.lax.psum(sums, axis_name)
    return jnp.reshape(sums, (num_classes, *values.shape[1:]))


def class_means(
    values: Array,
    labels: Array,
    counts: Array,
    axis_name: str | None = None,
    rows: Array | None = None,
) -> Array:
    """Means of `values` [B, ...] by label over the global batch -> [C, ...]; absent classes get 0.

    Args:
      values: [B, ...].
      labels: [B] integers in 0..C-1.
      counts: Number of examples of each class in the global batch, [C].
      axis_name: Mapped axis over which the global batch is spread, or None.
      rows: [R] classes whose means are returned, [R, ...]; None for all.
    """
    sums = class_sums(values, labels, counts.shape[0], axis_name)
    if rows is not None:
        sums = jnp.reshape(rows_of(as_rows(sums), rows), (-1, *sums.shape[1:]))
        counts = rows_of(counts, rows)
    return sums / over_classes(jnp.maximum(counts, 1.0).astype(sums.dtype), sums)


def class_counts(
    labels: Array, num_classes: int, axis_name: str | None = None, dtype=jnp.float32
) -> Array:
    """Number of examples of each class in the global batch -> [C]."""
    return class_sums(jnp.ones(labels.shape, dtype), labels, num_classes, axis_name)


def spread_over_classes(labels: Array, size: int) -> Array:
    """Positions of `size` examples: the first of every class, then the second of every class, ...

    So the smaller classes are whole and all others equally large, up to one example. Examples with
    label -1 come last.

    Args:
      labels: [B], integers >= -1.
      size: M <= B.

    Returns:
      [M], in this order; one turn is in the order of the batch.

    Example:
      >>> spread_over_classes(jnp.array([0, 0, 0, 0, 2, -1, 1, 2]), 5).tolist()
      [0, 4, 6, 1, 7]
    """
    order = jnp.argsort(labels, stable=True)
    by_class = labels[order]
    earlier = jnp.arange(labels.shape[0]) - jnp.searchsorted(by_class, by_class)
    earlier = jnp.where(by_class < 0, labels.shape[0], earlier)
    return order[jnp.lexsort((order, earlier))][:size]


def counted_rows(labels: Array) -> Array:
    """Whether a row counts, [N, ...] -> [N]: not if its label, or all of several, are -1."""
    counted = labels >= 0
    return counted if labels.ndim == 1 else jnp.any(counted, axis=tuple(range(1, labels.ndim)))


def weight_of_counted(labels: Array, axis_name: str | None = None) -> Array:
    """Size of the global batch over the number of its examples that count: 1 if all do."""
    counted = jnp.sum(counted_rows(labels).astype(jnp.float32))
    size = jnp.asarray(labels.shape[0], jnp.float32)
    if axis_name is not None:
        counted, size = jax.lax.psum((counted, size), axis_name)
    return size / jnp.maximum(counted, 1.0)


class BatchClasses(NamedTuple):
    """The classes of one global batch, counted once.

    Attributes:
      labels: Class of each example of this device, [B] integers in 0..C-1, or -1 for none.
      counts: Number of examples of each class in the global batch, [C].
      axis_name: Mapped axis over which the global batch is spread, or None.
      by_example: Tables hold the rows of this device's examples, [B, ...], not those of all
        classes. On a pod, where a device has few examples, this saves arithmetic on the others.
    """

    labels: Array
    counts: Array
    axis_name: str | None = None
    by_example: bool = False

    @classmethod
    def of(
        cls, labels: Array, num_classes: int, axis_name: str | None = None, dtype=jnp.float32
    ) -> "BatchClasses | SeveralClasses":
        """Counts the classes of a batch; arguments as for `class_counts`, or [B, C] of 0 and 1."""
        if labels.ndim > 1:
            members = (labels > 0).astype(dtype)
            counts = jnp.sum(members, axis=0)
            counts = counts if axis_name is None else jax.lax.psum(counts, axis_name)
            return SeveralClasses(members, counts, axis_name)
        return cls(labels, class_counts(labels, num_classes, axis_name, dtype), axis_name)

    def part(self, chosen: Array) -> "BatchClasses":
        """The classes of the examples at the positions `chosen`, [M] on every device."""
        return self.of(self.labels[chosen], len(self.counts), self.axis_name, self.counts.dtype)

    def means(self, values: Array) -> Array:
        """Class means of `values` [B, ...] over the global batch: a table.

        Example:
          >>> classes = BatchClasses.of(jnp.array([0, 2, 2]), num_classes=3)
          >>> classes.means(jnp.array([1.0, 2.0, 4.0])).tolist()
          [1.0, 0.0, 3.0]
          >>> classes._replace(by_example=True).means(jnp.array([1.0, 2.0, 4.0])).tolist()
          [1.0, 3.0, 3.0]
        """
        rows = self.labels if self.by_example else None
        return class_means(values, self.labels, self.counts, self.axis_name, rows)

    def means_of_gradients(self, gradients: Array) -> Array:
        """Class means of d loss_i / d delta_{y_i}, from gradients at the activation [B, ...]."""
        return self.means(gradients)

    def members_of(self, table: Array) -> Array:
        """What a table of perturbations adds to every example, [C, ...] -> [B, ...]."""
        rows = as_rows(table)
        rows = jnp.where(rows == 0, -0.0, rows)  # h + 0.0 would turn -0.0 into 0.0
        members = rows if self.by_example else rows_of(rows, self.labels, fill=-0.0)
        return jnp.reshape(members, (-1, *table.shape[1:]))

    def confidence(self, logits: Array) -> Array:
        """q_c, the mean probability of the true class over the global batch, [C]."""
        own = jnp.take_along_axis(jax.nn.softmax(logits), self.labels[:, None], axis=1)
        return self.means(own[:, 0])


class SeveralClasses(NamedTuple):
    """`BatchClasses` for examples that are members of several classes, m_i of them.

    Attributes:
      members: 1 where example i is a member of class c, [B, C].
      counts: As of `BatchClasses`, [C].
      axis_name: As of `BatchClasses`.
      by_example: Always False.
    """

    members: Array
    counts: Array
    axis_name: str | None = None
    by_example: bool = False

    @property
    def _shares(self) -> Array:
        """1 / m_i for the classes of an example, [B, C]; rows of zeros without a class."""
        sizes = jnp.sum(self.members, axis=1, keepdims=True)
        return self.members / jnp.maximum(sizes, 1.0)

    def _mean(self, weights: Array, values: Array) -> Array:
        # What belongs to no class may be anything, also NaN.
        member = over_classes(jnp.any(weights > 0, axis=1), values)
        rows = as_rows(jnp.where(member, values, 0.0))
        sums = jnp.einsum("bc,b...->c...", weights, rows, precision=jax.lax.Precision.HIGHEST)
        sums = sums if self.axis_name is None else jax.lax.psum(sums, self.axis_name)
        means = sums / over_classes(jnp.maximum(self.counts, 1.0).astype(sums.dtype), sums)
        return jnp.reshape(means, (-1, *values.shape[1:]))

    def means(self, values: Array) -> Array:
        """Class means of `values` [B, ...] over the global batch, [C, ...].

        Example:
          >>> classes = BatchClasses.of(jnp.array([[1, 1], [0, 1]]), num_classes=2)
          >>> classes.means(jnp.array([1.0, 3.0])).tolist()
          [1.0, 2.0]
        """
        return self._mean(self.members, values)

    def means_of_gradients(self, gradients: Array) -> Array:
        """Class means of d loss_i / d delta_c, where delta_c moves example i by delta_c / m_i."""
        return self._mean(self._shares, gradients)

    def members_of(self, table: Array) -> Array:
        """(1/m_i) sum of the rows of an example's classes, [C, ...] -> [B, ...].

        Example:
          >>> classes = BatchClasses.of(jnp.array([[1, 1], [0, 1], [0, 0]]), num_classes=2)
          >>> classes.members_of(jnp.array([2.0, 4.0])).tolist()
          [3.0, 4.0, -0.0]
        """
        rows = as_rows(table)
        moved = jnp.einsum("bc,c...->b...", self._shares, rows, precision="highest")
        return jnp.reshape(jnp.where(moved == 0, -0.0, moved), (-1, *table.shape[1:]))

    def confidence(self, logits: Array) -> Array:
        """q_c, the mean of sigmoid(z_ic) over the members of class c, [C]."""
        sums = jnp.sum(self.members * jax.nn.sigmoid(logits).astype(self.members.dtype), axis=0)
        sums = sums if self.axis_name is None else jax.lax.psum(sums, self.axis_name)
        return sums / jnp.maximum(self.counts, 1.0)
