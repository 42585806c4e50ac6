"""What cannot be cut is refused with one line that says why, before anything is trained."""

import functools
import types

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from flax import nnx

import lpa_jax
from lpa_jax import injection
from tests.helpers import toy
from tests.helpers.toy import CLASSES

IMAGES = toy.batch()["image"]
INPUTS = int(np.prod(toy.IMAGE))


class Odd(nn.Module):
    """Submodules that no perturbation can be injected at."""

    @nn.compact
    def __call__(self, images, train=False):
        x = images.reshape(images.shape[0], -1)
        shared = nn.Dense(INPUTS, name="shared")
        x = shared(shared(x))
        x, _ = Pair(name="pair")(nn.Dense(INPUTS, name="middle")(x))
        x = nn.remat(lambda layer, h: layer(h))(nn.Dense(CLASSES, name="remat"), x)
        return nn.Dense(CLASSES, name="late")(x)


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x, x


class OddNNX(nnx.Module):
    def __init__(self):
        self.shared = nnx.Linear(INPUTS, INPUTS, rngs=nnx.Rngs(0))
        self.middle = nnx.Linear(INPUTS, INPUTS, rngs=nnx.Rngs(0))
        self.pair = PairNNX()
        self.remat = nnx.Linear(INPUTS, CLASSES, rngs=nnx.Rngs(0))
        self.unused = nnx.Linear(INPUTS, CLASSES, rngs=nnx.Rngs(0))
        self.late = nnx.Linear(CLASSES, CLASSES, rngs=nnx.Rngs(0))

    def __call__(self, images):
        x = self.shared(self.shared(images.reshape(images.shape[0], -1)))
        x, _ = self.pair(self.middle(x))
        return self.late(nnx.remat(lambda layer, h: layer(h))(self.remat, x))


class PairNNX(nnx.Module):
    def __call__(self, x):
        return x, x


class TwoInputs(nn.Module):
    def __call__(self, ids, mask):
        return ids * mask


class BareDropout(nnx.Module):
    def __init__(self):
        self.late = nnx.Linear(INPUTS, CLASSES, rngs=nnx.Rngs(0))
        self.drop = nnx.Dropout(0.5)

    def __call__(self, x):
        return self.drop(self.late(x))


@functools.cache
def module(kind):
    made_by = {
        "linen": Odd,
        "nnx": OddNNX,
        "function": lambda: lambda x: x,
        "holder": lambda: types.SimpleNamespace(module=Odd()),
        "two inputs": TwoInputs,
        "bare dropout": BareDropout,
    }
    return made_by[kind]()


@pytest.mark.parametrize("kind", ["linen", "nnx"])
@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (("unused",), r"submodule 'unused' was not called in the pass through the module"),
        (("shared",), r"submodule 'shared' is called more than once in a pass"),
        (("pair",), r"select must name the part of the output of 'pair' .* select=\{'pair': 0\}, "),
        (("remat",), r"submodule 'remat' runs inside a scan, vmap, remat or jit, .*: cut the"),
        (("late", "middle"), r"paths must be in the order of the pass, but 'middle', named after"),
    ],
)
def test_path_that_is_no_injection_point_is_refused_when_the_state_is_made(kind, paths, message):
    perturbations = {paths[0]: lpa_jax.lpa(0.1)}
    network = lpa_jax.inject(module(kind), *paths)
    with pytest.raises(ValueError, match=message) as error:
        lpa_jax.TrainState.create(
            network, optax.sgd(0.1), jax.random.key(0), toy.batch(), perturbations
        )
    assert "\n" not in str(error.value)


def test_path_that_a_training_pass_leaves_out_is_refused():
    class Fickle(nn.Module):
        @nn.compact
        def __call__(self, images, train=False):
            x = images.reshape(images.shape[0], -1)
            body = nn.Dense(INPUTS, name="body")
            return nn.Dense(CLASSES)(x if train else body(x))

    network = lpa_jax.inject(Fickle(), "body")
    variables = network.init(jax.random.key(0), IMAGES)
    taps = {"body": lambda h, decode: h}
    with pytest.raises(ValueError, match=r"'body' was not called .*, which calls: Dense_0$"):
        injection.run_perturbed(network, injection.Pass(variables, IMAGES, train=True), taps)


