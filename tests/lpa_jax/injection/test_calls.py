"""Models that are not called as model(x, train=...), and submodules that return several things."""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lpa_jax
from lpa_jax import injection, penalties
from lpa_jax.injection import Pass
from lpa_jax.injection.outputs import part, with_part
from tests.helpers import toy
from tests.helpers.toy import CLASSES, assert_trees_close

LENGTH, WIDTH = 5, 8
RNG = np.random.default_rng(0)
TOKENS = {
    "ids": RNG.integers(0, 9, (toy.LABELS.size, LENGTH)),
    "mask": (RNG.uniform(size=(toy.LABELS.size, LENGTH)) < 0.8).astype("float32"),
}
BATCH = {"image": TOKENS, "label": toy.LABELS}


@flax.struct.dataclass
class ClassifierOutput:
    """As the models of Hugging Face return it."""

    logits: Any
    hidden_states: Any = None


class EncoderLayer(nn.Module):
    @nn.compact
    def __call__(self, hidden, mask, deterministic=True):
        scores = nn.Dense(LENGTH, name="scores")(hidden) - 1e9 * (1 - mask[:, None, :])
        weights = jax.nn.softmax(scores)
        hidden = nn.LayerNorm()(hidden + nn.Dense(WIDTH, name="value")(weights @ hidden))
        return nn.Dropout(0.2)(hidden, deterministic=deterministic), weights


class Encoder(nn.Module):
    layer: type = EncoderLayer

    @nn.compact
    def __call__(self, ids, mask, deterministic=True):
        hidden = nn.Embed(9, WIDTH, name="embed")(ids)
        for index in range(2):
            hidden, _ = self.layer(name=f"layer_{index}")(hidden, mask, deterministic)
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        return ClassifierOutput(nn.Dense(CLASSES, name="classifier")(pooled), (hidden,))


class EncoderLayerNNX(nnx.Module):
    def __init__(self, rngs):
        self.scores = nnx.Linear(WIDTH, LENGTH, rngs=rngs)
        self.value = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, hidden, mask, deterministic=True):
        weights = jax.nn.softmax(self.scores(hidden) - 1e9 * (1 - mask[:, None, :]))
        hidden = self.norm(hidden + self.value(weights @ hidden))
        return self.dropout(hidden, deterministic=deterministic), weights


class EncoderNNX(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(9, WIDTH, rngs=rngs)
        self.layers = nnx.List([EncoderLayerNNX(rngs) for _ in range(2)])
        self.classifier = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, ids, mask, deterministic=True):
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden, _ = layer(hidden, mask, deterministic)
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        return ClassifierOutput(self.classifier(pooled), (hidden,))


def call(module, inputs, train, **rngs):
    return module(inputs["ids"], inputs["mask"], deterministic=not train)


MODULES = {
    "linen": (lambda: Encoder(), "layer_0"),
    "linen remat": (lambda: Encoder(nn.remat(EncoderLayer, static_argnums=(3,))), "layer_0"),
    "nnx": (lambda: EncoderNNX(nnx.Rngs(0)), "layers/0"),
}


def encoder(kind):
    module, path = MODULES[kind]
    return lpa_jax.inject(module(), path, call=call, select={path: 0}), path


@pytest.mark.parametrize("kind", MODULES)
def test_an_encoder_is_cut_at_a_block_and_its_gradients_are_those_of_a_manual_cut(kind):
    network, path = encoder(kind)
    variables = network.init(jax.random.key(0), TOKENS)
    delta = 0.1 * RNG.normal(size=(toy.LABELS.size, LENGTH, WIDTH)).astype("float32")

    def injected(params):
        given = Pass({**variables, "params": params}, TOKENS)
        taps = {path: lambda h, decode: h + delta}
        return jnp.sum(injection.run_perturbed(network, given, taps)[0] ** 2)

    def manual(params):
        mask = jnp.asarray(TOKENS["mask"])
        if kind == "nnx":
            module = nnx.clone(EncoderNNX(nnx.Rngs(0)))
            nnx.update(module, params)
            hidden = module.layers[0](module.embed(TOKENS["ids"]), mask)[0] + delta
            hidden, last = module.layers[1](hidden, mask)[0], module.classifier
        else:
            parts = [{"params": params[f"layer_{index}"]} for index in range(2)]
            hidden = nn.Embed(9, WIDTH).apply({"params": params["embed"]}, TOKENS["ids"])
            hidden = EncoderLayer().apply(parts[0], hidden, mask)[0] + delta
            hidden = EncoderLayer().apply(parts[1], hidden, mask)[0]
            last = functools.partial(nn.Dense(CLASSES).apply, {"params": params["classifier"]})
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        return jnp.sum(last(pooled) ** 2)

    found, expected = (jax.jit(jax.grad(f))(variables["params"]) for f in (injected, manual))
    assert_trees_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["linen remat", "nnx"])
