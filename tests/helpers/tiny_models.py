"""Small networks of every model family, and their variables."""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpa_jax import models

# Stand-ins for every model family, small enough to run op by op, with dropout where there is any.
TINY = {
    "mlp": models.MLP(3, hidden=(6, 5), dropout=0.5),
    "small_cnn": models.SmallCNN(3, widths=(4, 8)),
    "resnet8": models.ResNet8(3, widths=(4, 8, 16)),
    "bottleneck": models.ResNet50(3, widths=(4, 8), stage_sizes=(1, 1), stem="cifar"),
    "wrn_10_1": models.WideResNet(3, depth=10, width=1, dropout=0.5),
    "vit": models.ViT(3, patch=4, width=8, depth=2, heads=2, dropout=0.5),
}
# Without -m slow, tests of every family leave out the second variants of two of them.
EVERY_FAMILY = [
    pytest.param(name, marks=pytest.mark.slow if name in ("bottleneck", "wrn_10_1") else ())
    for name in TINY
]
# This generator compiles several times faster than the default one.
RNGS = {"dropout": jax.random.key(7, impl="unsafe_rbg")}


@contextlib.contextmanager
def mlp_of(*hidden):
    """Within the block, experiments make the model `mlp` with these hidden layers."""
    small = functools.partial(models.MLP, hidden=hidden)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models._REGISTRY.factories, "mlp", small)
        yield


def normal(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def abstract_variables(model, size):
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)


def random_variables(model, size=8):
    """Returns variables drawn by NumPy: initialisers take seconds to compile."""
    generator = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return jnp.asarray(generator.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        fan_in = math.prod(leaf.shape[:-1])
        return jnp.asarray(generator.normal(0, fan_in**-0.5, leaf.shape), leaf.dtype)

    return jax.tree.map_with_path(draw, abstract_variables(model, size))
