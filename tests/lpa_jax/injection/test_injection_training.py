"""One network in several forms, staged, cut or two functions: a step must not tell them apart."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import lpa_jax
from lpa_jax import injection
from tests.helpers import toy
from tests.helpers.cut_networks import NNXBlock, NNXNet
from tests.helpers.toy import CLASSES, assert_trees_close, assert_trees_equal, recording

OPTIMIZER = optax.sgd(0.1, momentum=0.9)
FIXED = lpa_jax.custom(toy.SIGN, toy.MULTIPLIER)


def perturbations_at(first, second=None):
    steps = 2 if second else 1
    perturbations = {first: recording(lpa_jax.lpa(0.3, steps=steps, assignment=FIXED))}
    if second:
        perturbations[second] = lpa_jax.lpa(0.2, mode="free", assignment=FIXED)
    return perturbations


class Run(NamedTuple):
    first: lpa_jax.TrainState
    step: object
    flops: float

    def after(self, steps):
        state = self.first
        for _ in range(steps):
            state, _ = self.step(state, toy.batch())
        return state


def start(model, perturbations, donate=False):
    state = lpa_jax.TrainState.create(
        model, OPTIMIZER, jax.random.key(0), toy.batch(), perturbations
    )
    step = functools.partial(lpa_jax.lpa_step, perturbations=perturbations)
    # A compiled step refuses a state of any other structure, so none can creep in.
    compiled = jax.jit(step, donate_argnums=(0,) if donate else ()).lower(state, toy.batch())
    compiled = compiled.compile()
    return Run(state, compiled, compiled.cost_analysis()["flops"])


STAGED = toy.NormalizedMLP(CLASSES)


@functools.cache
def staged_run():
    return start(STAGED, perturbations_at("hidden1", "hidden2"))


def test_injected_module_trains_as_the_staged_model_does():
    network = lpa_jax.inject(STAGED, "hidden1", "hidden2")
    assert not isinstance(network, injection.StagedNetwork)
    injected = start(network, perturbations_at("hidden1", "hidden2"))
    expected, found = staged_run().after(2), injected.after(2)
    for field in ("params", "model_state", "opt_state", "perturbation_state"):
        assert_trees_close(getattr(found, field), getattr(expected, field), rtol=1e-6)
    assert injected.flops < 1.02 * staged_run().flops


class Convolutional(nn.Module):
    """Convolutions and BatchNorm below and above the cut, of which XLA merges no two passes."""

    @nn.compact
    def __call__(self, images, train=False):
        x = images
        for name in ("first", "second", "third"):
            x = nn.Conv(4, (3, 3), use_bias=False, name=f"{name}_conv")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, name=name)(x))
        return nn.Dense(CLASSES)(x.mean((1, 2)))


def test_injected_module_runs_what_lies_below_the_cut_once():
    perturbations = {"second": lpa_jax.lpa(0.1, mode="free", assignment=FIXED)}
    texts = [
        start(lpa_jax.inject(Convolutional(), "second"), chosen).step.as_text()
        for chosen in ({}, perturbations)
    ]
    plain, free = (text.count(" convolution(") for text in texts)
    assert free == plain == 8


def pure(module_or_state, *kinds):
    state = module_or_state
    if isinstance(state, nnx.Module):
        state = nnx.state(state, nnx.Any(*kinds))
    return jax.tree.map(np.array, nnx.to_pure_dict(state))


def test_nnx_module_trains_as_the_staged_model_does_and_is_left_as_it_was():
    module = NNXNet(rate=0.0)
    layers = {"hidden1": module.blocks[0].dense, "hidden2": module.blocks[1].dense}
    for name, layer in {**layers, "logits": module.head}.items():
        dense = staged_run().first.params[name]["dense"]
        layer.kernel[...], layer.bias[...] = dense["kernel"], dense["bias"]
    before = pure(module, nnx.Param, nnx.BatchStat)

    network = lpa_jax.inject(module, "blocks/0", "blocks/1")
    # The state is donated: its arrays must not be the module's own.
    injected = start(network, perturbations_at("blocks/0", "blocks/1"), donate=True).after(2)

    staged = staged_run().after(2)
    params, statistics = pure(injected.params), pure(injected.model_state["nnx"])
    assert_trees_close(params["head"], dict(staged.params["logits"]["dense"]))
    for index, name in enumerate(("hidden1", "hidden2")):
        block = {**params["blocks"][index]["norm"], **params["blocks"][index]["dense"]}
        expected = {**staged.params[name]["norm"], **staged.params[name]["dense"]}
        assert_trees_close(block, expected)
        assert_trees_close(
            statistics["blocks"][index]["norm"],
            dict(staged.model_state["batch_stats"][name]["norm"]),
        )
    assert_trees_close(
        injected.perturbation_state["blocks/0"]["inner"],
        staged.perturbation_state["hidden1"]["inner"],
    )
    assert_trees_equal(pure(module, nnx.Param, nnx.BatchStat), before)
    assert type(module.blocks[0]) is NNXBlock


def test_sequential_of_library_layers_trains_as_the_two_functions_it_consists_of():
    def tokens(images):
        return images.reshape(images.shape[0], -1, 1)

    def pool(h):
        return jnp.mean(h, axis=1)

    attention = nn.MultiHeadDotProductAttention(num_heads=2)
    module = nn.Sequential(
        [tokens, nn.Dense(4), attention, nn.LayerNorm(), pool, nn.Dense(CLASSES)]
    )
    injected = start(lpa_jax.inject(module, "layers_2"), perturbations_at("layers_2"))

    def encode(params, images):
        h = nn.Dense(4).apply({"params": params["layers_1"]}, tokens(images))
        return nn.MultiHeadDotProductAttention(num_heads=2).apply({"params": params["layers_2"]}, h)

    def decode(params, h):
        h = nn.LayerNorm().apply({"params": params["layers_3"]}, h)
        return nn.Dense(CLASSES).apply({"params": params["layers_5"]}, pool(h))

    functions = lpa_jax.CutFunctions(
        encode, decode, init_params=lambda rng, images: injected.first.params
    )
    assert functions.layers == ("input", "hidden", "logits")
    cut_by_hand = start(functions, perturbations_at("hidden"))
    found, expected = injected.after(2), cut_by_hand.after(2)
    assert_trees_close(found.params, expected.params)
    assert_trees_close(found.perturbation_state["layers_2"], expected.perturbation_state["hidden"])
    moved = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), found.params, injected.first.params)
    assert moved["layers_1"]["kernel"] > 1e-4
