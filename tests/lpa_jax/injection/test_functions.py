"""Two functions as a network: with a mode, a key and a state, and params of other libraries."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lpa_jax
from lpa_jax import injection
from lpa_jax.injection import Pass
from tests.helpers import toy
from tests.helpers.toy import CLASSES, LABELS

X = toy.batch()["image"].reshape(LABELS.size, -1)
BATCH = {"image": X, "label": LABELS}
WIDTH = 8


class Transformed(NamedTuple):
    """What haiku's `transform_with_state` returns: pure `init` and `apply`."""

    init: Any
    apply: Any


def haiku_like(outputs, name):
    """Linear, BatchNorm and dropout, with params and state by module name."""

    def init(rng, x):
        w = jax.random.normal(rng, (x.shape[-1], outputs)) / x.shape[-1] ** 0.5
        return {f"{name}/linear": {"w": w}}, {f"{name}/norm": {"mean": jnp.zeros(outputs)}}

    def apply(params, state, rng, x, is_training):
        h = x @ params[f"{name}/linear"]["w"]
        mean = h.mean(0) if is_training else state[f"{name}/norm"]["mean"]
        if is_training:
            old = state[f"{name}/norm"]["mean"]
            state = {**state, f"{name}/norm": {"mean": 0.9 * old + 0.1 * mean}}
        h = h - mean[None]
        if is_training:
            h = h * jax.random.bernoulli(rng, 0.9, h.shape)
        return jnp.tanh(h), state

    return Transformed(init, apply)


BODY, HEAD = haiku_like(WIDTH, "body"), haiku_like(CLASSES, "head")


def made(index):
    def init(rng, x):
        body, head = BODY.init(rng, x), HEAD.init(rng, jnp.ones((1, WIDTH)))
        return {**body[index], **head[index]}

    return init


def encode(params, x, *, train, rng, state):
    return BODY.apply(params, state, rng, x, train)


def decode(params, h, *, train, rng, state):
    rng = None if rng is None else jax.random.fold_in(rng, 1)
    return HEAD.apply(params, state, rng, h, train)


NETWORK = lpa_jax.CutFunctions(encode, decode, init_params=made(0), init_state=made(1))


def test_functions_get_mode_key_and_state_and_only_training_keeps_the_state():
    variables = NETWORK.init(jax.random.key(0), X)
    rng = jax.random.key(1)
    h, below = BODY.apply(variables["params"], variables["state"], rng, X, True)
    expected, after = decode(variables["params"], h, train=True, rng=rng, state=below)
    taps = {"hidden": lambda h, decode: h}
    logits, state = injection.run_perturbed(NETWORK, Pass(variables, X, True, rng), taps)
    np.testing.assert_allclose(logits, expected, rtol=1e-6)
    toy.assert_trees_close(state["state"], after)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(state))
    logits, state = NETWORK.run(Pass(variables, X), {}, "logits")
    toy.assert_trees_equal(state["state"], variables["state"])
    assert not np.allclose(logits, expected)


def test_functions_with_state_train_and_update_it_once_a_step():
    perturbations = {"hidden": lpa_jax.lpa(0.2, steps=2, assignment=lpa_jax.all_positive())}
    create = functools.partial(
        lpa_jax.TrainState.create, NETWORK, optax.sgd(0.1), jax.random.key(0), BATCH
    )
    perturbed, plain = create(perturbations), create()
    step = functools.partial(lpa_jax.lpa_step, perturbations=perturbations)
    after = jax.jit(step)(perturbed, BATCH)[0].model_state["state"]
    expected = jax.jit(lpa_jax.lpa_step)(plain, BATCH)[0].model_state["state"]
    toy.assert_trees_close(after["body/norm"], expected["body/norm"])


@jax.tree_util.register_pytree_node_class
class Module:
    """A model that is its own tree of arrays, with a function in it, as in equinox."""

    def __init__(self, weight, activation):
        self.weight, self.activation = weight, activation

    def __call__(self, x):
        return self.activation(x @ self.weight)

    def tree_flatten(self):
        return (self.weight,), self.activation

    @classmethod
    def tree_unflatten(cls, activation, leaves):
        return cls(leaves[0], activation)


def test_params_of_any_tree_train_with_parts_frozen_and_momentum():
    def init(rng, x):
        body, head = jax.random.split(rng)
        return {
            "body": Module(jax.random.normal(body, (x.shape[-1], WIDTH)), jnp.tanh),
            "head": Module(0.1 * jax.random.normal(head, (WIDTH, CLASSES)), jnp.asarray),
        }

    network = lpa_jax.CutFunctions(
        lambda params, x: params["body"](x), lambda params, h: params["head"](h), init_params=init
    )
    frozen = optax.multi_transform(
        {"train": optax.chain(optax.ema(0.5), optax.sgd(0.1)), "freeze": optax.set_to_zero()},
        lambda params: {"body": "freeze", "head": "train"},
    )
    perturbations = {"hidden": lpa_jax.lpa(0.2, steps=1, assignment=lpa_jax.all_positive())}
    first = state = lpa_jax.TrainState.create(
        network, frozen, jax.random.key(0), BATCH, perturbations
    )
    step = jax.jit(functools.partial(lpa_jax.lpa_step, perturbations=perturbations))
    for _ in range(3):
        state, _ = step(state, BATCH)
    assert np.array_equal(state.params["body"].weight, first.params["body"].weight)
    assert np.abs(state.params["head"].weight - first.params["head"].weight).max() > 1e-4
    assert state.params["body"].activation is jnp.tanh


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ({"init_state": made(1)}, "encode or decode must take state with init_state, got neither"),
        ({"encode": encode}, "init_state is needed for functions that take state, got None"),
        (
            {"encode": lambda params, x, state: x, "init_state": made(1)},
            r"a function that takes state must return \(result, state\), got ",
        ),
    ],
)
def test_a_state_that_is_not_made_taken_or_returned_is_refused(functions, message):
    functions = {"encode": lambda p, x: x, "decode": lambda p, h: h, **functions}

    def run():
        network = lpa_jax.CutFunctions(**functions, init_params=lambda rng, x: {})
        network.run(Pass(network.init(jax.random.key(0), X), X), {}, "hidden")

    with pytest.raises(ValueError, match=message):
        run()
