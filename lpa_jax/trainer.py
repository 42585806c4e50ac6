"""The training loop: step, watch, evaluate, report, stop. It neither prints nor writes files."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lpa_jax import metrics
from lpa_jax.step import TrainState

Batch = Mapping[str, np.ndarray]
Step = Callable[[TrainState, Batch], tuple[TrainState, Mapping[str, metrics.Pair]]]


class TrainBatches(Protocol):
    """Batches as a pure function of the step."""

    steps_per_epoch: int

    def __getitem__(self, step: int) -> Batch: ...


class EpochRecord(NamedTuple):
    """What is known after an epoch.

    Attributes:
      epoch: epochs completed, from 1.
      step: steps completed.
      train: training metrics averaged over the epoch, under perturbation.
      evaluation: results of `evaluate`, or None in epochs without one.
      seconds: wall time of the epoch's steps, compilation included.
      examples_per_second: training throughput of the epoch.
    """

    epoch: int
    step: int
    train: Mapping[str, float]
    evaluation: Mapping[str, Any] | None
    seconds: float
    examples_per_second: float


class NonFiniteLossError(RuntimeError):
    """The training loss became NaN or infinite; the message names the step."""


def train(
    state: TrainState,
    stages: Sequence[tuple[int, Step]],
    batches: TrainBatches,
    epochs: int,
    *,
    evaluate: Callable[[TrainState], Mapping[str, Any]] | None = None,
    evaluate_every: int = 1,
    should_stop: Callable[[], bool] = lambda: False,
    block_every_step: bool = False,
) -> Iterator[tuple[TrainState, EpochRecord]]:
    """Trains epoch by epoch, yielding the state and a record after each.

    The host never waits for a step within an epoch: metrics stay on the device until the epoch
    ends, and only then is the loss of every step checked.

    Args:
      state: where to start; `state.step` says which batch comes next, so resuming needs no more.
      stages: (first epoch, step) pairs in ascending order, the first at 0: with two, the loss or
        the perturbations change during training (deferred re-weighting).
      batches: training batches by step.
      epochs: total number of epochs, those before `state.step` included.
      evaluate: state -> metrics, called every `evaluate_every` epochs and after the last.
      evaluate_every: epochs between evaluations, >= 1.
      should_stop: asked after every epoch; True ends the iteration there.
      block_every_step: wait for each step, which several CPU devices of one process need.

    Raises:
      ValueError: stages that do not start at epoch 0 or do not ascend.
      NonFiniteLossError: naming the first step whose loss is NaN or infinite.
    """
    firsts = [first for first, _ in stages]
    if not firsts or firsts[0] != 0 or firsts != sorted(set(firsts)):
        raise ValueError(f"stages must start at epoch 0 and ascend, got {firsts}")
    steps_per_epoch = batches.steps_per_epoch
    first_epoch = int(state.step) // steps_per_epoch
    for epoch in range(first_epoch, epochs):
        step_fn = next(fn for first, fn in reversed(stages) if first <= epoch)
        started = time.perf_counter()
        total, losses, examples = None, [], 0
        first_step = int(state.step)
        for step in range(first_step, (epoch + 1) * steps_per_epoch):
            batch = batches[step]
            state, pairs = step_fn(state, batch)
            if block_every_step:
                jax.block_until_ready(pairs)
            losses.append(pairs["loss"])
            total = pairs if total is None else metrics.add(total, pairs)
            examples += len(batch["label"])
        check_finite(losses, first_step)
        seconds = time.perf_counter() - started
        last = epoch + 1 == epochs
        evaluation = None
        if evaluate is not None and (last or (epoch + 1) % evaluate_every == 0):
            evaluation = evaluate(state)
        yield (
            state,
            EpochRecord(
                epoch=epoch + 1,
                step=(epoch + 1) * steps_per_epoch,
                train=metrics.compute(total),
                evaluation=evaluation,
                seconds=seconds,
                examples_per_second=examples / seconds,
            ),
        )
        if should_stop():
            return


def check_finite(losses: Sequence[metrics.Pair], first_step: int) -> None:
    """Raises NonFiniteLossError, naming the step, unless every loss is finite.

    >>> check_finite([(1.0, 2.0), (float("nan"), 2.0)], first_step=7)
    Traceback (most recent call last):
        ...
    lpa_jax.trainer.NonFiniteLossError: the training loss is nan at step 8
    """
    sums = np.asarray(jax.device_get(jnp.stack([jnp.asarray(total) for total, _ in losses])))
    for offset in np.flatnonzero(~np.isfinite(sums)):
        value = "nan" if math.isnan(sums[offset]) else "infinite"
        raise NonFiniteLossError(f"the training loss is {value} at step {first_step + offset}")


def evaluate_batches(
    eval_fn: Callable[[TrainState, Batch], Mapping[str, metrics.Pair]],
    state: TrainState,
    batches: Sequence[Batch],
) -> dict[str, Any]:
    """Averages an evaluation step over all batches, each example counted once.

    Returns:
      Metrics by name: floats, and arrays for per-class metrics.
    """
    total = None
    for number in range(len(batches)):
        pairs = eval_fn(state, batches[number])
        total = pairs if total is None else metrics.add(total, pairs)
    return metrics.compute(total)
