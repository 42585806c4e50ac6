"""Prefetching: the next batch is read and sent to the devices while the current step runs."""

import concurrent.futures
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from lpa_jax import checks

Placed = TypeVar("Placed")


class BatchesByStep(Protocol):
    """Batches as a pure function of the step."""

    def __getitem__(self, step: int) -> Any: ...


class Prefetched(Generic[Placed]):
    """The same batches by step, with the ones after the last one asked for on their way.

    Formal guarantees: `prefetched[step]` is `place(batches[step])` whatever was asked before, so it
    stays a pure function of the step and resuming stays a number; an error is raised where its own
    batch is asked for, never earlier. `batches` and `place` are called from one other thread.

    Args:
      batches: batches by step.
      place: what is done with a batch beforehand: `MappedStep.place` sends it to the devices.
      depth: how many batches to be ahead; each takes its memory on the devices.

    Raises:
      ValueError: `depth` is less than 1.

    >>> with Prefetched([10, 20, 30], lambda batch: batch + 1) as ahead:
    ...     [ahead[step] for step in range(3)]
    [11, 21, 31]
    """

    def __init__(
        self, batches: BatchesByStep, place: Callable[[Any], Placed], depth: int = 1
    ) -> None:
        self._batches, self._place = batches, place
        self._depth = checks.integer("depth", depth, minimum=1)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "prefetch")
        self._coming: dict[int, concurrent.futures.Future[Placed]] = {}

    def __enter__(self) -> "Prefetched[Placed]":
        return self

    def __exit__(self, *exception) -> None:
        self._thread.shutdown(cancel_futures=True)

    @property
    def steps_per_epoch(self) -> int:
        """That of the batches."""
        return self._batches.steps_per_epoch

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, step: int) -> Placed:
        wanted = range(step, step + 1 + self._depth)
        for other in set(self._coming).difference(wanted):
            self._coming.pop(other).cancel()
        for number in wanted:
            if number not in self._coming:
                self._coming[number] = self._thread.submit(self._make, number)
        return self._coming.pop(step).result()

    def _make(self, step: int) -> Placed:
        return self._place(self._batches[step])
