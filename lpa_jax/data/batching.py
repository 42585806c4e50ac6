"""Batches as a pure function of (seed, step): no iterator state, so resuming is a number.

The epochs of a seed, each a permutation of the examples, stand one after the other in an endless
stream of positions; batch s is positions s*B .. (s+1)*B - 1. So every example occurs exactly once
in every epoch, all batches have the same size, and where B does not divide N a batch holds the end
of one epoch and the start of the next. Nothing is dropped and nothing is padded.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lpa_jax.data import checks, random_order
from lpa_jax.data.dataset import Dataset

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]

# grain wants a length: positions of the endless stream, far beyond any run
_ENDLESS = 2**62


class _ExampleStream:
    """The endless stream of example indices: a pure function of position, caching recent epochs."""

    def __init__(self, size: int, seed: int, shuffle: bool, balanced_labels: np.ndarray | None):
        self._size = checks.integer("number of examples", size, minimum=1)
        self._seed = checks.integer("seed", seed, minimum=0)
        self._shuffle = shuffle
        self._labels = balanced_labels
        if balanced_labels is not None and not shuffle:
            raise ValueError("shuffle=False: must be True with class_balanced=True")
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
            return _balanced_epoch(self._labels, self._seed, epoch)
        return random_order.permutation(self._size, self._seed, random_order.EPOCH, epoch)


def _balanced_epoch(labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """N draws in which classes occur equally often, and so do the members of a class (within 1)."""
    size = len(labels)

    def permutation(length, purpose):
        return random_order.permutation(length, seed, purpose, epoch)

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


class Batches:
    """Training batches by step; made by `batches`."""

    def __init__(
        self,
        dataset: Dataset,
        stream: _ExampleStream,
        batch_size: int,
        host_slice: tuple[int, int],
    ):
        self._dataset = dataset
        self._stream = stream
        self._batch_size = batch_size
        self._positions = _host_positions(batch_size, host_slice)

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every example has been seen: ceil(N / B)."""
        return -(-len(self._dataset) // self._batch_size)

    def indices(self, step: int) -> np.ndarray:
        """Returns this host's batch as indices into the data set, int64 [B / hosts].

        Raises:
          ValueError: step is not a non-negative integer.
        """
        start = checks.integer("step", step, minimum=0) * self._batch_size
        return self._stream.indices(start + int(self._positions[0]), len(self._positions))

    def __getitem__(self, step: int) -> Batch:
        indices = self.indices(step)
        return {
            "image": self._dataset.images[indices],
            "label": self._dataset.labels[indices],
            "position": self._positions.copy(),
        }


def _host_positions(batch_size: int, host_slice: tuple[int, int]) -> np.ndarray:
    index, count = checks.host_slice(host_slice, batch_size)
    size = batch_size // count
    return np.arange(index * size, (index + 1) * size, dtype=np.int32)


def batches(
    dataset: Dataset,
    seed: int,
    batch_size: int,
    *,
    shuffle: bool = True,
    class_balanced: bool = False,
    host_slice: tuple[int, int] = (0, 1),
) -> Batches:
    """Returns the training batches of a data set in memory: `batches(...)[step]`, step = 0, 1, ...

    Formal guarantees: the same (data set, seed, batch_size, step) gives the same batch in any order
    of asking, on any machine; every example occurs exactly once in each epoch of N positions; the
    slices of all hosts, concatenated, are the batch of a single host.

    class_balanced (for long-tailed sets): an epoch is N draws in which each class that is present
    occurs floor(N/C) or ceil(N/C) times; a large class is subsampled without replacement, anew each
    epoch, and the examples of a small class repeat equally often (differing by at most 1).

    Args:
      dataset: N labelled images.
      seed: a non-negative integer.
      batch_size: B, the size of the global batch; it may exceed N.
      shuffle: False walks through the set in its own order.
      class_balanced: whether to resample the classes equally.
      host_slice: (process_index, process_count); this host gets its contiguous part of each batch.

    Returns:
      `Batches`: indexable by step, endless. A batch is {"image": [B, H, W, ch] as stored, "label":
      int32 [B], "position": int32 [B], the place in the global batch, which keys augmentation}.

    Raises:
      ValueError: a value out of range, hosts that cannot share the batch evenly, or class_balanced
        without shuffle.

    Example:
      >>> data = Dataset("toy", np.zeros((5, 2, 2, 1), np.uint8), np.arange(5), num_classes=5)
      >>> train = batches(data, seed=0, batch_size=2)
      >>> [train[step]["label"].tolist() for step in range(3)]
      [[3, 2], [4, 1], [0, 2]]
      >>> train.steps_per_epoch
      3

    References:
      Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020
      (class-balanced sampling).
    """
    batch_size = checks.integer("batch_size", batch_size, minimum=1)
    labels = dataset.labels if class_balanced else None
    stream = _ExampleStream(len(dataset), seed, shuffle, labels)
    return Batches(dataset, stream, batch_size, host_slice)


class EvaluationBatches(Sequence):
    """Evaluation batches by number; made by `evaluation_batches`."""

    def __init__(self, dataset: Dataset, batch_size: int, host_slice: tuple[int, int]):
        self._dataset = dataset
        self._batch_size = batch_size
        self._positions = _host_positions(batch_size, host_slice)

    def __len__(self) -> int:
        return -(-len(self._dataset) // self._batch_size)

    def __getitem__(self, number: int) -> Batch:
        number = checks.integer("number", number, minimum=0)
        if number >= len(self):
            raise IndexError(f"number={number}: there are {len(self)} evaluation batches")
        indices = number * self._batch_size + self._positions.astype(np.int64)
        real = indices < len(self._dataset)
        # padding repeats a real example: always a valid label and finite activations
        indices = np.where(real, indices, 0)
        return {
            "image": self._dataset.images[indices],
            "label": self._dataset.labels[indices],
            "mask": real.astype(np.float32),
        }


def evaluation_batches(
    dataset: Dataset, batch_size: int, *, host_slice: tuple[int, int] = (0, 1)
) -> EvaluationBatches:
    """Returns the batches that show each example exactly once, the last padded to the full size.

    The mask sums to N over all batches (and hosts): multiply by it whatever is summed.

    Args:
      dataset: N labelled images.
      batch_size: B, the size of the global batch.
      host_slice: (process_index, process_count); this host gets its contiguous part of each batch.

    Returns:
      A sequence of ceil(N / B) batches {"image": [B, H, W, ch] as stored, "label": int32 [B],
      "mask": float32 [B], 1 for an example and 0 for padding}.

    Raises:
      ValueError: a value out of range, or hosts that cannot share the batch evenly.

    Example:
      >>> data = Dataset("toy", np.zeros((5, 2, 2, 1), np.uint8), np.arange(5), num_classes=5)
      >>> [batch["mask"].tolist() for batch in evaluation_batches(data, batch_size=3)]
      [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]
    """
    batch_size = checks.integer("batch_size", batch_size, minimum=1)
    return EvaluationBatches(dataset, batch_size, host_slice)


def grain_batches(
    source: Sequence[Mapping[str, Any]],
    seed: int,
    batch_size: int,
    *,
    shuffle: bool = True,
    host_slice: tuple[int, int] = (0, 1),
    transform: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> "grain.MapDataset":
    """Returns the batches of a random-access source, read as they are asked for.

    The same guarantees as `batches`, and the same examples in the same order: with the same seed,
    sizes and data, `grain_batches(source, ...)[step]` equals `batches(dataset, ...)[step]`. To read
    ahead in threads from any step: `grain_batches(...)[step:].to_iter_dataset()`.

    Args:
      source: len(source) examples, source[i] = {"image": [H, W, ch], "label": integer}; for example
        `open_source(name, split)`.
      seed: a non-negative integer.
      batch_size: B, the size of the global batch.
      shuffle: False walks through the source in its own order.
      host_slice: (process_index, process_count); this host gets its contiguous part of each batch.
      transform: changes an example after reading, for example to bring all images to one shape.

    Returns:
      A `grain.MapDataset` of batches as in `batches`.

    Raises:
      ValueError: a value out of range, an empty source, or hosts that cannot share the batch
        evenly.

    Example:
      >>> source = [{"image": np.full((2, 2, 1), i, np.uint8), "label": i} for i in range(5)]
      >>> grain_batches(source, seed=0, batch_size=2)[2]["label"]
      array([0, 2], dtype=int32)
    """
    import grain  # a second of import that sets in memory do without

    batch_size = checks.integer("batch_size", batch_size, minimum=1)
    positions = _host_positions(batch_size, host_slice)
    stream = _ExampleStream(len(source), seed, shuffle, balanced_labels=None)

    def read(local_position: int) -> dict[str, np.ndarray]:
        step, offset = divmod(local_position, len(positions))
        index = stream.indices(step * batch_size + int(positions[offset]), 1)[0]
        example = source[int(index)]
        example = example if transform is None else transform(example)
        return {
            "image": np.asarray(example["image"]),
            "label": np.int32(example["label"]),
            "position": positions[offset],
        }

    endless = grain.MapDataset.range(_ENDLESS // batch_size * len(positions))
    return endless.map(read).batch(len(positions))
