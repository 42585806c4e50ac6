"""Batches that are read and placed in other threads while the current step runs."""

import concurrent.futures
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from lpa_jax import checks

Placed = TypeVar("Placed")


class BatchesByStep(Protocol):
    """Batches as a pure function of the step."""

    def __getitem__(self, step: int) -> Any: ...


class Prefetched(Generic[Placed]):
    """The same batches by step; those after the last one asked for are prepared in other threads.

    Formal guarantees: `prefetched[step]` is `place(batches[step])` whatever was asked before, so it
    stays a pure function of the step and resuming stays a number. An error is raised where its own
    batch is asked for, never earlier. Asked for out of order, preparation starts again there.

    Args:
      batches: Batches by step.
      place: What is done with a batch beforehand: `MappedStep.place` sends it to the devices.
      depth: How many batches to be ahead; each takes its memory.
      threads: How many batches are prepared at the same time; with more than one, `batches` and
        `place` must allow that.

    Raises:
      ValueError: `depth` or `threads` is less than 1.

    Example:
      >>> with Prefetched([10, 20, 30], lambda batch: batch + 1) as ahead:
      ...     [ahead[step] for step in range(3)]
      [11, 21, 31]
    """

    def __init__(
        self,
        batches: BatchesByStep,
        place: Callable[[Any], Placed] = lambda batch: batch,
        depth: int = 1,
        threads: int = 1,
    ) -> None:
        self._batches, self._place = batches, place
        self._depth = checks.integer("depth", depth, minimum=1)
        threads = checks.integer("threads", threads, minimum=1)
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, "prefetch")
        self._coming: dict[int, concurrent.futures.Future[Placed]] = {}

    def __enter__(self) -> "Prefetched[Placed]":
        return self

    def __exit__(self, *exception) -> None:
        self._pool.shutdown(cancel_futures=True)

    @property
    def steps_per_epoch(self) -> int:
        """That of the batches."""
        return self._batches.steps_per_epoch

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, step: int) -> Placed:
        step = checks.integer("step", step, minimum=0)
        wanted = range(step, step + 1 + self._depth)
        for other in set(self._coming).difference(wanted):
            self._coming.pop(other).cancel()
        for number in wanted:
            if number not in self._coming:
                self._coming[number] = self._pool.submit(self._make, number)
        return self._coming.pop(step).result()

    def _make(self, step: int) -> Placed:
        return self._place(self._batches[step])


def read_ahead(batches: BatchesByStep, *, ahead: int = 4, threads: int = 2) -> Prefetched[Any]:
    """The same batches, read in threads before they are asked for.

    Worth its threads where images are decoded (`ImageFiles` decodes each batch in threads of its
    own), not for sets in memory.

    Args:
      batches: From `batches`, `domain_batches` or `evaluation_batches`.
      ahead: Batches that wait in memory.
      threads: Batches that are read at the same time.

    Raises:
      ValueError: `ahead` or `threads` is not a positive integer.

    Example:
      >>> import numpy as np
      >>> from lpa_jax import data
      >>> images = np.zeros((5, 2, 2, 1), np.uint8)
      >>> toy = data.Dataset("toy", images, np.arange(5), num_classes=5)
      >>> train = read_ahead(data.batches(toy, seed=0, batch_size=2))
      >>> [train[step]["label"].tolist() for step in (0, 1)]
      [[3, 2], [4, 1]]
    """
    return Prefetched(batches, depth=checks.integer("ahead", ahead, minimum=1), threads=threads)
