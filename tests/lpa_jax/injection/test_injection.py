"""Cutting networks that were not made to be cut: Linen and NNX modules and pairs of functions."""

import functools
import itertools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lpa_jax
from lpa_jax import injection
from lpa_jax.injection import Pass, staged
from lpa_jax.models import MLP
from tests.helpers import toy
from tests.helpers.cut_networks import IMAGES, INPUTS, CompactNet, cut, nnx_module
from tests.helpers.toy import CLASSES, LABELS, assert_trees_close

NAMES = ("setup", "compact", "nnx")
every_cut = pytest.mark.parametrize("name", NAMES)


@functools.cache
def variables_of(name):
    """Variables whose statistics are not those of initialisation, so that evaluation differs."""
    variables = cut(name).network.init(jax.random.key(0), IMAGES)
    state = jax.tree.map(lambda v: v + 0.25, injection.model_state(variables))
    return {"params": variables["params"], **state}


class Walk(NamedTuple):
    """One training pass, tapped everywhere, and evaluation passes cut in two."""

    seen: dict
    decoded: dict
    logits: jax.Array
    state: dict
    composed: dict
    replaced: jax.Array
    replaced_input: jax.Array


@functools.cache
def walk(name, seed=1):
    return walker(name)(variables_of(name), IMAGES, jax.random.key(seed))


@functools.cache
def walker(name):
    network = cut(name).network

    @jax.jit
    def run(variables, images, rng):
        seen, decoded = {}, {}

        def tap_of(layer):
            def tap(h, decode):
                seen[layer], decoded[layer] = h, decode(h)
                return h

            return tap

        taps = {layer: tap_of(layer) for layer in network.layers}
        logits, state = injection.run_perturbed(network, Pass(variables, images, True, rng), taps)
        composed = {}
        for layer in network.layers:
            h = lpa_jax.encode(network, variables, images, layer)
            composed[layer] = lpa_jax.decode(network, variables, h, layer, inputs=images)
        last = network.layers[-2]
        replaced = lpa_jax.decode(
            network, variables, jnp.full_like(seen[last], 0.5), last, inputs=images
        )
        replaced_input = lpa_jax.decode(network, variables, -images, "input", inputs=images)
        return Walk(seen, decoded, logits, state, composed, replaced, replaced_input)

    return run


@every_cut
def test_layers_are_the_paths_between_input_and_logits(name):
    assert cut(name).network.layers == ("input", *cut(name).paths, "logits")


@every_cut
def test_encode_and_decode_compose_to_the_plain_network(name):
    plain, _ = cut(name).plain(variables_of(name), IMAGES, False, None)
    for layer in cut(name).network.layers:
        np.testing.assert_allclose(walk(name).composed[layer], plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["setup", "compact"])
def test_tapped_training_pass_is_the_plain_one(name):
    plain, state = cut(name).plain(variables_of(name), IMAGES, True, jax.random.key(1))
    np.testing.assert_allclose(walk(name).logits, plain, rtol=1e-5, atol=1e-6)
    assert_trees_close(walk(name).state, dict(state))


@every_cut
def test_pinned_activation_replaces_the_networks_own(name):
    kernel, bias = cut(name).dense(variables_of(name), -1)
    expected = 0.5 * np.sum(kernel, axis=0) + bias
    np.testing.assert_allclose(
        walk(name).replaced, np.tile(expected, (LABELS.size, 1)), rtol=1e-5, atol=1e-6
    )
    plain, _ = cut(name).plain(variables_of(name), -IMAGES, False, None)
    np.testing.assert_allclose(walk(name).replaced_input, plain, rtol=1e-5, atol=1e-6)


@every_cut
def test_contract_11_decode_drops_what_the_training_pass_drops(name):
    first = cut(name).paths[0]
    assert np.any(walk(name).seen[first] == 0)
    assert np.max(np.abs(walk(name).logits - walk(name).composed["input"])) > 1e-2
    for layer, decoded in walk(name).decoded.items():
        np.testing.assert_allclose(
            decoded, walk(name).logits, rtol=1e-5, atol=1e-5, err_msg=f"{name} {layer}"
        )
    assert np.any((walk(name).seen[first] == 0) != (walk(name, seed=2).seen[first] == 0))


