"""The training loop: step, evaluate, record, stop. It neither prints nor writes files."""

import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lpa_jax import checks, metrics
from lpa_jax.training.step import TrainState

Batch = Mapping[str, np.ndarray]
Totals = Mapping[str, metrics.Pair]
Step = Callable[[TrainState, Batch], tuple[TrainState, Mapping[str, metrics.Pair]]]


class TrainBatches(Protocol):
    """Batches as a pure function of the step."""

    steps_per_epoch: int

    def __getitem__(self, step: int) -> Batch: ...


class EpochRecord(NamedTuple):
    """Results of one epoch.

    Attributes:
      epoch: Epochs completed, from 1.
      step: Steps completed.
      train: Training metrics averaged over the epoch, under perturbation.
      evaluation: Results of `evaluate`, or None in epochs without one.
      seconds: Wall time of the epoch's steps, compilation included.
      examples_per_second: Training throughput of the epoch.
    """

    epoch: int
    step: int
    train: Mapping[str, float]
    evaluation: Mapping[str, Any] | None
    seconds: float
    examples_per_second: float


class NonFiniteLossError(RuntimeError):
    """The loss, its gradient or the parameters became NaN or infinite; names the step."""


def train(
    state: TrainState,
    stages: Sequence[tuple[int, Step]],
    batches: TrainBatches,
    epochs: int,
    *,
    evaluate: Callable[[TrainState], Mapping[str, Any] | None] | None = None,
    evaluate_every: int = 1,
    totals: Totals | None = None,
    save: Callable[[TrainState, Totals], None] = lambda state, totals: None,
    should_save: Callable[[int], bool] = lambda step: False,
    should_stop: Callable[[], bool] = lambda: False,
    watch: Callable[[int, Totals], None] = lambda done, totals: None,
    block_every_step: bool = False,
) -> Iterator[tuple[TrainState, EpochRecord]]:
    """Trains epoch by epoch and yields the state and a record after each.

    Within an epoch the host does not wait for a step, unless it saves: metrics stay on the device,
    and the loss of every step is checked at the end of the epoch or before a save.

    Formal guarantee: started from the (state, totals) of any call of `save`, `train` yields what
    the first run yields from there on, bit for bit (except for times). After a save at the last
    step of an epoch, it starts with that epoch's evaluation and record.

    Args:
      state: Where to start; `state.step` is the number of the next batch.
      stages: (first epoch, step) pairs in ascending order, the first at 0: with two, the loss or
        the perturbations change during training (deferred re-weighting).
      batches: Training batches by step.
      epochs: Total number of epochs, including those before `state.step`.
      evaluate: State -> metrics, called every `evaluate_every` epochs and after the last. It
        returns None if it was asked to stop.
      evaluate_every: Epochs between evaluations, >= 1.
      totals: Sums of the training metrics since the epoch began, as given to `save`.
      save: Called with a state whose steps were all finite, and its totals.
      should_save: Called after every step with the number of completed steps.
      should_stop: Called after every step; True saves and ends the iteration.
      watch: Called after every step except an epoch's last, with the number of steps sent to the
        devices and the totals of the epoch. These may still be computed: reading them waits.
      block_every_step: Wait for each step, which several CPU devices of one process need.

    Raises:
      ValueError: Stages do not start at epoch 0 or do not ascend.
      NonFiniteLossError: A loss, a gradient, a parameter, a running statistic, a perturbation or an
        evaluation loss is NaN or infinite. The error names the step.
    """
    for name, value, minimum in (("epochs", epochs, 0), ("evaluate_every", evaluate_every, 1)):
        checks.integer(name, value, minimum)
    by_step = hasattr(batches, "steps_per_epoch")
    checks.require_kind(by_step, "batches", "batches as of data.batches", batches)
    pairs = isinstance(stages, Sequence) and all(
        isinstance(stage, Sequence) and len(stage) == 2 and callable(stage[1]) for stage in stages
    )
    checks.require(pairs, "stages", "pairs (first epoch, step)", stages)
    firsts = [first for first, _ in stages]
    if not firsts or firsts[0] != 0 or firsts != sorted(set(firsts)):
        raise ValueError(f"stages must start at epoch 0 and ascend, got {firsts}")
    steps_per_epoch = batches.steps_per_epoch
    done = int(state.step)
    first_epoch = (done if totals is None else done - 1) // steps_per_epoch
    for epoch in range(first_epoch, epochs):
        step_fn = next(fn for first, fn in reversed(stages) if first <= epoch)
        started = time.perf_counter()
        unchecked, examples = [], 0
        while done < (epoch + 1) * steps_per_epoch:
            batch = batches[done]
            state, pairs = step_fn(state, batch)
            done += 1
            if block_every_step:
                jax.block_until_ready(pairs)
            unchecked.append({name: pairs[name] for name in _WATCHED if name in pairs})
            totals = pairs if totals is None else metrics.add(totals, pairs)
            examples += len(batch["label"]) * jax.process_count()
            stop = should_stop()
            if stop or should_save(done):
                check_finite(unchecked, done - len(unchecked), _lasting(state))
                unchecked = []
                save(state, totals)
            if stop:
                return
            if done < (epoch + 1) * steps_per_epoch:
                watch(done, totals)
        check_finite(unchecked, done - len(unchecked), _lasting(state))
        seconds = time.perf_counter() - started
        evaluation = None
        if evaluate is not None and (epoch + 1 == epochs or (epoch + 1) % evaluate_every == 0):
            evaluation = evaluate(state)
            if evaluation is None:
                save(state, totals)
                return
            if not np.isfinite(evaluation.get("loss", 0.0)):
                raise NonFiniteLossError(f"the evaluation loss is not finite after step {done - 1}")
        yield (
            state,
            EpochRecord(
                epoch=epoch + 1,
                step=done,
                train=metrics.compute(totals),
                evaluation=evaluation,
                seconds=seconds,
                examples_per_second=examples / seconds,
            ),
        )
        totals = None


# What becomes NaN or infinite first when training breaks.
_WATCHED = {"loss": "training loss", "gradient_norm": "gradient's norm"}


def _lasting(state: TrainState) -> dict[str, Any]:
    """What the last step can break without a later loss that shows it."""
    return {
        "parameters": state.params,
        "running statistics": state.model_state,
        "perturbations": state.perturbation_state,
    }


def check_finite(
    history: Sequence[Mapping[str, metrics.Pair]],
    first_step: int,
    arrays: Mapping[str, Any] = types.MappingProxyType({}),
) -> None:
    """Raises NonFiniteLossError, naming the step, unless every loss and gradient is finite.

    Args:
      history: Metrics of consecutive steps, of which `loss` and `gradient_norm` are read.
      first_step: The step of the first of them.
      arrays: Name -> arrays that must be finite after the last of them.

    Example:
      >>> check_finite([{"loss": (1.0, 2.0)}, {"loss": (float("nan"), 2.0)}], first_step=7)
      Traceback (most recent call last):
          ...
      lpa_jax.training.loop.NonFiniteLossError: the training loss is nan at step 8
    """
    for offset, pairs in enumerate(jax.device_get(list(history))):
        for name, (total, _) in pairs.items():
            if not np.isfinite(total):
                value = "nan" if np.isnan(total) else "infinite"
                where = f"{value} at step {first_step + offset}"
                raise NonFiniteLossError(f"the {_WATCHED[name]} is {where}")
    for name, tree in arrays.items():
        floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
        if not all(np.all(np.isfinite(leaf)) for leaf in jax.device_get(floats)):
            last = first_step + len(history) - 1
            raise NonFiniteLossError(f"the {name} are not finite after step {last}")
