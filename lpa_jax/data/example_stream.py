"""The endless stream of example indices that batches are cut from."""

from collections.abc import Mapping

import numpy as np

from lpa_jax import checks
from lpa_jax.data import random_order
from lpa_jax.data.augment.resized_crop import DRAWS


class ExampleStream:
    """Epoch after epoch of example indices, a pure function of the position.

    Every epoch is a permutation of 0..N-1, or N draws with classes equally often.

    Args:
      size: Number of examples, N.
      seed: A non-negative integer.
      shuffle: False repeats 0..N-1.
      balanced_labels: int [N] to draw classes equally often; None for permutations.
      key: Non-negative integers that tell streams of one seed apart.

    Raises:
      ValueError: A value out of range, or balanced_labels without shuffle.

    Example:
      >>> ExampleStream(3, seed=0).indices(start=1, count=5)
      array([1, 0, 2, 1, 0])
    """

    def __init__(
        self,
        size: int,
        seed: int,
        *,
        shuffle: bool = True,
        balanced_labels: np.ndarray | None = None,
        key: tuple[int, ...] = (),
    ):
        self._size = checks.integer("number of examples", size, minimum=1)
        self._seed = checks.integer("seed", seed, minimum=0)
        self._shuffle = shuffle
        self._labels = balanced_labels
        self._key = key
        if balanced_labels is not None and not shuffle:
            raise ValueError("shuffle must be True with class_balanced=True, got False")
        # two epochs, because a batch may straddle them; replaced whole, never changed, so that
        # threads of a prefetcher may share the stream
        self._recent: Mapping[int, np.ndarray] = {}

    def indices(self, start: int, count: int) -> np.ndarray:
        """Example indices at positions start .. start + count - 1, int64 [count]."""
        parts = []
        stop = start + count
        while start < stop:
            epoch, offset = divmod(start, self._size)
            part = self._epoch(epoch)[offset : offset + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts)

    def crop_draws(self, start: int, count: int) -> np.ndarray:
        """Numbers from [0, 1) that crop the files at these positions, float64 [count, DRAWS]."""
        return np.stack(
            [
                random_order.uniforms(DRAWS, self._seed, random_order.FILE_CROP, place, *self._key)
                for place in range(start, start + count)
            ]
        )

    def _epoch(self, epoch: int) -> np.ndarray:
        order = self._recent.get(epoch)
        if order is None:
            order = self._compute_epoch(epoch)
            kept = list(self._recent.items())[-1:]
            self._recent = dict([*kept, (epoch, order)])
        return order

    def _compute_epoch(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(self._size)
        if self._labels is not None:
            return _balanced_epoch(self._labels, self._seed, (epoch, *self._key))
        return random_order.permutation(
            self._size, self._seed, random_order.EPOCH, epoch, *self._key
        )


def _balanced_epoch(labels: np.ndarray, seed: int, stream: tuple[int, ...]) -> np.ndarray:
    """N draws in which classes occur equally often, and so do the members of a class (within 1)."""
    size = len(labels)

    def permutation(length, purpose):
        return random_order.permutation(length, seed, purpose, *stream)

    classes, counts = np.unique(labels, return_counts=True)
    share, left_over = divmod(size, len(classes))
    quotas = np.full(len(classes), share)
    quotas[permutation(len(classes), random_order.BALANCED_CLASSES)[:left_over]] += 1
    # all examples grouped by class, in random order within each
    members = permutation(size, random_order.BALANCED_MEMBERS)
    members = members[np.argsort(labels[members], kind="stable")]
    first_member = np.cumsum(counts) - counts
    first_draw = np.cumsum(quotas) - quotas
    of_class = np.repeat(np.arange(len(classes)), quotas)
    turn = np.arange(size) - first_draw[of_class]
    draws = members[first_member[of_class] + turn % counts[of_class]]
    return draws[permutation(size, random_order.BALANCED_ORDER)]
