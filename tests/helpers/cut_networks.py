"""Networks as a user writes them, Linen and NNX, cut into a chain of layers."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

import lpa_jax
from lpa_jax import injection
from tests.helpers import toy
from tests.helpers.toy import CLASSES

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