@pytest.mark.parametrize(
    ("kind", "paths", "options", "message"),
    [
        ("linen", [], {}, r"paths must name at least one submodule, got none$"),
        ("linen", ["late", "late"], {}, r"paths must be distinct .*, got 'late'$"),
        ("linen", ["input"], {}, r"paths must be .* not input or logits, got 'input'$"),
        ("function", ["late"], {},
         r"a Linen or NNX module, got function; lpa_jax.CutFunctions cuts"),
        ("holder", ["late"], {}, r"a Linen or NNX module, got SimpleNamespace; cut its `module`$"),
        ("two inputs", ["late"], {},
         r"call must be .* TwoInputs, .*alone \(missing .*'mask'\), got"),
        ("bare dropout", ["late"], {},
         r"module must have Dropout with rngs, got 'drop' without; or"),
        ("linen", ["late"], {"train_argument": "training"},
         r"train_argument 'training' is not an argument of Odd; it takes: images, train$"),
        ("linen", ["late"], {"trian": True},
         r"option 'trian' is not an argument of Odd; it takes: images, train$"),
        ("nnx", ["head"], {}, r"OddNNX has no callable submodule 'head'; it has: .*late"),
        ("nnx", ["late/kernel"], {}, r"OddNNX has no callable submodule 'late/kernel'"),
        ("nnx", ["late/3"], {}, r"OddNNX has no callable submodule 'late/3'; it has: "),
        ("nnx", ["late"], {"train": True},
         r"option 'train' is not an argument of OddNNX; it takes: images$"),
    ],
)  # fmt: skip
def test_cut_that_cannot_be_is_refused(kind, paths, options, message):
    with pytest.raises(ValueError, match=message):
        lpa_jax.inject(module(kind), *paths, **options)


@pytest.mark.parametrize("kind", ["linen", "nnx", "function", "sequential"])
def test_model_that_is_not_cut_is_refused_with_the_remedy(kind):
    # nn.Sequential has an attribute `layers`, which must not pass for injection points.
    model = nn.Sequential([nn.Dense(2)]) if kind == "sequential" else module(kind)
    message = rf"must be a staged model or a cut network, got {type(model).__name__}; .*inject\("
    with pytest.raises(ValueError, match=message):
        injection.as_network(model)


@pytest.mark.parametrize("kind", ["staged", "linen", "nnx"])
def test_unknown_layer_is_refused_with_the_known_ones(kind):
    staged = kind == "staged"
    model = toy.NormalizedMLP(CLASSES) if staged else lpa_jax.inject(module(kind), "late")
    known = "input, hidden1, hidden2, logits" if staged else "input, late, logits"
    message = rf"unknown layer 'stage9'; the injection points are: {known}$"
    with pytest.raises(ValueError, match=message):
        lpa_jax.encode(model, {}, IMAGES, "stage9")
    with pytest.raises(ValueError, match=message):
        lpa_jax.decode(model, {}, IMAGES, "stage9", inputs=IMAGES)


def test_decoding_an_injected_network_without_its_inputs_is_refused():
    with pytest.raises(ValueError, match=r"inputs are needed to decode a network .* by inject$"):
        lpa_jax.decode(lpa_jax.inject(module("linen"), "late"), {}, IMAGES, "late")


def test_bad_pair_of_functions_is_refused():
    with pytest.raises(ValueError, match="layer must not be input or logits, got 'logits'"):
        lpa_jax.CutFunctions(lambda p, x: x, lambda p, h: h, "logits")
    network = lpa_jax.CutFunctions(lambda p, x: x, lambda p, h: h)
    with pytest.raises(ValueError, match="init_params is needed to initialise"):
        network.init(jax.random.key(0), IMAGES)