@every_cut
def test_contract_09_statistics_are_updated_once_by_the_tapped_pass(name):
    old, below = variables_of(name), IMAGES.reshape(LABELS.size, -1)
    for index in range(2):
        kernel, bias = cut(name).dense(old, index)
        u = below @ np.asarray(kernel) + np.asarray(bias)[None]
        before = cut(name).statistics(old, index)
        after = cut(name).statistics(walk(name).state, index)
        for old_value, new_value, batch_value in zip(
            before, after, (u.mean(0), u.var(0)), strict=True
        ):
            expected = toy.MOMENTUM * old_value + (1 - toy.MOMENTUM) * batch_value
            np.testing.assert_allclose(new_value, expected, rtol=1e-5, atol=1e-6)
        below = np.asarray(walk(name).seen[cut(name).paths[0]])


@every_cut
def test_taps_at_both_ends_replace_the_input_and_the_logits(name):
    network, variables = cut(name).network, variables_of(name)
    taps = {"input": lambda x, decode: -x, "logits": lambda z, decode: 2.0 * z}

    @jax.jit
    def forward(variables, images):
        return injection.run_perturbed(network, Pass(variables, images), taps)[0]

    plain, _ = cut(name).plain(variables, -IMAGES, False, None)
    np.testing.assert_allclose(forward(variables, IMAGES), 2.0 * plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["setup", "nnx"])
def test_gradient_reaches_the_parameters_below_through_the_tap_alone(name):
    network, variables = cut(name).network, variables_of(name)
    path = cut(name).paths[1]

    def total(params, keep):
        taps = {path: lambda h, decode: keep * h + (1 - keep) * jnp.ones_like(h)}
        logits, _ = injection.run_perturbed(
            network, Pass({**variables, "params": params}, IMAGES), taps
        )
        return jnp.sum(logits**2)

    gradient = jax.jit(jax.grad(total))
    for keep in (1.0, 0.0):
        found = {"params": gradient(variables["params"], keep)}
        below, head = (cut(name).dense(found, index)[0] for index in (0, -1))
        assert np.any(below != 0) == (keep == 1.0)
        assert np.any(head != 0)


def test_no_gradient_reaches_the_parameters_through_decode():
    network, variables = cut("setup").network, variables_of("setup")
    path = cut("setup").paths[1]

    def total(params, stop):
        def tap(h, decode):
            predicted = jnp.mean(decode(jax.lax.stop_gradient(h)))
            return h + jnp.where(stop, jax.lax.stop_gradient(predicted), predicted)

        logits, _ = injection.run_perturbed(
            network, Pass({**variables, "params": params}, IMAGES), {path: tap}
        )
        return jnp.sum(logits**2)

    gradient = jax.jit(jax.grad(total))
    params = variables["params"]
    assert_trees_close(gradient(params, True), gradient(params, False))


def test_decode_sees_the_taps_below_where_the_network_skips():
    class Skip(nn.Module):
        @nn.compact
        def __call__(self, x):
            first = nn.Dense(CLASSES, name="first")(x.reshape(x.shape[0], -1))
            return first + nn.Dense(CLASSES, name="second")(first)

    network = lpa_jax.inject(Skip(), "first", "second")
    variables = network.init(jax.random.key(0), IMAGES)
    seen = {}

    chosen = jnp.array([2, 0])

    def second(h, decode):
        seen["second"] = decode(h)
        seen["part"] = decode(h[chosen], chosen)
        return 2.0 * h

    taps = {"first": lambda h, decode: seen.setdefault("first", h + 1.0), "second": second}
    logits, _ = injection.run_perturbed(network, Pass(variables, IMAGES), taps)
    kernel, bias = (variables["params"]["second"][key] for key in ("kernel", "bias"))
    above = seen["first"] @ kernel + bias[None]
    np.testing.assert_allclose(seen["second"], seen["first"] + above, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen["part"], seen["second"][chosen], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logits, seen["first"] + 2.0 * above, rtol=1e-5, atol=1e-6)


