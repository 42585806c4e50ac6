"""The training and the evaluation step: contracts of the method that only a whole step shows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lpa_jax
from lpa_jax import metrics
from tests.helpers import toy
from tests.helpers.step_runs import (
    FIXED,
    MODEL,
    MODES,
    NO_SIGNS,
    NORMALIZED,
    RADIUS,
    RUNS,
    cross_entropy,
    decode,
    encode,
    evaluate,
    fixed_lpa,
    run,
    start,
    trained,
)
from tests.helpers.toy import CLASSES, LABELS, assert_trees_close, assert_trees_equal


@pytest.mark.parametrize(
    "perturbations",
    [
        pytest.param({"hidden1": lpa_jax.lpa(0.0, mode=mode)}, id=f"radius 0, {mode}")
        for mode in MODES
    ]
    + [pytest.param({"hidden1": lpa_jax.lpa(RADIUS, steps=0)}, id="steps 0")]
    + [
        pytest.param({"hidden1": fixed_lpa(mode, NO_SIGNS)}, id=f"signs 0, {mode}")
        for mode in MODES
    ]
    + [
        pytest.param(
            {"hidden2": lpa_jax.lpa(0.0), "logits": lpa_jax.lpl(RADIUS, assignment=NO_SIGNS)},
            id="radius 0 below signs 0",
        )
    ],
)
def test_contract_02_zero_strength_is_bitwise_the_erm_step(perturbations):
    assert_trees_equal(trained(start(MODEL, perturbations).after(2)), trained(run("erm").after(2)))


def test_contract_02_strength_above_zero_is_another_step():
    params, _ = trained(run("cold").after(1))
    erm, _ = trained(run("erm").after(1))
    difference = np.abs(params["hidden1"]["dense"]["kernel"] - erm["hidden1"]["dense"]["kernel"])
    assert np.max(difference) > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_contract_03_members_of_a_class_share_one_delta(mode):
    seen = run(mode).after(2).perturbation_state["hidden1"]
    deltas = np.asarray(seen["after"] - seen["before"])
    for c in range(3):
        members = deltas[c == LABELS]
        assert np.max(np.abs(members)) > 1e-3
        np.testing.assert_allclose(members, members[:1].repeat(len(members), 0), atol=1e-6)


@pytest.mark.parametrize("mode", ["carry", "free"])
def test_contract_03_absent_class_is_left_alone_and_changes_nothing(mode):
    everyone = toy.batch([0, 1, 1, 2, 0, 3])
    state = run(mode).after(2, everyone)
    delta = state.perturbation_state["hidden1"]["inner"]["delta"]
    assert np.any(delta[3] != 0)
    after, _ = run(mode).step(state, toy.batch())
    new_delta = after.perturbation_state["hidden1"]["inner"]["delta"]
    np.testing.assert_array_equal(new_delta[3], delta[3])
    assert np.all(np.any(new_delta[:3] != delta[:3], axis=1))

    seen = state.perturbation_state["hidden1"]
    tampered = {"hidden1": {**seen, "inner": {"delta": delta.at[3].set(1e3)}}}
    other, _ = run(mode).step(state.replace(perturbation_state=tampered), toy.batch())
    assert_trees_equal(trained(other), trained(after))


@pytest.mark.parametrize("name", ["cold", "carry", "free", "confidence"])
def test_contract_05_no_gradient_flows_through_delta_signs_and_radii(name):
    state = run(name).after(1)
    momentum = state.opt_state[0].trace
    after, _ = run(name).step(state, toy.batch())
    gradient = jax.tree.map(lambda new, old: new - 0.9 * old, after.opt_state[0].trace, momentum)
    seen = after.perturbation_state
    deltas = {layer: seen[layer]["after"] - seen[layer]["before"] for layer in seen}
    assert_trees_close(gradient, frozen_gradient(state.params, deltas), rtol=1e-4)


@jax.jit
def frozen_gradient(params, deltas):
    """Gradient of the mean loss with the perturbations as constants."""

    def mean_loss(params):
        logits = decode(params, encode(params) + deltas["hidden1"]) + deltas.get("logits", 0.0)
        return jnp.mean(cross_entropy(logits, jax.nn.one_hot(LABELS, CLASSES)))

    return jax.grad(mean_loss)(params)


def test_contract_09_running_statistics_are_updated_once_from_the_perturbed_pass():
    old = run("normalized").state
    for step in (1, 2):
        state, _ = run("normalized").step(old, toy.batch())
        inputs = {
            "hidden1": toy.batch()["image"].reshape(LABELS.size, -1),
            "hidden2": np.asarray(state.perturbation_state["hidden1"]["after"]),
        }
        for layer, h in inputs.items():
            dense = old.params[layer]["dense"]
            u = h @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"])[None]
            before = old.model_state["batch_stats"][layer]["norm"]
            after = state.model_state["batch_stats"][layer]["norm"]
            assert state.model_state["counters"][layer]["passes"] == step
            share = toy.MOMENTUM
            for key, batch_value in (("mean", u.mean(0)), ("var", u.var(0))):
                expected = share * before[key] + (1 - share) * batch_value
                np.testing.assert_allclose(after[key], expected, rtol=1e-5, atol=1e-6)
        old = state


@pytest.mark.parametrize("bad", [-2, CLASSES])
@pytest.mark.parametrize("step", [lpa_jax.lpa_step, lpa_jax.eval_step])
def test_contract_10_bad_label_is_refused_before_anything_is_computed(step, bad):
    def loss(logits, targets):
        raise AssertionError("the step has begun")

    labels = np.where(np.arange(LABELS.size) == 2, bad, LABELS).astype(np.int32)
    for as_array in (np.asarray, jnp.asarray):
        batch = {**toy.batch(), "label": as_array(labels)}
        with pytest.raises(
            ValueError, match=rf"labels must be in 0..3 or -1, got {bad} at position 2"
        ):
            step(run("erm").state, batch, loss=loss)


def test_contract_10_labels_that_are_no_integers_are_refused():
    batch = {**toy.batch(), "label": LABELS.astype(np.float32)}
    with pytest.raises(ValueError, match="labels must be integers, got dtype float32"):
        lpa_jax.lpa_step(run("erm").state, batch)


def test_contract_11_decode_drops_what_the_training_pass_drops():
    state = run("normalized").after(1)
    seen = state.perturbation_state
    assert np.any(seen["hidden1"]["before"] == 0)
    # What LPA's decode predicts for its result is what the training pass brings to the logits.
    np.testing.assert_allclose(seen["hidden1"]["decoded"], seen["logits"]["before"], atol=1e-6)
    later, _ = run("normalized").step(
        run("normalized").state.replace(step=jnp.int32(1)), toy.batch()
    )
    masks = [s.perturbation_state["hidden1"]["before"] == 0 for s in (state, later)]
    assert np.any(masks[0] != masks[1])


def test_batch_of_one_example_gives_finite_results():
    perturbations = {
        "hidden1": lpa_jax.lpa(RADIUS, mode="free", assignment=FIXED),
        "hidden2": lpa_jax.lpa(RADIUS, mode="carry"),
        "logits": lpa_jax.lpl(RADIUS, steps=1, assignment=lpa_jax.all_negative()),
    }
    batch = toy.batch([1])
    state = start(toy.NormalizedMLP(CLASSES), perturbations, batch=batch).after(2, batch)
    leaves = jax.tree.leaves((state.params, state.model_state, state.perturbation_state))
    assert all(np.all(np.isfinite(leaf)) for leaf in leaves)


@pytest.mark.parametrize("name", RUNS)
def test_second_step_compiles_nothing(name):
    run(name).after(2)
    assert run(name).step._cache_size() == 1


@pytest.mark.parametrize("name", ["erm", "normalized", "free"])
def test_train_state_is_a_pytree_of_arrays(name):
    state = run(name).state
    leaves, structure = jax.tree.flatten(state)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    after = run(name).after(1)
    assert jax.tree.structure(after) == structure
    shapes = [(leaf.shape, leaf.dtype) for leaf in leaves]
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(after)] == shapes
    assert after.step == 1


def test_eager_step_equals_the_compiled_one():
    state, pairs = lpa_jax.lpa_step(run("erm").state, toy.batch())
    compiled, compiled_pairs = run("erm").step(run("erm").state, toy.batch())
    assert_trees_close(trained(state), trained(compiled))
    assert_trees_close(pairs, compiled_pairs)


@pytest.mark.parametrize("name", ["confidence", "normalized", "bfloat16"])
def test_training_lowers_the_loss(name):
    first, last = (
        metrics.compute(evaluate()(state, toy.batch())["loss"])
        for state in (run(name).state, run(name).after(60))
    )
    assert last < 0.6 * first, (first, last)


def test_same_key_gives_the_same_parameters_and_another_key_others():
    first, again = run("normalized").after(3), run("normalized").after(3)
    assert_trees_equal(trained(first), trained(again))
    state, step = run("normalized")
    other, _ = step(state.replace(rng=jax.random.key(7)), toy.batch())
    difference = jax.tree.map(
        lambda a, b: np.max(np.abs(a - b)), other.params, run("normalized").after(1).params
    )
    assert max(jax.tree.leaves(difference)) > 1e-3


def test_bfloat16_network_trains_float32_parameters():
    state = run("bfloat16").after(3)
    seen = state.perturbation_state["hidden1"]
    assert seen["after"].dtype == jnp.bfloat16
    assert seen["inner"]["delta"].dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.params))


def test_evaluation_counts_each_example_once_whatever_the_padding():
    state = run("normalized").after(2)
    images, labels = toy.batch()["image"], LABELS
    whole = evaluate()(state, {"image": images, "label": labels, "mask": np.ones(6, np.float32)})
    cut = [
        {"image": images[:4], "label": labels[:4], "mask": np.ones(4, np.float32)},
        {
            "image": images[[4, 5, 0, 0]],
            "label": labels[[4, 5, 0, 0]],
            "mask": np.array([1, 1, 0, 0], np.float32),
        },
    ]
    total = functools.reduce(metrics.add, [evaluate()(state, part) for part in cut])
    assert_trees_close(total, whole)
    assert total["loss"][1] == total["accuracy"][1] == 6.0
    np.testing.assert_array_equal(total["per_class_accuracy"][1], [2, 3, 1, 0])
    assert_trees_close(lpa_jax.eval_step(state, toy.batch()), whole)


def test_evaluation_neither_perturbs_nor_drops_nor_uses_batch_statistics():
    state = run("normalized").after(2)
    variables = {"params": state.params, **state.model_state}
    logits = NORMALIZED.apply(variables, toy.batch()["image"], train=False)
    pairs = lpa_jax.eval_step(state, toy.batch())
    losses = cross_entropy(logits, jax.nn.one_hot(LABELS, CLASSES))
    np.testing.assert_allclose(pairs["loss"], (np.sum(losses), 6.0), rtol=1e-5)
    correct = np.argmax(logits, axis=1) == LABELS
    np.testing.assert_allclose(pairs["accuracy"], (np.sum(correct), 6.0))
    expected = [np.sum(correct[c == LABELS]) for c in range(CLASSES)]
    np.testing.assert_allclose(pairs["per_class_accuracy"][0], expected)
