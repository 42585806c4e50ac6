"""A training step of one's own, made of `perturbed_forward`, is `lpa_step` to the last bit."""

import functools

import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lpa_jax
from lpa_jax import losses, penalties, perturbations, training
from tests.helpers import toy

RULE = lpa_jax.by_confidence(kappa=1.0, ema=0.5)
PLANS = {
    "cold": {"hidden1": lpa_jax.lpa(0.3, 1, assignment=RULE), "logits": lpa_jax.lpl(0.5, 1)},
    "carry": {"hidden1": lpa_jax.lpa(0.3, mode="carry")},
    "free": {"hidden2": lpa_jax.lpa(0.3, mode="free", assignment=RULE)},
    "drawn": {("input", "hidden1"): lpa_jax.manifold_mixup()},
}


@pytest.mark.parametrize(
    "name", ["cold", "free", "drawn", pytest.param("carry", marks=pytest.mark.slow)]
)
def test_a_loop_with_flax_train_state_is_lpa_step(name):
    plan, batch = PLANS[name], toy.batch()
    batch["label"] = np.where(np.arange(6) == 3, -1, batch["label"])
    model = toy.NormalizedMLP(toy.CLASSES, dropout=0.2)
    theirs = lpa_jax.TrainState.create(model, optax.adam(0.1), jax.random.key(0), batch, plan)
    network, key = theirs.network, theirs.rng
    mine = flax.training.train_state.TrainState.create(
        apply_fn=None, params=theirs.params, tx=optax.adam(0.1)
    )
    model_state = theirs.model_state
    states = lpa_jax.initial_states(plan, network, theirs.variables, batch)

    @jax.jit
    def step(state, model_state, states, batch):
        def objective(params, probes):
            variables = {"params": params, **model_state}
            rng = jax.random.fold_in(key, state.step)
            out = lpa_jax.perturbed_forward(
                plan, states, network, variables, batch, rng=rng, probes=probes
            )
            return out.mean(lpa_jax.cross_entropy(out.logits, out.targets)), out

        variables = {"params": state.params, **model_state}
        probes = training.zero_probes(plan, network, variables, batch)
        gradient = jax.grad(objective, argnums=(0, 1), has_aux=True)
        (by_params, by_probes), out = gradient(state.params, probes)
        states = training.learned_states(plan, out, by_probes)
        return state.apply_gradients(grads=by_params), out.model_state, states

    lpa_step = jax.jit(functools.partial(lpa_jax.lpa_step, perturbations=plan))
    for _ in range(3):
        mine, model_state, states = step(mine, model_state, states, batch)
        theirs, _ = lpa_step(theirs, batch)
    toy.assert_trees_equal(mine.params, theirs.params)
    toy.assert_trees_equal(model_state, theirs.model_state)
    toy.assert_trees_equal(states, theirs.perturbation_state)


def forward(plan=None, states=None, batch=None, **options):
    model = lpa_jax.models.MLP(num_classes=4, hidden=(8,))
    batch = toy.batch() if batch is None else batch
    variables = lpa_jax.injection.as_network(model).init(jax.random.key(0), toy.batch()["image"])
    plan = {"hidden1": lpa_jax.lpa(0.1)} if plan is None else plan
    states = {"hidden1": {}} if states is None else states
    return lpa_jax.perturbed_forward(
        plan, states, model, variables, batch, rng=jax.random.key(0), **options
    )


