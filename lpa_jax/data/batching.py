"""Batches as a pure function of (seed, step): no iterator state, so resuming is a number.

The epochs of a seed, each a permutation of the examples, follow one another in an endless
stream of positions; batch s is positions s*B .. (s+1)*B - 1. So every example occurs exactly once
in every epoch, all batches have the same size, and where B does not divide N a batch holds the end
of one epoch and the start of the next. Nothing is dropped and nothing is padded.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lpa_jax import checks
from lpa_jax.data import optional
from lpa_jax.data.dataset import Dataset
from lpa_jax.data.example_stream import ExampleStream

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]
# len(source) examples, source[i] = {"image": [H, W, ch], "label": integer}
Examples = Dataset | Sequence[Mapping[str, Any]]

# grain wants a length: examples far beyond any run
_ENDLESS = 2**62


def take(source: Examples, indices: np.ndarray) -> Batch:
    """The examples at `indices` as {"image": [M, H, W, ch], "label": int32 [M]}.

    Args:
      source: A data set in memory, or one that reads an example when it is asked for it.
      indices: Integers [M].

    Raises:
      ValueError: An example that cannot be read, or images of several shapes.

    Example:
      >>> data = Dataset("toy", np.zeros((5, 2, 2, 1), np.uint8), np.arange(5), num_classes=5)
      >>> take(data, np.array([3, 1]))["label"]
      array([3, 1], dtype=int32)
    """
    if isinstance(source, Dataset):
        return {"image": source.images[indices], "label": source.labels[indices]}
    if hasattr(source, "__getitems__"):  # several at once are read faster
        return _stacked(source.__getitems__(indices.tolist()))
    return _stacked([source[index] for index in indices.tolist()])


def take_at(source: Examples, stream: ExampleStream, start: int, count: int) -> Batch:
    """The training examples at positions start .. start + count - 1 of a stream.

    As `take`, but files that are to be cropped at random are: the position draws the box.
    """
    indices = stream.indices(start, count)
    if getattr(source, "random_crop", None) is None:
        return take(source, indices)
    return _stacked(source.read(indices.tolist(), stream.crop_draws(start, count)))


def check_source(name: str, source: Any) -> Any:
    """The source of examples, if it can be read by number; raises ValueError."""
    sized = hasattr(source, "__len__") and hasattr(source, "__getitem__")
    listed = sized and not isinstance(source, Mapping | np.ndarray | str)
    fits = listed or isinstance(source, Dataset)
    checks.require_kind(fits, name, "a Dataset or a sequence of examples", source)
    return source


def _stacked(examples: Sequence[Mapping[str, Any]]) -> Batch:
    for example in examples:
        checks.instance("an example", example, Mapping, "a dictionary with image and label")
    shapes = sorted({np.shape(example["image"]) for example in examples})
    if len(shapes) > 1:
        raise ValueError(f"images must have one shape, got {shapes[0]} and {shapes[1]}")
    return {
        "image": np.stack([example["image"] for example in examples]),
        "label": np.array([example["label"] for example in examples], np.int32),
    }


class Batches:
    """Training batches by step; made by `batches`."""

    def __init__(
        self, dataset: Examples, stream: ExampleStream, batch_size: int, host_slice: tuple[int, int]
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
        """This host's batch as indices into the data set, int64 [B / hosts].

        Raises:
          ValueError: `step` is not a non-negative integer.
        """
        return self._stream.indices(self._start(step), len(self._positions))

    def __getitem__(self, step: int) -> Batch:
        examples = take_at(self._dataset, self._stream, self._start(step), len(self._positions))
        return examples | {"position": self._positions.copy()}

    def _start(self, step: int) -> int:
        start = checks.integer("step", step, minimum=0) * self._batch_size
        return start + int(self._positions[0])


def shared_evenly(host_slice: tuple[int, int], batch_size: int) -> tuple[int, int]:
    """The host slice, if its hosts can share a batch evenly.

    Raises:
      ValueError: An index outside 0..process_count-1, or a batch that cannot be shared evenly.

    Example:
      >>> shared_evenly((1, 2), batch_size=8)
      (1, 2)
    """
    pair = isinstance(host_slice, tuple) and len(host_slice) == 2
    checks.require(pair, "host_slice", "(process_index, process_count)", host_slice)
    count = checks.integer("host_slice[1]", host_slice[1], minimum=1)
    index = checks.integer("host_slice[0]", host_slice[0], minimum=0, maximum=count - 1)
    if batch_size % count:
        raise ValueError(f"batch_size must be a multiple of the {count} hosts, got {batch_size}")
    return index, count


def _host_positions(batch_size: int, host_slice: tuple[int, int]) -> np.ndarray:
    index, count = shared_evenly(host_slice, batch_size)
    size = batch_size // count
    return np.arange(index * size, (index + 1) * size, dtype=np.int32)


def batches(
    dataset: Examples,
    seed: int,
    batch_size: int,
    *,
    shuffle: bool = True,
    class_balanced: bool = False,
    host_slice: tuple[int, int] = (0, 1),
) -> Batches:
    """The training batches of a data set: `batches(...)[step]`, step = 0, 1, ...

    Formal guarantees: the same (data set, seed, batch_size, step) gives the same batch in any order
    of asking, on any machine; every example occurs exactly once in each epoch of N positions; the
    slices of all hosts, concatenated, are the batch of a single host.

    class_balanced (for long-tailed sets): an epoch is N draws in which each class that is present
    occurs floor(N/C) or ceil(N/C) times; a large class is subsampled without replacement, anew each
    epoch, and the examples of a small class repeat equally often (differing by at most 1).

    Args:
      dataset: N labelled images, in memory or read as they are asked for (`read_ahead` hides the
        time that this takes).
      seed: A non-negative integer.
      batch_size: B, the size of the global batch; it may exceed N.
      shuffle: False walks through the set in its own order.
      class_balanced: Whether to resample the classes equally; needs `dataset.labels`.
      host_slice: (process_index, process_count); this host gets its contiguous part of each batch.

    Returns:
      `Batches`: indexable by step, endless. A batch is {"image": [B, H, W, ch] as stored, "label":
      int32 [B], "position": int32 [B], the place in the global batch, which keys augmentation}.

    Raises:
      ValueError: A value out of range, hosts that cannot share the batch evenly, or class_balanced
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
    check_source("dataset", dataset)
    labels = getattr(dataset, "labels", None) if class_balanced else None
    known = not class_balanced or labels is not None
    checks.require(known, "class_balanced", "False for a data set without labels", class_balanced)
    stream = ExampleStream(len(dataset), seed, shuffle=shuffle, balanced_labels=labels)
    return Batches(dataset, stream, batch_size, host_slice)