def test_an_encoder_trains(kind):
    network, path = encoder(kind)
    perturbations = {path: lpa_jax.lpa(0.1, steps=1, assignment=lpa_jax.all_positive())}
    state = lpa_jax.TrainState.create(
        network, optax.adam(1e-2), jax.random.key(0), BATCH, perturbations
    )
    step = jax.jit(functools.partial(lpa_jax.lpa_step, perturbations=perturbations))
    losses = []
    for _ in range(12):
        state, pairs = step(state, BATCH)
        losses.append(float(lpa_jax.metrics.compute(pairs)["loss"]))
    assert losses[-1] < losses[0] - 0.2
    assert step._cache_size() <= 2
    assert np.isfinite(jax.jit(lpa_jax.eval_step)(state, BATCH)["loss"][0])


class Outputs(NamedTuple):
    hidden: Any
    other: Any


@dataclasses.dataclass
class Plain:
    hidden: Any
    other: Any


A, B = jnp.ones((2, 3)), jnp.zeros((2, 3))


@pytest.mark.parametrize(
    ("output", "keys"),
    [
        ((A, B), (0,)),
        ([A, B], (-2,)),
        ({"hidden": A, "other": B}, ("hidden",)),
        (flax.core.FrozenDict({"hidden": A}), ("hidden",)),
        (Outputs(A, B), ("hidden",)),
        (Outputs(A, B), (0,)),
        (Plain(A, B), ("hidden",)),
        (ClassifierOutput(B, (B, A)), ("hidden_states", 1)),
        ((A, {"attention": A}), (0,)),
    ],
    ids=str,
)
def test_the_selected_part_and_no_other_is_replaced(output, keys):
    assert part("block", output, keys) is A
    changed = with_part(output, keys, 2 * A)
    assert type(changed) is type(output)
    assert part("block", changed, keys).tolist() == (2 * A).tolist()
    count = sum(leaf is A for leaf in leaves(output)) - sum(leaf is A for leaf in leaves(changed))
    assert count == 1


def leaves(output):
    return jax.tree.leaves(vars(output) if type(output) is Plain else output)


class Returns(nn.Module):
    """A block and a model that return what a test says."""

    block: Any
    model: Any = staticmethod(lambda logits, hidden: logits)

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        hidden, *_ = jax.tree.leaves((Block(self.block, name="block")(x), x))
        return self.model(nn.Dense(CLASSES, name="head")(hidden), hidden)


class Block(nn.Module):
    output: Any

    @nn.compact
    def __call__(self, x):
        return self.output(nn.Dense(WIDTH)(x))


def logits_of(block, model=lambda logits, hidden: logits, **options):
    network = lpa_jax.inject(Returns(block, model), "block", **options)
    images = toy.batch()["image"]
    variables = network.init(jax.random.key(0), images)
    taps = {"block": lambda h, decode: 0 * h}
    return injection.run_perturbed(network, Pass(variables, images), taps)[0]


@pytest.mark.parametrize(
    ("block", "options"),
    [
        (lambda h: (h,), {}),
        (lambda h: [h, None], {}),
        (lambda h: (h, {"attention": h}), {}),
        (lambda h: (h, h.mean(), h[0]), {}),
        (lambda h: (h, h), {"select": {"block": 0}}),
        (lambda h: {"out": h}, {"select": {"block": "out"}}),
    ],
)
def test_a_tuple_is_cut_at_its_only_activation(block, options):
    assert np.max(np.abs(logits_of(block, **options))) == 0  # a new head has no bias


@pytest.mark.parametrize(
    "model",
    [
        lambda logits, hidden: (logits, hidden),
        lambda logits, hidden: (logits, {"pre_logits": hidden}),
        lambda logits, hidden: {"hidden": hidden, "logits": logits},
        lambda logits, hidden: ClassifierOutput(logits, hidden),
    ],
)
def test_the_logits_are_those_named_or_the_first_output(model):
    assert logits_of(lambda h: h, model).shape == (toy.LABELS.size, CLASSES)


