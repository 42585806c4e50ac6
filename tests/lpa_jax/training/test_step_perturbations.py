"""Perturbations within a step: in which order, at which layer, with which gradient and key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lpa_jax
from tests.helpers import reference, toy
from tests.helpers.step_runs import (
    MODEL,
    OPTIMIZER,
    RADIUS,
    cross_entropy,
    decode,
    encode,
    run,
    start,
)
from tests.helpers.toy import CLASSES, LABELS, MULTIPLIER, SIGN, assert_trees_equal


@jax.jit
def loss_gradients(params, h):
    """Gradient of every example's loss at its activation in hidden1."""

    def total(h):
        return jnp.sum(cross_entropy(decode(params, h), jax.nn.one_hot(LABELS, CLASSES)))

    return jax.grad(total)(h)


def test_lpl_sees_the_logits_of_the_activation_that_lpa_perturbed():
    old = run("confidence").after(1)
    state, _ = run("confidence").step(old, toy.batch())
    hidden, logits = (state.perturbation_state[layer] for layer in ("hidden1", "logits"))
    perturbed = decode(old.params, hidden["after"])
    assert np.max(np.abs(perturbed - decode(old.params, hidden["before"]))) > 1e-3
    np.testing.assert_allclose(logits["before"], perturbed, rtol=1e-5, atol=1e-6)
    # and LPA did not see the perturbation of the logits
    np.testing.assert_allclose(hidden["decoded"], perturbed, rtol=1e-5, atol=1e-6)
    assert np.max(np.abs(logits["after"] - logits["before"])) > 1e-3


def test_metrics_are_sums_and_counts_over_the_perturbed_pass():
    old = run("confidence").after(1)
    state, pairs = run("confidence").step(old, toy.batch())
    logits = state.perturbation_state["logits"]["after"]
    losses = cross_entropy(logits, jax.nn.one_hot(LABELS, CLASSES))
    correct = np.argmax(logits, axis=1) == LABELS
    trace, old_trace = state.opt_state[0].trace, old.opt_state[0].trace
    gradient = jax.tree.map(lambda new, old: new - 0.9 * old, trace, old_trace)
    squares = sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradient))
    expected = {
        "loss": (np.sum(losses), 6.0),
        "accuracy": (np.sum(correct), 6.0),
        "gradient_norm": (np.sqrt(squares), 1.0),
    }
    assert set(pairs) == set(expected)
    for name, pair in expected.items():
        np.testing.assert_allclose(pairs[name], pair, rtol=1e-5)


