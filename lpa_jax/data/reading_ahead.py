"""Batches read in threads while the device computes, still asked for by step."""

from collections.abc import Iterator

from lpa_jax import checks
from lpa_jax.data import optional
from lpa_jax.data.batching import Batch, Batches, EvaluationBatches
from lpa_jax.data.domain_batching import DomainBatches

# grain wants a length: steps far beyond any run
_ENDLESS = 2**40

Numbered = Batches | DomainBatches | EvaluationBatches


class ReadAhead:
    """The same batches by step, the next ones being read already; made by `read_ahead`."""

    def __init__(self, batches: Numbered, ahead: int, threads: int):
        self._batches = batches
        self._ahead = checks.integer("ahead", ahead, minimum=1)
        self._threads = checks.integer("threads", threads, minimum=1)
        self._next = 0
        self._upcoming: Iterator[Batch] = iter(())

    @property
    def steps_per_epoch(self) -> int:
        """That of the batches."""
        return self._batches.steps_per_epoch

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, step: int) -> Batch:
        step = checks.integer("step", step, minimum=0)
        batch = next(self._upcoming, None) if step == self._next else None
        if batch is None:
            self._upcoming = self._read_from(step)
            # Beyond the last batch there is nothing to read: the batches say so themselves.
            batch = next(self._upcoming, None) or self._batches[step]
        self._next = step + 1
        return batch

    def _read_from(self, step: int) -> Iterator[Batch]:
        grain = optional.package("grain")  # a second of import that sets in memory do without

        last = len(self._batches) if isinstance(self._batches, EvaluationBatches) else _ENDLESS
        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=self._ahead)
        steps = grain.MapDataset.range(min(step, last), last)
        return iter(steps.map(self._batches.__getitem__).to_iter_dataset(options))


def read_ahead(batches: Numbered, *, ahead: int = 4, threads: int = 2) -> ReadAhead:
    """Returns the same batches, read in threads before they are asked for.

    Still a pure function of the step: asked for in order, they are ready; asked for out of order,
    reading starts anew there. Worth its threads where images are decoded (`ImageFiles`, which
    decodes each batch in threads of its own), not for sets in memory.

    Args:
      batches: of `batches`, `domain_batches` or `evaluation_batches`.
      ahead: batches that wait in memory.
      threads: batches that are read at the same time.

    Raises:
      ValueError: ahead or threads is not a positive integer. Errors of reading a batch come when it
        is asked for, unchanged.

    Example:
      >>> import numpy as np
      >>> from lpa_jax import data
      >>> images = np.zeros((5, 2, 2, 1), np.uint8)
      >>> toy = data.Dataset("toy", images, np.arange(5), num_classes=5)
      >>> train = read_ahead(data.batches(toy, seed=0, batch_size=2))
      >>> [train[step]["label"].tolist() for step in (0, 1)]
      [[3, 2], [4, 1]]
    """
    return ReadAhead(batches, ahead, threads)
