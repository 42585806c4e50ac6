"""What trains and evaluates the networks of domain generalization, without the command line."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.domains.data import DomainSource
from experiments.domains.networks import Training, Trainings
from experiments.domains.settings import DomainSettings
from experiments.runtime.progress import RunProgress
from experiments.training import run as runner
from lpa_jax import parallel
from lpa_jax.interrupts import InterruptedRunError
from lpa_jax.training import loop as trainer
from tests.helpers.toy import assert_trees_equal

DOMAINS = ("+90%", "+80%", "-90%")
QUIET = RunProgress(1, 1, quiet=True)
FIXED = {"lpa.assignment": "confidence", "lpa.steps": 1, "lpa.radius_target": 0.2}
WEAK = FIXED | {"learning_rate": 1e-3, "lpa.radius": 0.1}
STRONG = FIXED | {"learning_rate": 1e-2, "lpa.radius": 0.7}


@pytest.fixture(scope="module")
def source(data_dir):
    settings = DomainSettings(dataset="ColoredMNIST", data_dir=str(data_dir), image_size=14,
                              images_per_domain=40, model="mlp", train_steps=4, evaluate_every=2,
                              batch_size=4).check()  # fmt: skip
    return settings, DomainSource(settings)


def test_methods_that_compare_domains_are_trained_on_the_one_that_a_pair_of_three_leaves(
    source, tmp_path
):
    settings, domains = source
    for method in ("coral", "group_dro", "irm", "vrex"):
        Trainings(settings, domains, tmp_path).program(Training(method, {}, DOMAINS[:2], 0))
    two = types.SimpleNamespace(names=("a", "b"))
    with pytest.raises(ValueError, match="coral in 'coral' compares training domains, but only 1 "):
        Trainings(settings, two, tmp_path).program(Training("coral", {}, ("a",), 0))


def test_numbers_are_arguments_of_one_compiled_program(source, tmp_path):
    settings, domains = source
    shared, alone = (Trainings(settings, domains, tmp_path / name) for name in "ab")
    weak, strong = (Training("lpa", options, ("+90%",), 0) for options in (WEAK, STRONG))
    program = shared.program(weak)

    def shares_compilation(training):
        return shared.program(training).place == program.place

    assert shares_compilation(strong._replace(held_out=("-90%",), seed=1))
    assert not shares_compilation(weak._replace(options=WEAK | {"lpa.steps": 2}))
    assert not shares_compilation(weak._replace(held_out=("+90%", "-90%")))
    shared.run(weak, QUIET)
    assert shared.run(strong, QUIET)["records"] == alone.run(strong, QUIET)["records"]
    logs = tmp_path.glob("*/lpa/**/metrics.jsonl")
    rows = [json.loads(log.read_text().splitlines()[-1]) for log in logs]
    losses = [row["train/loss"] for row in rows]
    assert len(losses) == 3 and len(set(losses)) == 2, "options must reach the step"
    assert all(row["effect/hidden1/radius_scale/positive"] != 1 for row in rows)


def test_steps_take_the_states_memory_but_not_that_of_loaded_weights_or_of_numbers(
    source, tmp_path, monkeypatch
):
    settings, domains = source
    network = Training("lpa", WEAK, ("+90%",), 0)

    def drawn(settings, model, image_shape):
        return model.init(jax.random.key(9), jnp.zeros((1, *image_shape)))

    monkeypatch.setattr(DomainSettings, "initial_variables", drawn)
    trainings = Trainings(settings, domains, tmp_path)
    program, steps, train = trainings.program(network), [], trainer.train
    # Not compiled, so that what jit may pass through, the loaded weights, certainly is.
    program._create = program._create.__wrapped__
    monkeypatch.setattr(trainings, "program", lambda training: program)

    def noticed_train(state, stages, batches, *args, **kwargs):
        assert isinstance(batches[0], parallel.PlacedBatch)
        first = jax.tree.map(np.array, state.params)
        for after, record in train(state, stages, batches, *args, **kwargs):
            steps.append(record.step)
            yield after, record
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
        assert_trees_equal(program.init(0).params, first)

    monkeypatch.setattr(trainer, "train", noticed_train)
    trainings.run(network, QUIET)
    trainings.run(network._replace(seed=1), QUIET)
    assert steps == [2, 4] * 2


def test_a_batch_in_parts_trains_the_network_of_the_whole_batch(source, tmp_path):
    settings, domains = source
    network = Training("coral+lpa", WEAK, ("+90%",), 0)
    rows = []
    for parts in (1, 4):
        cut = dataclasses.replace(settings, accumulate=parts).check()
        trainings = Trainings(cut, domains, tmp_path / str(parts))
        trainings.run(network, QUIET)
        assert getattr(trainings.program(network).init(0).network, "micro_batches", 1) == parts
        (log,) = (tmp_path / str(parts)).rglob("metrics.jsonl")
        rows.append(json.loads(log.read_text().splitlines()[-1]))
    assert rows[0]["train/penalty/coral"] > 0
    for name in ("train/loss", "train/penalty/coral", "effect/hidden1/radius_scale/positive"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-5), name


def test_a_network_that_is_stopped_goes_on_to_the_same_records(source, tmp_path):
    settings, domains = source
    network = Training("coral", {}, ("+80%",), 3)
    whole = Trainings(settings, domains, tmp_path / "whole").run(network, QUIET)
    for asked in (2, 6):  # within the first stretch, and in its evaluation or the next
        left = [asked]

        def should_stop(left=left):
            left[0] -= 1
            return left[0] < 0

        stopped = Trainings(
            settings, domains, tmp_path / f"stopped_{asked}", should_stop=should_stop
        )
        with pytest.raises(InterruptedRunError):
            stopped.run(network, QUIET)
        left[0] = 10**6
        assert stopped.run(network, QUIET)["records"] == whole["records"]


def test_a_final_evaluation_that_is_missing_is_made_once(source, tmp_path, monkeypatch):
    settings, domains = source
    network = Training("erm", {}, ("+80%",), 3)
    evaluated, evaluate = [], runner.evaluate
    stop_after = settings.train_steps

    def noticed(job, state, *args):
        evaluated.append(int(state.step))
        return evaluate(job, state, *args)

    monkeypatch.setattr(runner, "evaluate", noticed)
    whole = Trainings(settings, domains, tmp_path / "whole").run(network, QUIET)
    assert evaluated == [2, 4]
    stopped = Trainings(
        settings,
        domains,
        tmp_path / "stopped",
        should_stop=lambda: bool(evaluated) and evaluated[-1] == stop_after,
    )
    evaluated.clear()
    with pytest.raises(InterruptedRunError):
        stopped.run(network, QUIET)
    assert evaluated == [2, 4] and stopped.finished(network) is None
    evaluated.clear()
    stop_after = None
    assert stopped.run(network, QUIET)["records"] == whole["records"]
    assert evaluated == [4]
    stopped.run(network, QUIET)
    assert evaluated == [4]
