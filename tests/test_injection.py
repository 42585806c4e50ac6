"""Cutting networks that were not made to be cut: Linen and NNX modules and pairs of functions."""

import functools
import itertools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from flax import nnx
from toy import CLASSES, LABELS, assert_trees_close, assert_trees_equal, recording

import lpa_jax
from lpa_jax import injection

WIDTHS = (8, 6)
IMAGES = toy.batch()["image"]
INPUTS = int(np.prod(toy.IMAGE))


class Block(nn.Module):
    """A block as a user writes it, compact."""

    features: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=toy.MOMENTUM)(
            nn.Dense(self.features)(x)
        )
        return nn.Dropout(0.5, deterministic=not train)(nn.relu(x))


class SetupNet(nn.Module):
    """A network as a user writes it, with `setup`."""

    def setup(self):
        self.blocks = [Block(width) for width in WIDTHS]
        self.head = nn.Dense(CLASSES)

    def __call__(self, images, train: bool = False):
        x = images.reshape(images.shape[0], -1)
        for block in self.blocks:
            x = block(x, train)
        return self.head(x)


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic):
        for index, width in enumerate(WIDTHS):
            x = Block(width, name=f"block_{index}")(x, not deterministic)
        return x


class CompactNet(nn.Module):
    """Compact, nested and with the switch the other way round; dropout also between the two."""

    @nn.compact
    def __call__(self, images, *, deterministic):
        x = Encoder(name="encoder")(images.reshape(images.shape[0], -1), deterministic)
        return nn.Dense(CLASSES, name="head")(nn.Dropout(0.5, deterministic=deterministic)(x))


class NNXBlock(nnx.Module):
    def __init__(self, inputs, features, rate, rngs):
        self.dense = nnx.Linear(inputs, features, rngs=rngs)
        self.norm = nnx.BatchNorm(features, momentum=toy.MOMENTUM, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        return self.dropout(nnx.relu(self.norm(self.dense(x))))


class NNXNet(nnx.Module):
    """An NNX network as a user writes it."""

    def __init__(self, rate=0.5, rngs=None):
        rngs = rngs or nnx.Rngs(0)
        widths = zip((INPUTS, *WIDTHS), WIDTHS, strict=False)
        self.blocks = nnx.List([NNXBlock(a, b, rate, rngs) for a, b in widths])
        self.head = nnx.Linear(WIDTHS[-1], CLASSES, rngs=rngs)

    def __call__(self, images):
        x = images.reshape(images.shape[0], -1)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@functools.cache
def nnx_module():
    return NNXNet()


class Cut(NamedTuple):
    """A cut network and what a test must know of it."""

    network: injection.Network
    paths: tuple
    plain: object  # (variables, images, train, rng) -> logits, new state
    dense: object  # (variables, index) -> kernel, bias of block `index` or, for -1, the head
    statistics: object  # (state, index) -> mean, var of block `index`


def plain_linen(module, switch):
    @functools.partial(jax.jit, static_argnames="train")
    def plain(variables, images, train, rng):
        rngs, mutable = ({"dropout": rng}, ["batch_stats"]) if train else (None, [])
        return module.apply(variables, images, rngs=rngs, mutable=mutable, **switch(train))

    return plain


def linen_cut(module, switch, block_at, paths):
    def at(tree, index):
        return functools.reduce(lambda node, name: node[name], block_at(index), tree)

    def dense(variables, index):
        layer = variables["params"]["head"] if index < 0 else at(variables["params"], index)
        layer = layer if index < 0 else layer["Dense_0"]
        return layer["kernel"], layer["bias"]

    def statistics(state, index):
        norm = at(state["batch_stats"], index)["BatchNorm_0"]
        return norm["mean"], norm["var"]

    network = lpa_jax.inject(module, *paths)
    return Cut(network, paths, plain_linen(module, switch), dense, statistics)


def nnx_cut():
    def plain(variables, images, train, rng):
        assert not train  # its masks would be drawn from the streams that the module holds
        del rng
        module = nnx.clone(nnx_module())
        nnx.update(module, variables["params"], variables["nnx"])
        module.eval()
        return module(images), None

    def dense(variables, index):
        params = variables["params"]
        layer = params["head"] if index < 0 else params["blocks"][index]["dense"]
        return layer["kernel"][...], layer["bias"][...]

    def statistics(state, index):
        norm = state["nnx"]["blocks"][index]["norm"]
        return norm["mean"][...], norm["var"][...]

    paths = ("blocks/0", "blocks/1")
    return Cut(lpa_jax.inject(nnx_module(), *paths), paths, plain, dense, statistics)


@functools.cache
def cut(name):
    if name == "setup":
        return linen_cut(
            SetupNet(),
            lambda train: {"train": train},
            lambda index: (f"blocks_{index}",),
            ("blocks_0", "blocks_1"),
        )
    if name == "compact":
        return linen_cut(
            CompactNet(),
            lambda train: {"deterministic": not train},
            lambda index: ("encoder", f"block_{index}"),
            ("encoder/block_0", "encoder"),
        )
    return nnx_cut()


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
        logits, state = injection.forward(network, variables, images, taps, train=True, rng=rng)
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
        return injection.forward(network, variables, images, taps, train=False, rng=None)[0]

    plain, _ = cut(name).plain(variables, -IMAGES, False, None)
    np.testing.assert_allclose(forward(variables, IMAGES), 2.0 * plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["setup", "nnx"])
def test_gradient_reaches_the_parameters_below_through_the_tap_alone(name):
    network, variables = cut(name).network, variables_of(name)
    path = cut(name).paths[1]

    def total(params, keep):
        taps = {path: lambda h, decode: keep * h + (1 - keep) * jnp.ones_like(h)}
        logits, _ = injection.forward(
            network, {**variables, "params": params}, IMAGES, taps, train=False, rng=None
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

        logits, _ = injection.forward(
            network, {**variables, "params": params}, IMAGES, {path: tap}, train=False, rng=None
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

    def second(h, decode):
        seen["second"] = decode(h)
        return 2.0 * h

    taps = {"first": lambda h, decode: seen.setdefault("first", h + 1.0), "second": second}
    logits, _ = injection.forward(network, variables, IMAGES, taps, train=False, rng=None)
    kernel, bias = (variables["params"]["second"][key] for key in ("kernel", "bias"))
    above = seen["first"] @ kernel + bias[None]
    np.testing.assert_allclose(seen["second"], seen["first"] + above, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logits, seen["first"] + 2.0 * above, rtol=1e-5, atol=1e-6)


# The same network in four forms: a step must not tell them apart.

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
        network.advance(variables, IMAGES, {}, "logits", train=True, rng=jax.random.key(seed))[0]
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
        return network.advance(variables, IMAGES, {}, "logits", train=True, rng=rng)[0]

    found = outputs(network.init(None, None), jax.random.key(1))
    masks = np.asarray(found[:, :128] == 0).reshape(-1, 4, 32)
    for a, b in itertools.combinations(range(4), 2):
        assert 0.3 < np.mean(masks[:, a]) < 0.7
        assert 0.3 < np.mean(masks[:, a] != masks[:, b]) < 0.7


def test_paths_are_listed_in_the_order_of_the_pass():
    found = injection.submodule_paths(CompactNet(), IMAGES, deterministic=True)
    assert found.index("encoder/block_0") < found.index("encoder/block_1") < found.index("encoder")
    assert {"blocks/0", "blocks/1", "blocks/1/dropout", "head"} <= set(
        injection.nnx_submodule_paths(nnx_module())
    )
