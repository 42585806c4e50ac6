"""What an optimizer gets besides the gradient: the value of the objective, and functions of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lpa_jax
from lpa_jax.models import MLP
from tests.helpers import toy

BATCH = toy.batch(np.arange(8) % toy.CLASSES)
MODEL = MLP(toy.CLASSES, hidden=(6,))
PERTURBATIONS = {"hidden1": lpa_jax.lpa(0.1, steps=1, assignment=lpa_jax.all_positive())}


def make(optimizer, perturbations=None):
    return lpa_jax.TrainState.create(
        MODEL, optimizer, jax.random.key(0), BATCH, perturbations or {}
    )


def trained(optimizer, steps, perturbations=None, devices=1):
    state = make(optimizer, perturbations)
    step = functools.partial(lpa_jax.lpa_step, perturbations=perturbations)
    if devices == 1:
        return functools.reduce(lambda s, _: jax.jit(step)(s, BATCH)[0], range(steps), state)

    @jax.jit
    def mapped(state, batch):
        on_each = functools.partial(step, axis_name="devices")
        results = jax.vmap(on_each, in_axes=(None, 0), axis_name="devices")(state, batch)
        return jax.tree.map(lambda values: values[0], results)

    shards = lpa_jax.parallel.shard_batch(BATCH, devices)
    return functools.reduce(lambda s, _: mapped(s, shards)[0], range(steps), state)


def losses(params):
    logits = MODEL.apply({"params": params}, BATCH["image"])
    return jnp.mean(lpa_jax.cross_entropy(logits, jax.nn.one_hot(BATCH["label"], toy.CLASSES)))


def test_lbfgs_takes_the_steps_of_a_loop_around_optax():
    optimizer = optax.lbfgs()
    params = make(optimizer).params
    expected, opt_state = params, optimizer.init(params)

    @jax.jit
    def update(params, opt_state):
        value, grad = jax.value_and_grad(losses)(params)
        updates, opt_state = optimizer.update(
            grad, opt_state, params, value=value, grad=grad, value_fn=losses
        )
        return optax.apply_updates(params, updates), opt_state

    for _ in range(3):
        expected, opt_state = update(expected, opt_state)
    toy.assert_trees_close(trained(optimizer, 3).params, expected, rtol=1e-4, atol=1e-5)
    assert losses(expected) < 0.5 * losses(params)


SEARCHES = {
    "zoom": lambda: optax.lbfgs(),
    "backtracking": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5, store_grad=True)
    ),
}


@pytest.mark.parametrize("search", ["backtracking", pytest.param("zoom", marks=pytest.mark.slow)])
def test_a_line_search_under_perturbation_is_the_same_on_two_devices(search):
    one = trained(SEARCHES[search](), 2, PERTURBATIONS)
    two = trained(SEARCHES[search](), 2, PERTURBATIONS, devices=2)
    toy.assert_trees_close(one.params, two.params, rtol=1e-4, atol=1e-5)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), one.params, make(optax.sgd(1)).params)
    assert max(jax.tree.leaves(moved)) > 1e-2


@pytest.mark.parametrize("wrap", [lambda o: o, lambda o: optax.MultiSteps(o, 2)])
def test_reduce_on_plateau_gets_the_value(wrap):
    plateau = optax.contrib.reduce_on_plateau(patience=0, factor=0.5, rtol=0.0, atol=100.0)
    state = trained(wrap(optax.chain(optax.sgd(0.0), plateau)), 6)
    plateau_state = getattr(state.opt_state, "inner_opt_state", state.opt_state)[-1]
    assert plateau_state.scale < 1
    np.testing.assert_allclose(plateau_state.best_value, losses(state.params), rtol=1e-6)


def test_the_value_is_the_objective_with_its_penalties():
    def update(updates, state, params=None, *, value, value_fn, obj_fn, **rest):
        return updates, jnp.stack([value, value_fn(params), obj_fn(params)])

    record = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(3), update)
    penalties = {"decoupling": lpa_jax.penalties.create("spectral_decoupling", weight=1.0)}
    state = lpa_jax.TrainState.create(
        MODEL, record, jax.random.key(0), BATCH, PERTURBATIONS, penalties
    )
    step = functools.partial(lpa_jax.lpa_step, perturbations=PERTURBATIONS, penalties=penalties)
    new, pairs = jax.jit(step)(state, BATCH)
    found = lpa_jax.metrics.compute(pairs)
    expected = found["loss"] + found["penalty/decoupling"]
    np.testing.assert_allclose(new.opt_state, np.full(3, expected), rtol=1e-6)
    assert found["penalty/decoupling"] > 1e-3


def test_an_optimizer_that_needs_something_else_is_refused():
    def update(updates, state, params=None, *, loss_history, **rest):
        return updates, state

    optimizer = optax.GradientTransformationExtraArgs(lambda params: (), update)
    with pytest.raises(ValueError, match=r"optimizer must need no .* also needs 'loss_history'$"):
        lpa_jax.lpa_step(make(optimizer), BATCH)
    with pytest.raises(ValueError, match=r"optimizer must be an optax transformation, got float$"):
        make(0.1)