@pytest.mark.parametrize(
    ("block", "model", "options", "message"),
    [
        (lambda h: (h, h), None, {}, r"'block' .*select=\{'block': 0\}, got none for \(float32\["),
        (lambda h: ({"a": h}, h), None, {}, r"select must name the part of the output of 'block'"),
        (lambda h: {"a": h}, None, {}, r"the part of the output of 'block'.*\{'block': 'a'\}"),
        (lambda h: None, None, {}, r"submodule 'block' must return an array, got None"),
        (lambda h: (None, h), None, {}, r"the part of the output of 'block'.*\{'block': 1\}"),
        (lambda h: h[:2], None, {}, r"'block' must return the 6 examples .* got float32\[2, 8\]"),
        (lambda h: h, lambda z, h: {"z": z}, {}, r"the model's output .* got none for \{z: float"),
        (lambda h: (h, h), None, {"select": {"block": 2}},
         r"select\['block'\] must name an array in \(float32.*\), got 2"),
        (lambda h: h, None, {"select": {"blok": 0}},
         r"a layer of select must be one of block, logits, got 'blok' \(did you mean 'block'"),
        (lambda h: h, None, {"call": lambda m, x: m(x)}, r"call must be a function of \(module"),
        (lambda h: h, None, {"call": lambda m, x, train: m(x), "train_argument": None},
         r"call must be the only option about the call, got 'train_argument' as well$"),
    ],
)  # fmt: skip
def test_an_unclear_output_or_call_is_refused_in_one_line(block, model, options, message):
    model = model or (lambda logits, hidden: logits)
    with pytest.raises(ValueError, match=message) as error:
        logits_of(block, model, **options)
    assert "\n" not in str(error.value)


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x, noise):
        x = nn.Dense(CLASSES, name="body")(x.reshape(x.shape[0], -1))
        return x + noise + jax.random.uniform(self.make_rng("extra"))


class NoisyNNX(nnx.Module):
    def __init__(self):
        self.body = nnx.Linear(int(np.prod(toy.IMAGE)), CLASSES, rngs=nnx.Rngs(0))

    def __call__(self, x, noise, rngs):
        return self.body(x.reshape(x.shape[0], -1)) + noise + jax.random.uniform(rngs.extra())


def call_noisy(module, inputs, train, extra, **rngs):
    assert set(rngs) == ({"dropout"} if train else set())
    noise = jax.random.uniform(rngs["dropout"]) if train else 0.0
    more = {} if isinstance(module, nn.Module) else {"rngs": nnx.Rngs(extra=extra)}
    return module(inputs, noise, **more)


@pytest.mark.parametrize("module", [Noisy, NoisyNNX])
def test_a_call_gets_random_streams_by_name(module):
    images = toy.batch()["image"]
    network = lpa_jax.inject(module(), "body", call=call_noisy)
    variables = network.init(jax.random.key(0), images)
    runs = [
        network.run(Pass(variables, images, train, rng), {}, "logits")[0]
        for train, rng in [
            (False, None),
            (False, None),
            *[(True, jax.random.key(i)) for i in (1, 1, 2)],
        ]
    ]
    np.testing.assert_array_equal(runs[0], runs[1])
    np.testing.assert_array_equal(runs[2], runs[3])
    assert np.ptp(np.asarray(runs[3]) - np.asarray(runs[4])) < 1e-5 < abs(runs[3] - runs[4]).max()


