"""The loop, and the effect of perturbations that it logs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lpa_jax
from lpa_jax import data
from lpa_jax.diagnostics import perturbation_effect
from lpa_jax.training import loop as trainer


@pytest.fixture(scope="module")
def toy():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(10, 2, 2, 1)).astype(np.float32)
    return data.Dataset("toy", images, np.arange(10) % 3, num_classes=3)


MODEL = lpa_jax.models.MLP(num_classes=3, hidden=(5,))
OPTIMIZER = optax.sgd(0.1)
STEP = jax.jit(functools.partial(lpa_jax.lpa_step, perturbations={}))
EVALUATE = jax.jit(lpa_jax.eval_step)


def fresh_state(toy):
    example = data.batches(toy, 0, 4)[0]
    return lpa_jax.TrainState.create(MODEL, OPTIMIZER, jax.random.key(0), example)


def fit(state, toy, epochs, **options):
    batches = data.batches(toy, 0, 4)
    return list(trainer.train(state, ((0, STEP),), batches, epochs, **options))


def evaluate(toy, state, size=4):
    pairs = [EVALUATE(state, batch) for batch in data.evaluation_batches(toy, size)]
    return lpa_jax.metrics.compute(functools.reduce(lpa_jax.metrics.add, pairs))


def assert_same_state(one, other):
    one, other = (state.replace(rng=jax.random.key_data(state.rng)) for state in (one, other))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_training_two_epochs_equals_one_and_one_more(toy):
    whole = fit(fresh_state(toy), toy, 2)[-1][0]
    half = fit(fresh_state(toy), toy, 1)[-1][0]
    resumed = fit(half, toy, 2)
    assert len(resumed) == 1
    assert resumed[0][1].epoch == 2
    jax.tree.map(np.testing.assert_array_equal, resumed[0][0].params, whole.params)


def test_the_last_epoch_is_always_evaluated(toy):
    options = {"evaluate": functools.partial(evaluate, toy), "evaluate_every": 2}
    records = [record for _, record in fit(fresh_state(toy), toy, 3, **options)]
    assert [record.evaluation is not None for record in records] == [False, True, True]
    assert records[-1].step == 9
    assert records[-1].evaluation["per_class_accuracy"].shape == (3,)


def test_steps_within_an_epoch_can_be_watched(toy):
    seen = []
    fit(fresh_state(toy), toy, 2, watch=lambda done, totals: seen.append((done, totals["loss"])))
    # Three steps an epoch, of 4 of 10 examples each; the last is the epoch's record.
    assert [done for done, _ in seen] == [1, 2, 4, 5]
    assert [float(count) for _, (_, count) in seen] == [4.0, 8.0, 4.0, 8.0]


def test_padded_evaluation_counts_each_example_once(toy):
    state = fresh_state(toy)
    results = [evaluate(toy, state, size) for size in (4, 10)]
    assert results[0]["accuracy"] == pytest.approx(results[1]["accuracy"])
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-5)


def test_a_stop_saves_and_ends_after_the_step(toy):
    answers, saved = iter([False, False, False, False, True]), []
    records = fit(
        fresh_state(toy), toy, 5,
        should_stop=answers.__next__,
        save=lambda state, totals: saved.append(int(state.step)),
    )  # fmt: skip
    assert [record.step for _, record in records] == [3]
    assert saved == [5]


def test_whatever_is_saved_goes_on_bit_for_bit(toy):
    options = {"evaluate": functools.partial(evaluate, toy), "evaluate_every": 2}
    saved = {}

    def save(state, totals):
        saved[int(state.step)] = state, totals

    whole = fit(fresh_state(toy), toy, 3, save=save, should_save=lambda step: True, **options)
    assert sorted(saved) == list(range(1, 10))
    for step, (state, totals) in saved.items():
        resumed = fit(state, toy, 3, totals=totals, **options)
        epochs_to_go = 3 - (step - 1) // 3
        assert len(resumed) == epochs_to_go
        for (ours, record), (wanted, expected) in zip(resumed, whole[-epochs_to_go:], strict=True):
            assert_same_state(ours, wanted)
            for name in ("epoch", "step", "train"):
                assert getattr(record, name) == getattr(expected, name)
            jax.tree.map(np.testing.assert_array_equal, record.evaluation, expected.evaluation)


def test_an_evaluation_that_was_stopped_is_made_when_training_goes_on(toy):
    saved = []
    stopped = fit(
        fresh_state(toy), toy, 1,
        evaluate=lambda state: None,
        save=lambda state, totals: saved.append((state, totals)),
    )  # fmt: skip
    assert stopped == [] and int(saved[0][0].step) == 3
    again = functools.partial(evaluate, toy)
    ((_, record),) = fit(saved[0][0], toy, 1, evaluate=again, totals=saved[0][1])
    assert record.evaluation is not None and record.step == 3


@pytest.mark.parametrize("poisoned", ["loss", "gradient_norm", "parameters"])
def test_a_state_that_is_not_finite_is_never_saved(toy, poisoned):
    def step(state, batch):
        new_state, pairs = STEP(state, batch)
        if int(state.step) == 1 and poisoned == "parameters":
            new_state = new_state.replace(params=jax.tree.map(lambda p: p * jnp.inf, state.params))
        elif int(state.step) == 1:
            pairs = {**pairs, poisoned: (jnp.inf * jnp.ones(()), jnp.ones(()))}
        return new_state, pairs

    saved = []
    with pytest.raises(trainer.NonFiniteLossError, match="step 1"):
        list(
            trainer.train(
                fresh_state(toy), ((0, step),), data.batches(toy, 0, 4), 2,
                save=lambda state, totals: saved.append(int(state.step)),
                should_save=lambda step: True,
            )
        )  # fmt: skip
    assert saved == [1]


@pytest.mark.parametrize("poisoned", ["params", "model_state", "perturbation_state"])
@pytest.mark.parametrize("stop_in_evaluation", [False, True])
def test_a_state_that_the_last_step_of_an_epoch_breaks_is_no_result(
    toy, poisoned, stop_in_evaluation
):
    def step(state, batch):
        new_state, pairs = STEP(state, batch)
        if int(state.step) == 2:  # losses and gradients of all steps are finite
            new_state = new_state.replace(**{poisoned: {"array": jnp.array([1.0, jnp.nan])}})
        return new_state, pairs

    saved, evaluated = [], []

    def evaluate(state):
        evaluated.append(int(state.step))
        return None if stop_in_evaluation else {"loss": 1.0}

    with pytest.raises(trainer.NonFiniteLossError, match="are not finite after step 2"):
        list(
            trainer.train(
                fresh_state(toy), ((0, step),), data.batches(toy, 0, 4), 1,
                evaluate=evaluate, save=lambda state, totals: saved.append(int(state.step)),
            )
        )  # fmt: skip
    assert saved == evaluated == []


def test_an_evaluation_loss_that_is_not_finite_is_no_result(toy):
    with pytest.raises(trainer.NonFiniteLossError, match="evaluation loss is not finite after s"):
        fit(fresh_state(toy), toy, 1, evaluate=lambda state: {"loss": np.nan, "accuracy": 0.3})


def test_the_second_stage_takes_over_at_its_epoch(toy):
    used = []

    def named(name):
        def step(state, batch):
            used.append(name)
            return STEP(state, batch)

        return step

    stages = ((0, named("first")), (1, named("second")))
    list(trainer.train(fresh_state(toy), stages, data.batches(toy, 0, 4), 2))
    assert used == ["first"] * 3 + ["second"] * 3


def test_stages_must_start_at_zero_and_ascend(toy):
    with pytest.raises(ValueError, match=r"stages must start at epoch 0 and ascend, got \[1\]"):
        list(trainer.train(fresh_state(toy), ((1, STEP),), data.batches(toy, 0, 4), 2))


def test_a_nan_in_the_data_stops_the_run_at_its_step(toy):
    class Broken:
        steps_per_epoch = 3

        def __getitem__(self, step):
            batch = dict(data.batches(toy, 0, 4)[step])
            if step == 1:
                batch["image"] = np.full_like(batch["image"], np.nan)
            return batch

    with pytest.raises(trainer.NonFiniteLossError, match="nan at step 1"):
        list(trainer.train(fresh_state(toy), ((0, STEP),), Broken(), 2))


def test_the_effect_is_the_loss_difference_by_sign_group(toy):
    state = fresh_state(toy)
    batch = data.batches(toy, 0, 10)[0]
    signs = [1, -1, 0]
    lpa = lpa_jax.lpa(0.2, assignment=lpa_jax.custom(signs), geometry="free")
    pairs = perturbation_effect(
        state.network, state.variables, {"hidden1": {}}, batch,
        perturbations={"hidden1": lpa}, loss=lpa_jax.cross_entropy, rng=jax.random.key(1),
    )  # fmt: skip
    hidden = lpa_jax.encode(MODEL, state.variables, batch["image"], "hidden1")
    targets = jax.nn.one_hot(batch["label"], 3)

    def losses(h):
        logits = lpa_jax.decode(MODEL, state.variables, h, "hidden1")
        return lpa_jax.cross_entropy(logits, targets)

    radius = 0.2 * float(jnp.mean(jnp.linalg.norm(hidden, axis=1)))
    delta = lpa_jax.class_perturbation(
        losses, hidden, jnp.asarray(batch["label"]), sign=jnp.array(signs, jnp.float32),
        radius=jnp.full(3, radius), geometry="free",
    )  # fmt: skip
    change = np.asarray(losses(hidden + delta[batch["label"]]) - losses(hidden))
    for group, sign in (("positive", 1), ("negative", -1), ("neutral", 0)):
        members = np.asarray(signs)[batch["label"]] == sign
        total, count = pairs[f"hidden1/loss_change/{group}"]
        assert count == members.sum()
        np.testing.assert_allclose(total, change[members].sum(), rtol=1e-4, atol=1e-6)
    assert pairs["hidden1/loss_change/positive"][0] > 0 > pairs["hidden1/loss_change/negative"][0]