class EvaluationBatches(Sequence):
    """Evaluation batches by number; made by `evaluation_batches`."""

    def __init__(self, dataset: Examples, batch_size: int, host_slice: tuple[int, int]):
        self._dataset = dataset
        self._batch_size = batch_size
        self._positions = _host_positions(batch_size, host_slice)

    def __len__(self) -> int:
        return -(-len(self._dataset) // self._batch_size)

    def __getitem__(self, number: int) -> Batch:
        number = checks.integer("number", number, minimum=0)
        if number >= len(self):
            raise IndexError(f"number must be below {len(self)}, got {number}")
        indices = number * self._batch_size + self._positions.astype(np.int64)
        real = indices < len(self._dataset)
        # padding repeats a real example: always a valid label and finite activations
        indices = np.where(real, indices, 0)
        return take(self._dataset, indices) | {"mask": real.astype(np.float32)}


def evaluation_batches(
    dataset: Examples, batch_size: int, *, host_slice: tuple[int, int] = (0, 1)
) -> EvaluationBatches:
    """The batches that show each example exactly once, the last padded to the full size.

    The mask sums to N over all batches (and hosts): multiply by it whatever is summed.

    Args:
      dataset: N labelled images, in memory or read as they are asked for.
      batch_size: B, the size of the global batch.
      host_slice: (process_index, process_count); this host gets its contiguous part of each batch.

    Returns:
      A sequence of ceil(N / B) batches {"image": [B, H, W, ch] as stored, "label": int32 [B],
      "mask": float32 [B], 1 for an example and 0 for padding}.

    Raises:
      ValueError: A value out of range, or hosts that cannot share the batch evenly.

    Example:
      >>> data = Dataset("toy", np.zeros((5, 2, 2, 1), np.uint8), np.arange(5), num_classes=5)
      >>> [batch["mask"].tolist() for batch in evaluation_batches(data, batch_size=3)]
      [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]
    """
    batch_size = checks.integer("batch_size", batch_size, minimum=1)
    return EvaluationBatches(check_source("dataset", dataset), batch_size, host_slice)


def grain_batches(
    source: Sequence[Mapping[str, Any]],
    seed: int,
    batch_size: int,
    *,
    shuffle: bool = True,
    host_slice: tuple[int, int] = (0, 1),
    transform: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> "grain.MapDataset":
    """The batches of a random-access source, read as they are asked for.

    The same guarantees as `batches`, and the same examples in the same order: with the same seed,
    sizes and data, `grain_batches(source, ...)[step]` equals `batches(dataset, ...)[step]`. To read
    ahead in threads from any step: `grain_batches(...)[step:].to_iter_dataset()`.

    Args:
      source: len(source) examples, source[i] = {"image": [H, W, ch], "label": integer}; for example
        `open_source(name, split)`.
      seed: As in `batches`, like `batch_size`, `shuffle` and `host_slice`.
      batch_size: B, the size of the global batch.
      shuffle: False walks through the source in its own order.
      host_slice: (process_index, process_count).
      transform: Changes an example after reading, for example to bring all images to one shape.

    Returns:
      A `grain.MapDataset` of batches as in `batches`.

    Raises:
      ValueError: A value out of range, an empty source, or hosts that cannot share the batch
        evenly.

    Example:
      >>> source = [{"image": np.full((2, 2, 1), i, np.uint8), "label": i} for i in range(5)]
      >>> grain_batches(source, seed=0, batch_size=2)[2]["label"]
      array([0, 2], dtype=int32)
    """
    grain = optional.package("grain")  # a second of import that sets in memory do without
    if transform is not None:
        source = _Transformed(source, transform)
    by_step = batches(source, seed, batch_size, shuffle=shuffle, host_slice=host_slice)
    return grain.MapDataset.range(_ENDLESS // batch_size).map(by_step.__getitem__)


class _Transformed:
    """A source whose examples are changed after reading."""

    def __init__(self, source: Examples, transform: Callable[[Mapping[str, Any]], Any]):
        self._source, self._transform = source, transform
        self.random_crop = getattr(source, "random_crop", None)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self._transform(self._source[index])

    def read(self, indices: Sequence[int], draws: Sequence[Any]) -> list[Mapping[str, Any]]:
        return [self._transform(example) for example in self._source.read(indices, draws)]
