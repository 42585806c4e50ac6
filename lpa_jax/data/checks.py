"""Checks of what enters the data room: one-line errors, raised on the host."""

import operator

import numpy as np
from numpy.typing import ArrayLike


def integer(argument: str, value: int, minimum: int) -> int:
    """Returns `value` as a Python int of at least `minimum`.

    Args:
      argument: the name that the error shows.
      value: a Python or NumPy integer; booleans are refused.
      minimum: the smallest value allowed.

    Raises:
      ValueError: `value` is not an integer or lies below `minimum`.

    Example:
      >>> integer("batch_size", np.int64(8), minimum=1)
      8
    """
    allowed = f"must be an integer of at least {minimum}"
    if isinstance(value, bool | np.bool_):
        raise ValueError(f"{argument}={value!r}: {allowed}")
    try:
        index = operator.index(value)
    except TypeError:
        raise ValueError(f"{argument}={value!r}: {allowed}") from None
    if index < minimum:
        raise ValueError(f"{argument}={index}: {allowed}")
    return index


def label_array(labels: ArrayLike, num_classes: int | None = None) -> np.ndarray:
    """Returns labels as a non-empty int32 vector [N] with values in 0..num_classes-1.

    Args:
      labels: integers [N].
      num_classes: C; None checks only that no label is negative.

    Raises:
      ValueError: not a non-empty vector of integers, or a label out of range.

    Example:
      >>> label_array([0, 2, 1], num_classes=3)
      array([0, 2, 1], dtype=int32)
    """
    limit = np.iinfo(np.int32).max if num_classes is None else num_classes - 1
    return _integers_in_range("labels", labels, limit).astype(np.int32)


def host_slice(value: tuple[int, int], batch_size: int) -> tuple[int, int]:
    """Returns (process_index, process_count) after checking that the hosts share a batch evenly.

    Args:
      value: (process_index, process_count), as `jax.process_index()` and `jax.process_count()`.
      batch_size: the size of the global batch, a multiple of process_count.

    Raises:
      ValueError: an index outside 0..process_count-1, or a batch that cannot be shared evenly.

    Example:
      >>> host_slice((1, 2), batch_size=8)
      (1, 2)
    """
    if not isinstance(value, tuple) or len(value) != 2:
        raise ValueError(f"host_slice={value!r}: must be (process_index, process_count)")
    index = integer("host_slice[0]", value[0], minimum=0)
    count = integer("host_slice[1]", value[1], minimum=1)
    if index >= count:
        raise ValueError(f"host_slice={value}: process_index must lie in 0..{count - 1}")
    if batch_size % count:
        raise ValueError(f"batch_size={batch_size}: must be a multiple of the {count} hosts")
    return index, count


def index_array(indices: ArrayLike, size: int) -> np.ndarray:
    """Returns indices as a non-empty int64 vector [M] with values in 0..size-1.

    Args:
      indices: integers [M].
      size: N, the length of what they index.

    Raises:
      ValueError: not a non-empty vector of integers, or one out of range.

    Example:
      >>> index_array([2, 0], size=3)
      array([2, 0])
    """
    return _integers_in_range("indices", indices, size - 1).astype(np.int64)


def _integers_in_range(argument: str, values: ArrayLike, limit: int) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{argument} with shape {array.shape} and dtype {array.dtype}: "
            "must be a non-empty vector of integers"
        )
    lowest, highest = int(array.min()), int(array.max())
    if lowest < 0 or highest > limit:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"{argument} contain {wrong}: must lie in 0..{limit}")
    return array
