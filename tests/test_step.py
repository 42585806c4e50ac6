"""The training and the evaluation step: contracts of the method that only a whole step shows."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import toy
from toy import CLASSES, LABELS, MULTIPLIER, SIGN, assert_trees_close, assert_trees_equal, recording

import lpa_jax
from lpa_jax import metrics
from lpa_jax.models import MLP
from lpa_jax.perturbations import identity, stateless

LEARNING_RATE = 0.125
RADIUS = 0.3
OPTIMIZER = optax.sgd(LEARNING_RATE, momentum=0.9)
MODEL = MLP(CLASSES, hidden=(8, 6))
NORMALIZED = toy.NormalizedMLP(CLASSES, dropout=0.5)
FIXED = lpa_jax.custom(SIGN, MULTIPLIER)
NO_SIGNS = lpa_jax.custom([0, 0, 0, 0])
CONFIDENCE = lpa_jax.by_confidence(kappa=1.0)
MODES = ("cold", "carry", "free")


def fixed_lpa(mode, assignment=FIXED):
    return lpa_jax.lpa(RADIUS, mode=mode, assignment=assignment, scale="absolute")


def augment(rng, images, positions):
    offset = jax.random.uniform(rng) * positions
    return images + offset[:, None, None, None]


RUNS = {
    "erm": (MODEL, {}),
    "cold": (MODEL, {"hidden1": recording(fixed_lpa("cold"))}),
    "carry": (MODEL, {"hidden1": recording(fixed_lpa("carry"))}),
    "free": (MODEL, {"hidden1": recording(fixed_lpa("free"))}),
    "confidence": (
        MODEL,
        {
            "hidden1": recording(lpa_jax.lpa(RADIUS, assignment=CONFIDENCE)),
            "logits": recording(lpa_jax.lpl(RADIUS, assignment=CONFIDENCE)),
        },
    ),
    "normalized": (
        NORMALIZED,
        {
            # named from the top down: what counts is the order in the network
            "logits": recording(lpa_jax.lpl(RADIUS, steps=1)),
            "hidden1": recording(lpa_jax.lpa(RADIUS, steps=2, assignment=FIXED)),
        },
    ),
    "random": (
        MODEL,
        {
            "input": recording(identity()),
            "hidden1": lpa_jax.manifold_mixup(1.0),
            "hidden2": toy.site_key(),
            "logits": recording(toy.site_key()),
        },
        {"augment": augment},
    ),
    "drawn": (
        MODEL,
        {
            ("input", "hidden2"): recording(fixed_lpa("free")),
            "logits": recording(identity()),
        },
    ),
    "chain": (
        MODEL,
        {
            "hidden1": lpa_jax.chain(
                recording(fixed_lpa("free")),
                recording(stateless("shift", lambda site: (site.activation + 1.0, site.targets))),
            ),
            "logits": recording(identity()),
        },
    ),
    "bfloat16": (
        MLP(CLASSES, hidden=(8, 6), dtype="bfloat16"),
        {"hidden1": recording(lpa_jax.lpa(RADIUS, mode="free"))},
    ),
}


class Run(NamedTuple):
    state: lpa_jax.TrainState
    step: object

    def after(self, steps, batch=None):
        state = self.state
        for _ in range(steps):
            state, _ = self.step(state, toy.batch() if batch is None else batch)
        return state


def start(model, perturbations, options=None, batch=None):
    state = lpa_jax.TrainState.create(
        model, OPTIMIZER, jax.random.key(0), batch or toy.batch(), perturbations
    )
    step = functools.partial(lpa_jax.lpa_step, perturbations=perturbations, **(options or {}))
    return Run(state, jax.jit(step))


@functools.cache
def run(name):
    return start(*RUNS[name])


def cross_entropy(logits, targets):
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)


@functools.partial(jax.jit, static_argnames="layer")
def encode(params, layer="hidden1"):
    return MODEL.apply({"params": params}, toy.batch()["image"], train=True, stop=layer)


@functools.partial(jax.jit, static_argnames="layer")
def decode(params, h, layer="hidden1"):
    return MODEL.apply({"params": params}, h, train=True, start=layer)


@jax.jit
def loss_gradients(params, h):
    """Gradient of every example's loss at its activation in hidden1."""

    def total(h):
        return jnp.sum(cross_entropy(decode(params, h), jax.nn.one_hot(LABELS, CLASSES)))

    return jax.grad(total)(h)


@functools.cache
def evaluate():
    return jax.jit(lpa_jax.eval_step)


def trained(state):
    return state.params, state.opt_state


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


@pytest.mark.parametrize("bad", [-1, CLASSES])
@pytest.mark.parametrize("step", [lpa_jax.lpa_step, lpa_jax.eval_step])
def test_contract_10_bad_label_is_refused_before_anything_is_computed(step, bad):
    def loss(logits, targets):
        raise AssertionError("the step has begun")

    labels = np.where(np.arange(LABELS.size) == 2, bad, LABELS).astype(np.int32)
    for as_array in (np.asarray, jnp.asarray):
        batch = {**toy.batch(), "label": as_array(labels)}
        with pytest.raises(ValueError, match=rf"labels must lie in 0..3, got {bad} at position 2"):
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


LPA = lpa_jax.lpa(RADIUS)


@pytest.mark.parametrize(
    ("perturbations", "message"),
    [
        (
            {"hiden1": LPA},
            r"unknown layer 'hiden1'; the injection points are: input, hidden1, hidden2, logits$",
        ),
        (
            {("hidden1", "hiden2"): LPA},
            r"unknown layer 'hiden2'; the injection points are: input, hidden1, hidden2, logits$",
        ),
        (
            {("input", "hidden1"): LPA, "hidden1": LPA},
            r"layer 'hidden1' is named twice in perturbations; use perturbations.chain .*$",
        ),
        (
            {("hidden1", "hidden1"): LPA},
            r"layer 'hidden1' is named twice in perturbations",
        ),
        (
            {"hidden1": 0.1},
            r"perturbations\['hidden1'\] must be a Perturbation, got float$",
        ),
    ],
)
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


def test_integer_activation_is_refused():
    batch = {**toy.batch(), "image": toy.batch()["image"].astype(np.uint8)}
    with pytest.raises(
        ValueError, match=r"only a floating activation can be perturbed, 'input' is"
    ):
        start(MODEL, {"input": LPA}, batch=batch).after(1, batch)


def test_assignment_for_another_number_of_classes_is_refused():
    perturbations = {"hidden1": lpa_jax.lpa(RADIUS, assignment=lpa_jax.custom([1, 1]))}
    with pytest.raises(ValueError, match="made for 2 classes, the network has 4"):
        start(MODEL, perturbations)