def test_functions_are_encoded_pinned_and_decoded():
    network = lpa_jax.CutFunctions(
        lambda params, x: params["scale"] * x, lambda params, h: h + params["shift"], "middle"
    )
    variables = {"params": {"scale": jnp.float32(3.0), "shift": jnp.float32(1.0)}}
    x = jnp.ones((2, CLASSES))
    assert lpa_jax.encode(network, variables, x, "middle").tolist() == (3 * x).tolist()
    assert lpa_jax.encode(network, variables, x, "input").tolist() == x.tolist()
    assert lpa_jax.encode(network, variables, x, "logits").tolist() == (3 * x + 1).tolist()
    assert lpa_jax.decode(network, variables, x, "middle").tolist() == (x + 1).tolist()
    assert lpa_jax.decode(network, variables, x, "input").tolist() == (3 * x + 1).tolist()
    assert lpa_jax.decode(network, variables, x, "logits").tolist() == x.tolist()


def test_module_with_random_streams_of_its_own_can_be_cut():
    class Streams(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.Dense(CLASSES, name="body")(x.reshape(x.shape[0], -1))
            return x * jax.random.uniform(self.make_rng("drop_path")) if train else x

    network = lpa_jax.inject(Streams(), "body")
    variables = network.init(jax.random.key(0), IMAGES)
    first, again, other = (
        network.run(Pass(variables, IMAGES, True, jax.random.key(seed)), {}, "logits")[0]
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_nnx_streams_stacked_or_not_drop_differently():
    class Stack(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=2)
            @nnx.vmap
            def make(rngs):
                return nnx.Dropout(0.5, rngs=rngs)

            self.stacked = make(rngs)
            self.single, self.other = (nnx.Dropout(0.5, rngs=rngs) for _ in range(2))
            self.head = nnx.Linear(INPUTS, CLASSES, rngs=rngs)

        def __call__(self, images):
            ones = jnp.ones((images.shape[0], 32))
            first, second = nnx.vmap(lambda block: block(ones))(self.stacked)
            logits = self.head(images.reshape(images.shape[0], -1))
            masks = [first, second, self.single(ones), self.other(ones)]
            return jnp.concatenate([*masks, logits], axis=1)

    network = lpa_jax.inject(Stack(nnx.Rngs(0)), "head")

    @jax.jit
    def outputs(variables, rng):
        return network.run(Pass(variables, IMAGES, True, rng), {}, "logits")[0]

    found = outputs(network.init(None, None), jax.random.key(1))
    masks = np.asarray(found[:, :128] == 0).reshape(-1, 4, 32)
    for a, b in itertools.combinations(range(4), 2):
        assert 0.3 < np.mean(masks[:, a]) < 0.7
        assert 0.3 < np.mean(masks[:, a] != masks[:, b]) < 0.7


def test_what_can_be_cut_is_listed_in_the_order_of_the_pass_with_its_shape():
    found = injection.submodule_paths(CompactNet(), IMAGES)
    assert [path for path in found if path in ("encoder", "head") or path.count("/") == 1] == [
        "encoder/block_0",
        "encoder/block_1",
        "encoder",
        "head",
    ]
    assert found["encoder/block_0"].shape == (LABELS.size, 8)
    found = injection.submodule_paths(nnx_module(), IMAGES)
    assert list(found)[-2:] == ["blocks/1", "head"]
    assert found["blocks/1"].shape == (LABELS.size, 6)
    assert set(found) == set(injection.nnx_submodule_paths(nnx_module()))


def test_equal_models_share_the_compilation_that_draws_their_variables():
    inputs, before = jnp.zeros((2, 5)), staged._compiled_init(False)._cache_size()
    made = [injection.as_network(MLP(3, hidden=(7,))).init(jax.random.key(0), inputs)]
    made += [injection.as_network(MLP(3, hidden=(7,))).init(jax.random.key(0), inputs)]
    assert staged._compiled_init(False)._cache_size() == before + 1
    # A list has no hash.
    made += [injection.as_network(MLP(3, hidden=[7])).init(jax.random.key(0), inputs)]
    for variables in made[1:]:
        toy.assert_trees_equal(variables, made[0])
