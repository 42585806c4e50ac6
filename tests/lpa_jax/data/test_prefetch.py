"""Prefetching: the batches of before, earlier; and a training loop that never waits for a step."""

import threading

import jax
import numpy as np
import optax
import pytest

import lpa_jax
from lpa_jax import parallel
from lpa_jax.data.prefetch import Prefetched
from lpa_jax.models import MLP
from lpa_jax.training import loop as trainer
from tests.helpers import toy


class Source:
    """Batch number s is s; notes who was asked for, and can fail or be slow."""

    steps_per_epoch = 4

    def __init__(self, failing=()):
        self.made, self.failing = [], failing
        self.told = threading.Condition()

    def __getitem__(self, step):
        if step in self.failing:
            raise OSError(f"batch {step} cannot be read")
        with self.told:
            self.made.append(step)
            self.told.notify_all()
        return step

    def wait_for(self, step):
        with self.told:
            return self.told.wait_for(lambda: step in self.made, timeout=20)


def test_batches_ahead_are_made_before_they_are_asked_for_and_each_once():
    source = Source()
    with Prefetched(source, lambda batch: batch * 10, depth=2) as ahead:
        assert ahead.steps_per_epoch == 4
        assert ahead[5] == 50
        assert source.wait_for(7)
        assert source.made == [5, 6, 7]
        assert [ahead[6], ahead[7]] == [60, 70]
        assert source.wait_for(9)
    assert source.made == [5, 6, 7, 8, 9]


def test_any_order_of_asking_gives_the_batch_of_the_step():
    with Prefetched(Source(), lambda batch: batch) as ahead:
        assert [ahead[step] for step in (3, 0, 0, 7, 1, 2)] == [3, 0, 0, 7, 1, 2]


def test_an_error_is_raised_where_its_batch_is_asked_for():
    with Prefetched(Source(failing=(2,)), lambda batch: batch) as ahead:
        assert [ahead[0], ahead[1]] == [0, 1]
        with pytest.raises(OSError, match="batch 2 cannot be read"):
            ahead[2]
        assert ahead[3] == 3


def test_evaluation_batches_end_where_they_end():
    with Prefetched([5, 6], lambda batch: batch) as ahead:
        assert len(ahead) == 2
        assert [ahead[number] for number in range(len(ahead))] == [5, 6]


@pytest.mark.parametrize("depth", [0, -1])
def test_nothing_ahead_is_refused(depth):
    with pytest.raises(ValueError, match=f"depth must be a whole number >= 1, got {depth}"):
        Prefetched([], lambda batch: batch, depth)


def test_placed_batches_give_the_same_step_and_keep_their_labels_readable():
    step = parallel.map_step(lpa_jax.eval_step)
    state = lpa_jax.TrainState.create(
        MLP(toy.CLASSES, hidden=(3,)), optax.sgd(0.1), jax.random.key(0), toy.batch()
    )
    with Prefetched([toy.batch()], lambda b: step.place(b, state.num_classes)) as ahead:
        placed = ahead[0]
        assert all(isinstance(value, jax.Array) for value in placed.arrays.values())
        assert len(placed["label"]) == len(toy.LABELS)
        toy.assert_trees_equal(step(state, placed), step(state, toy.batch()))
    bad = {**toy.batch(), "label": toy.LABELS + 9}
    message = r"labels must be in 0\.\.3 or -1, got 9 at position 0"
    refusal = pytest.raises(ValueError, match=message)
    with Prefetched([bad], lambda b: step.place(b, state.num_classes)) as ahead, refusal:
        ahead[0]


class Deferred:
    """A number on a device: adding to it starts more work, reading it waits for the device."""

    reads = 0

    def __init__(self, value):
        self.value = value

    def __add__(self, other):
        return Deferred(self.value + other.value)

    def __array__(self, dtype=None, copy=None):
        Deferred.reads += 1
        return np.asarray(self.value, dtype)

    def block_until_ready(self):
        Deferred.reads += 1
        return self


def test_the_loop_reads_no_metric_before_the_epoch_ends(monkeypatch):
    monkeypatch.setattr(Deferred, "reads", 0)
    seen = []

    def step(state, batch):
        seen.append(Deferred.reads)
        one = Deferred(1.0)
        return state, {"loss": (one, one), "gradient_norm": (one, one)}

    state = lpa_jax.TrainState.create(
        MLP(toy.CLASSES, hidden=(3,)), optax.sgd(0.1), jax.random.key(0), toy.batch()
    )
    batches = [toy.batch()] * 5

    class Epoch(list):
        steps_per_epoch = 5

    (_, record), *_ = trainer.train(state, ((0, step),), Epoch(batches), epochs=1)
    assert seen == [0] * 5
    assert Deferred.reads > 0 and record.train["loss"] == 1.0


def test_several_threads_give_the_batches_of_their_steps():
    with Prefetched(Source(failing=(6,)), depth=4, threads=3) as ahead:
        assert [ahead[step] for step in (0, 1, 2, 5, 3, 4)] == [0, 1, 2, 5, 3, 4]
        with pytest.raises(OSError, match="batch 6 cannot be read"):
            ahead[6]
    with pytest.raises(ValueError, match="threads must be a whole number >= 1, got 0"):
        Prefetched([], threads=0)