def refusals():
    batch, free = toy.batch(), {"hidden1": lpa_jax.lpa(0.1, mode="free")}
    model = lpa_jax.models.MLP(num_classes=4, hidden=(8,))
    state = lpa_jax.TrainState.create(model, optax.sgd(0.1), jax.random.key(0), batch)
    step = functools.partial(lpa_jax.lpa_step, state)
    without = {"image": batch["image"]}
    yield "states must have one for layer 'hidden1'", lambda: forward(states={})
    yield "probes must be those of zero_probes", lambda: forward(free)
    yield "must have an entry 'label'", lambda: forward(batch=without)
    yield "must have an entry 'label'", lambda: step(without)
    yield "must have an entry 'label'", lambda: lpa_jax.eval_step(state, without)
    yield "must have an entry 'image'", lambda: step({"label": batch["label"]})
    yield "perturbations must be a dictionary", lambda: step(batch, perturbations=[lpa_jax.lpa()])
    yield "penalties must be a dictionary", lambda: step(batch, penalties=[penalties.isda])
    yield "must be a Perturbation, got float", lambda: step(batch, perturbations={"hidden1": 0.1})
    mask = np.ones((6, 2))
    yield "mask'.* must have the first axes", lambda: step({**batch, "mask": mask})
    yield "unknown layer 'hiden1'", lambda: forward({"hiden1": lpa_jax.lpa(0.1)})
    yield (
        "batch must have an entry 'image'",
        lambda: lpa_jax.TrainState.create(model, optax.sgd(0.1), jax.random.key(0), {}),
    )


def test_what_does_not_fit_is_refused_in_one_line():
    for match, call in refusals():
        with pytest.raises(ValueError, match=match) as error:
            call()
        assert "\n" not in str(error.value)


def test_watched_layers_come_back_as_the_layers_above_got_them():
    shift = perturbations.stateless("shift", lambda site: (site.activation + 1.0, site.targets))
    plain, moved = forward({}, watch=["hidden1"]), forward({"hidden1": shift}, watch=["hidden1"])
    np.testing.assert_allclose(
        moved.features["hidden1"], plain.features["hidden1"] + 1.0, rtol=1e-6
    )
    assert np.any(moved.logits != plain.logits)


def test_a_state_prints_as_a_short_summary():
    plan = PLANS["free"]
    added = {"sd": penalties.spectral_decoupling()}
    model = lpa_jax.models.MLP(num_classes=4, hidden=(8, 6))
    state = lpa_jax.TrainState.create(
        model, optax.sgd(0.1), jax.random.key(0), toy.batch(), plan, added
    )
    expected = (
        "TrainState(step 0, network: MLP cut at input, hidden1, hidden2, logits, 122 parameters"
    )
    assert str(state) == f"{expected}, 4 classes, perturbations at: hidden2, penalties: sd)"
    jax.eval_shape(lambda state: print(state), state)  # traced, too


def test_every_method_prints_as_the_call_that_makes_it():
    text = "lpa(radius=0.1, steps=3, assignment=by_confidence(kappa=0.0, ema=0.0), mode='cold', "
    assert str(lpa_jax.lpa(radius=0.1)).startswith(text)
    assert str(lpa_jax.lpa(mode="free")).startswith("lpa(radius=0.03, steps=1, ")
    assert str(lpa_jax.lpa(radius=0)).startswith("lpa(radius=0, steps=3, ")
    text = "by_frequency(counts=[3.0, 1.0], split=0.4, kappa=0.0)"
    assert str(lpa_jax.by_frequency([3, 1])) == text
    assert str(lpa_jax.chain(lpa_jax.dropout(), lpa_jax.rsc(0.5))).startswith(
        "chain(dropout(rate=0.5), rsc(drop_f=0.5, drop_b="
    )
    assert (
        str(losses.ldam(np.arange(1, 100)))
        == "ldam(counts=<99 values>, max_margin=0.5, scale=30.0)"
    )
    for registry, given in (
        (perturbations, {"num_domains": 2}),
        (penalties, {"num_domains": 2, "layer": "pool", "total_steps": 1}),
        (losses, {"counts": [1, 2]}),
    ):
        for name in registry.names():
            known = registry.options(name)
            options = {
                key: value for key, value in given.items() if key in known or key == "counts"
            }
            text = str(registry.create(name, **options))
            assert text == name or (text.startswith(f"{name}(") and text.endswith(")")), text
            assert "\n" not in text and " at 0x" not in text
    for rule in (lpa_jax.all_positive(), lpa_jax.all_negative(), lpa_jax.custom([1, -1])):
        assert str(rule).startswith(f"{rule.name}(")

    def traced(radius):
        assert str(lpa_jax.lpa(radius)).startswith("lpa(radius=<traced>, ")
        return jnp.zeros(())

    jax.eval_shape(traced, 0.1)