def test_targets_that_a_perturbation_mixes_are_those_trained_on():
    state, pairs = run("random").step(run("random").state, toy.batch())
    seen = state.perturbation_state["logits"]
    one_hot = np.eye(CLASSES)[LABELS]
    assert np.max(np.abs(seen["targets"] - one_hot)) > 1e-3
    np.testing.assert_allclose(np.sum(seen["targets"], axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(
        pairs["loss"][0], np.sum(cross_entropy(seen["after"], seen["targets"])), rtol=1e-6
    )


def test_tuple_of_layers_draws_one_a_step_and_perturbs_no_other():
    state, step = run("drawn")
    layers = ("input", "hidden2")
    state = run("drawn").after(9)  # by now every delta has moved from zero
    drawn = []
    for number in range(60):
        before = state.replace(step=jnp.int32(1000 + number))
        after, _ = step(before, toy.batch())
        old, new = before.perturbation_state, after.perturbation_state
        changed = [
            layer
            for layer in layers
            if np.any(old[layer]["inner"]["delta"] != new[layer]["inner"]["delta"])
        ]
        assert len(changed) == 1
        (used,) = changed
        drawn.append(used)
        for layer in set(layers) - set(changed):
            assert_trees_equal(old[layer], new[layer])
        if number < 10:
            # Nothing but the used layer's perturbation stands between its input and the logits.
            below = encode(state.params, used)
            np.testing.assert_allclose(new[used]["before"], below, rtol=1e-5, atol=1e-6)
            above = decode(state.params, new[used]["after"], used)
            np.testing.assert_allclose(new["logits"]["before"], above, rtol=1e-5, atol=1e-6)
    counts = [drawn.count(layer) for layer in layers]
    # 60 fair draws of 2: 30 +- 3.9 each.
    assert all(18 <= count <= 42 for count in counts), counts


def test_chained_perturbations_apply_in_order_and_the_first_may_learn():
    old, state = run("chain").after(1), run("chain").after(2)
    first, second = state.perturbation_state["hidden1"]
    np.testing.assert_allclose(first["before"], encode(old.params), rtol=1e-5, atol=1e-6)
    assert np.max(np.abs(first["after"] - first["before"])) > 1e-3
    np.testing.assert_array_equal(second["before"], first["after"])
    np.testing.assert_array_equal(second["after"], second["before"] + 1.0)
    logits = state.perturbation_state["logits"]["before"]
    np.testing.assert_allclose(logits, decode(old.params, second["after"]), rtol=1e-5, atol=1e-6)


def test_free_mode_ascends_the_gradient_at_the_perturbed_activation():
    old = run("free").after(2)
    state, _ = run("free").step(old, toy.batch())
    delta = np.asarray(old.perturbation_state["hidden1"]["inner"]["delta"], np.float64)
    assert np.all(np.any(delta[:3] != 0, axis=1))
    seen = state.perturbation_state["hidden1"]
    h, perturbed = np.asarray(seen["before"], np.float64), seen["after"]
    gradient = np.asarray(loss_gradients(old.params, perturbed), np.float64)
    np.testing.assert_allclose(seen["gradient"], gradient, rtol=1e-4, atol=1e-6)
    for c in range(3):
        members = c == LABELS
        radius, toward = RADIUS * MULTIPLIER[c], SIGN[c] * h[members].mean(0)
        used = reference.project(delta[c], radius, toward, "l2")
        np.testing.assert_allclose(perturbed[members], h[members] + used[None], atol=1e-5)
        ascent = gradient[members].mean(0)
        moved = used + SIGN[c] * 1.5 * radius * ascent / np.linalg.norm(ascent)
        expected = reference.project(moved, radius, toward, "l2")
        np.testing.assert_allclose(seen["inner"]["delta"][c], expected, rtol=1e-4, atol=1e-5)


def test_carry_mode_goes_on_from_the_last_delta():
    old = run("carry").after(2)
    state, _ = run("carry").step(old, toy.batch())
    seen = state.perturbation_state["hidden1"]
    h = seen["before"]

    def gradient(i, h_i):
        return np.asarray(loss_gradients(old.params, h.at[i].set(h_i))[i], np.float64)

    initial = np.asarray(old.perturbation_state["hidden1"]["inner"]["delta"], np.float64)
    carried, cold = (
        reference.class_perturbation(
            gradient,
            np.asarray(h, np.float64),
            LABELS,
            sign=SIGN,
            radius=RADIUS * np.array(MULTIPLIER),
            steps=1,
            initial=start,
        )
        for start in (initial, None)
    )
    np.testing.assert_allclose(seen["inner"]["delta"][:3], carried[:3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen["after"] - h, carried[LABELS], atol=1e-5)
    assert np.max(np.abs(carried - cold)) > 1e-3


def test_augmentation_sees_positions_and_runs_below_every_layer():
    offsets = []
    for steps in (1, 2):
        seen = run("random").after(steps).perturbation_state["input"]["before"]
        offset = np.mean(seen - toy.batch()["image"], axis=(1, 2, 3))
        np.testing.assert_allclose(offset, offset[1] * np.arange(6), rtol=1e-5, atol=1e-6)
        offsets.append(offset[1])
    assert 0 != offsets[0] != offsets[1]


def test_augmentation_takes_the_positions_that_the_batch_brings():
    class SeenError(Exception):
        pass

    def see(rng, images, positions):
        raise SeenError(positions.tolist())

    batch = {**toy.batch(), "position": np.arange(6)[::-1]}
    with pytest.raises(SeenError, match=r"\[5, 4, 3, 2, 1, 0\]"):
        lpa_jax.lpa_step(run("erm").state, batch, augment=see)


def test_every_site_and_every_step_has_a_key_of_its_own():
    states = [run("random").after(steps).perturbation_state for steps in (1, 2)]
    keys = [key for state in states for key in (state["hidden2"], state["logits"]["inner"])]
    assert len({np.asarray(key).tobytes() for key in keys}) == 4


LPA = lpa_jax.lpa(RADIUS)


@pytest.mark.parametrize(
    ("perturbations", "message"),
    [
        ({"hiden1": LPA},
         r"unknown layer 'hiden1'; .*, hidden2, logits \(did you mean 'hidden1'\?\)$"),
        ({("hidden1", "hiden2"): LPA},
         r"unknown layer 'hiden2'; .*, hidden2, logits \(did you mean 'hidden2'\?\)$"),
        ({("input", "hidden1"): LPA, "hidden1": LPA},
         r"layer 'hidden1' is named twice in perturbations; use perturbations.chain .*$"),
        ({("hidden1", "hidden1"): LPA}, r"layer 'hidden1' is named twice in perturbations"),
        ({"hidden1": 0.1}, r"perturbations\['hidden1'\] must be a Perturbation, got float$"),
    ],
)  # fmt: skip
def test_bad_perturbations_are_refused_with_one_line(perturbations, message):
    with pytest.raises(ValueError, match=message) as error:
        lpa_jax.TrainState.create(MODEL, OPTIMIZER, jax.random.key(0), toy.batch(), perturbations)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        lpa_jax.lpa_step(run("erm").state, toy.batch(), perturbations=perturbations)


def test_perturbation_that_the_state_does_not_know_is_refused():
    message = r"perturbations name layer 'hidden2', but the state was created with .* \[hidden1\]$"
    with pytest.raises(ValueError, match=message):
        lpa_jax.lpa_step(run("cold").state, toy.batch(), perturbations={"hidden2": LPA})


def test_a_step_without_what_the_state_was_created_with_is_refused_unless_it_says_so():
    state = run("cold").state
    message = (
        r"^perturbations must be those that the state was created with \(hidden1\), or \{\} for"
    )
    with pytest.raises(ValueError, match=message):
        lpa_jax.lpa_step(state, toy.batch())
    with pytest.raises(ValueError, match=message):
        jax.jit(lpa_jax.lpa_step)(state, toy.batch())
    plain, _ = lpa_jax.lpa_step(state, toy.batch(), perturbations={})
    erm, _ = lpa_jax.lpa_step(state.replace(perturbation_state={}), toy.batch())
    assert jax.tree.all(jax.tree.map(np.array_equal, plain.params, erm.params))


def test_integer_activation_is_refused():
    batch = {**toy.batch(), "image": toy.batch()["image"].astype(np.uint8)}
    with pytest.raises(
        ValueError, match=r"the activation at 'input' must be floating to be perturbed, got "
    ):
        start(MODEL, {"input": LPA}, batch=batch).after(1, batch)


def test_assignment_for_another_number_of_classes_is_refused():
    perturbations = {"hidden1": lpa_jax.lpa(RADIUS, assignment=lpa_jax.custom([1, 1]))}
    with pytest.raises(ValueError, match="made for 2 classes, the network has 4"):
        start(MODEL, perturbations)