class Sows(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.Dense(WIDTH, name="body")(x.reshape(x.shape[0], -1))
        self.sow(col="losses", name="l2", value=jnp.mean(h**2))
        self.sow("sums", "l1", h.mean(), reduce_fn=lambda a, b: a + b, init_fn=lambda: 0.0)
        return nn.Dense(CLASSES)(self.perturb("h", h))


class SowsNNX(nnx.Module):
    def __init__(self):
        self.body = nnx.Linear(int(np.prod(toy.IMAGE)), CLASSES, rngs=nnx.Rngs(0))
        self.scale = jnp.ones(())  # an array that is no Variable

    def __call__(self, x):
        h = self.body(x.reshape(x.shape[0], -1)) * self.scale
        self.sow(variable_type=nnx.Intermediate, name="h", value=h)
        return h


@pytest.mark.parametrize("module", [Sows, SowsNNX])
def test_what_modules_sow_is_dropped(module):
    state = lpa_jax.TrainState.create(
        lpa_jax.inject(module(), "body"), optax.sgd(0.1), jax.random.key(0), toy.batch()
    )
    new, _ = jax.jit(lpa_jax.lpa_step)(state, toy.batch())
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert len(jax.tree.leaves(state.model_state)) == (1 if module is SowsNNX else 0)


@pytest.mark.parametrize(("module", "kind"), [(Sows, "losses"), (SowsNNX, "Intermediate")])
def test_a_penalty_gets_what_modules_sow(module, kind):
    def total(sown):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(sown))

    def aux(**options):
        return penalties.common.stateless("aux", lambda seen: total(seen.sown[kind]), **options)

    def objective(params):
        if module is Sows:
            logits, sown = module().apply({"params": params}, images, mutable=[kind])
        else:
            model = module()
            nnx.update(model, params)
            logits, sown = nnx.capture(model, nnx.Intermediate)(images)
        losses = lpa_jax.cross_entropy(logits, jax.nn.one_hot(toy.LABELS, logits.shape[-1]))
        return jnp.mean(losses) + total(sown[kind] if module is Sows else sown)

    images, chosen = toy.batch()["image"], {"aux": aux(sown=(kind,))}
    state = lpa_jax.TrainState.create(
        lpa_jax.inject(module(), "body"), optax.sgd(0.1), jax.random.key(0), toy.batch(), {}, chosen
    )
    new, pairs = jax.jit(functools.partial(lpa_jax.lpa_step, penalties=chosen))(state, toy.batch())
    assert jax.tree.structure(new) == jax.tree.structure(state)
    gradient = jax.grad(objective)(state.params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradient)
    assert_trees_close(new.params, expected)
    assert pairs["penalty/aux"][0] > 0.01

    missing = {"aux": aux(sown=("nothing",))}
    with pytest.raises(ValueError, match="must name collections that the model sows, got 'nothing"):
        lpa_jax.lpa_step(state, toy.batch(), penalties=missing)


class ScannedLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(WIDTH, name="dense")(x)), None


class Transformed(nn.Module):
    """Blocks under each of Linen's transformations."""

    def setup(self):
        self.last = nn.remat(nn.Dense)(CLASSES)

    @nn.compact
    def __call__(self, x):
        x = nn.remat(nn.Dense)(WIDTH, name="remat")(x.reshape(x.shape[0], -1))
        x = nn.jit(nn.Dense)(WIDTH, name="jit")(x)
        stack = nn.scan(
            ScannedLayer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        x, _ = stack(name="stack")(x, None)
        return self.last(x)


class RematBlockNNX(nnx.Module):
    def __init__(self, inputs, outputs):
        self.dense = nnx.Linear(inputs, outputs, rngs=nnx.Rngs(0))

    @nnx.remat
    def __call__(self, x):
        self.sow(nnx.Intermediate, "x", x)
        return self.dense(x)


class TransformedNNX(nnx.Module):
    def __init__(self):
        self.remat = RematBlockNNX(int(np.prod(toy.IMAGE)), WIDTH)
        self.last = RematBlockNNX(WIDTH, CLASSES)

    def __call__(self, x):
        return self.last(self.remat(x.reshape(x.shape[0], -1)))


@pytest.mark.parametrize(
    ("module", "paths"),
    [(Transformed, ("remat", "jit", "stack", "last")), (TransformedNNX, ("remat", "last"))],
)
def test_the_output_of_a_transformed_module_is_cut(module, paths):
    images = toy.batch()["image"]
    network = lpa_jax.inject(module(), *paths)
    variables = network.init(jax.random.key(0), images)

    def total(params, tapped):
        decoded = {}

        def tap(path):
            return lambda h, decode: (h, decoded.setdefault(path, decode(h)))[0]

        given = Pass({**variables, "params": params}, images, True, jax.random.key(0))
        taps = {path: tap(path) for path in paths} if tapped else {}
        logits, _ = injection.run_perturbed(network, given, taps)
        return jnp.sum(logits**2), (logits, decoded)

    gradient = jax.jit(jax.grad(total, has_aux=True), static_argnums=1)
    plain, (logits, _) = gradient(variables["params"], False)
    tapped, (_, decoded) = gradient(variables["params"], True)
    assert_trees_close(tapped, plain)
    for path in paths:
        np.testing.assert_allclose(decoded[path], logits, rtol=1e-5, atol=1e-6)
    assert list(injection.submodule_paths(module(), images)) == list(paths)


def test_a_layer_inside_a_scan_is_refused_with_the_remedy():
    network = lpa_jax.inject(Transformed(), "stack/dense")
    variables = network.init(jax.random.key(0), toy.batch()["image"])
    with pytest.raises(ValueError, match=r"'stack/dense' runs inside a scan.*between two stacks"):
        network.run(Pass(variables, toy.batch()["image"]), {}, "stack/dense")
