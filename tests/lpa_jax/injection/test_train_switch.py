"""A cut module trains in training mode, whatever its switch is called, or it is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lpa_jax
from lpa_jax.injection import Pass

IMAGES = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
BATCH = {"image": IMAGES, "label": np.arange(64) % 4}


def layers(x, train, ratio=0.5):
    x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16, name="body")(x))
    return nn.Dense(4)(nn.Dropout(ratio, deterministic=not train)(x))


class IsTrain(nn.Module):
    @nn.compact
    def __call__(self, x, is_train=False):
        return layers(x, is_train)


class Inference(nn.Module):
    @nn.compact
    def __call__(self, x, *, inference=True):
        return layers(x, not inference)


class Phase(nn.Module):
    @nn.compact
    def __call__(self, x, phase="eval"):
        return layers(x, phase == "train")


class Wrapper(nn.Module):
    @nn.compact
    def __call__(self, x, **keywords):
        return IsTrain(name="inner")(x, **keywords)


class Field(nn.Module):
    deterministic: bool = True

    @nn.compact
    def __call__(self, x):
        return layers(x, not self.deterministic)


class Frozen(nn.Module):
    """No switch at all: its mode is a part of the model."""

    @nn.compact
    def __call__(self, x, mask=None):
        return layers(x, train=False)


class Plain(nn.Module):
    """Other flags, but no part that depends on the mode."""

    @nn.compact
    def __call__(self, x, normalize=False, **keywords):
        return nn.Dense(4)(nn.relu(nn.Dense(16, name="body")(x)))


class Training(nnx.Module):
    def __init__(self, rngs=None, **norm):
        rngs = rngs or nnx.Rngs(0)
        self.body = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs, **norm)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x, training=False):
        x = self.norm(self.body(x), use_running_average=not training)
        return self.head(self.dropout(x, deterministic=not training))


class ByAttributes(Training):
    def __call__(self, x):
        return self.head(self.dropout(self.norm(self.body(x))))


class WrapperNNX(nnx.Module):
    def __init__(self):
        self.inner = Training()

    def __call__(self, x, **keywords):
        return self.inner(x, **keywords)


class Context:
    """A mode that modules read from their surroundings, as those of kauldron do."""

    training = False

    def __get__(self, module, kind=None):
        return Context.training

    @classmethod
    def call(cls, module, inputs, train, **rngs):
        cls.training = train
        try:
            return module(inputs)
        finally:
            cls.training = False


class InContext(nn.Module):
    is_training = Context()

    @nn.compact
    def __call__(self, x):
        return layers(x, self.is_training)


class InContextNNX(Training):
    is_training = Context()

    def __call__(self, x):
        return super().__call__(x, self.is_training)


def trains(network):
    """Whether training drops units, and whether it updates statistics; evaluation never does."""
    variables = network.init(jax.random.key(0), IMAGES)

    def run(train, seed):
        given = Pass(variables, IMAGES, train, jax.random.key(seed))
        logits, state = network.run(given, {}, "logits")
        return np.asarray(logits), jax.tree.map(np.asarray, state)

    (first, state), (second, _) = run(True, 1), run(True, 2)
    (a, same), (b, _) = run(False, 1), run(False, 2)
    np.testing.assert_array_equal(a, b)
    old = {name: value for name, value in variables.items() if name != "params"}
    assert jax.tree.all(jax.tree.map(np.array_equal, same, old))
    return not np.array_equal(first, second), not jax.tree.all(
        jax.tree.map(np.array_equal, state, old)
    )


@pytest.mark.parametrize(
    ("module", "path", "options"),
    [
        (IsTrain(), "body", {}),
        (Inference(), "body", {"train_argument": "inference"}),
        (Wrapper(), "inner/body", {"train_argument": "is_train"}),
        (Field(), "body", {"train_argument": "deterministic"}),
        (Training(), "body", {}),
        (ByAttributes(), "body", {}),
        (WrapperNNX(), "inner/body", {"train_argument": "training"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_training_is_in_training_mode_and_evaluation_is_not(module, path, options):
    assert trains(lpa_jax.inject(module, path, **options)) == (True, True)


@pytest.mark.parametrize("module", [InContext, InContextNNX])
def test_a_mode_of_the_surroundings_is_set_by_call_and_refused_without(module):
    assert trains(lpa_jax.inject(module(), "body", call=Context.call)) == (True, True)
    message = (
        rf"^call must set the mode that {module.__name__}\.is_training reads, or .* got neither"
    )
    with pytest.raises(ValueError, match=message):
        trains(lpa_jax.inject(module(), "body"))


@pytest.mark.parametrize("module", [Frozen(), Plain()], ids=["frozen", "plain"])
def test_a_module_whose_mode_does_not_matter_needs_no_switch(module):
    assert trains(lpa_jax.inject(module, "body")) == (False, False)


@pytest.mark.parametrize("options", [{"train_argument": None}, {"phase": "eval"}])
def test_what_the_user_says_of_the_mode_counts(options):
    assert trains(lpa_jax.inject(Phase(), "body", **options)) == (False, False)


def test_a_batch_norm_that_was_built_frozen_stays_frozen():
    network = lpa_jax.inject(ByAttributes(use_running_average=True), "body")
    assert trains(network) == (True, False)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Inference(), "'inference' could be it"),
        (Phase(), "'phase' could be it"),
        (Field(), "'deterministic' could be it"),
        (WrapperNNX(), "'inner' has one"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_unknown_switch_is_refused_at_the_cut(module, reason):
    message = rf"^train_argument must name the switch of {type(module).__name__} .*: {reason}$"
    with pytest.raises(ValueError, match=message):
        lpa_jax.inject(module, "inner/body" if isinstance(module, WrapperNNX) else "body")


def test_a_switch_behind_keywords_is_refused_when_training_needs_it():
    network = lpa_jax.inject(Wrapper(), "inner/body")
    state = lpa_jax.TrainState.create(network, optax.sgd(0.1), jax.random.key(0), BATCH)
    assert jnp.isfinite(jax.jit(lpa_jax.eval_step)(state, BATCH)["loss"][0])
    message = r"^train_argument must name the switch of Wrapper .*: BatchNorm depends on it"
    with pytest.raises(ValueError, match=message):
        lpa_jax.lpa_step(state, BATCH)


def test_an_nnx_module_in_evaluation_mode_is_refused():
    module = ByAttributes()
    module.eval()
    with pytest.raises(ValueError, match=r"training mode, got 'dropout' with deterministic=True"):
        lpa_jax.inject(module, "body")
