"""Wide residual networks, every stage an injection point.

References:
  Zagoruyko and Komodakis, "Wide Residual Networks", arXiv 1605.07146: table 1 and section 2.
"""

import functools

import flax.linen as nn
import jax

from lpa_jax import checks
from lpa_jax.models import base, layers


class WideResNet(base.NormalizedModel):
    """Pre-activation wide residual network WRN-depth-width.

    Three stages of n = (depth - 4)/6 blocks with 16k, 32k and 64k features, k being the width
    factor; a block adds conv3x3(dropout(relu(norm(conv3x3(relu(norm(x))))))) to x. Where the
    number of features or the resolution changes, the shortcut is a 1x1 convolution of
    relu(norm(x)). Layers: `input`, `stem`, `stage1`, `stage2`, `stage3`, `pool`, `logits`; the
    last norm and relu are between `stage3` and `pool`.

    `WRN_16_8` has 10,961,370 and `WRN_28_10` 36,479,194 parameters at 10 classes (the
    paper prints 11.0M and 36.5M).

    Attributes:
      depth: Number of convolutional layers as the paper counts them, 6n + 4.
      width: Width factor k.
      dropout: Rate of the dropout between the convolutions of a block (the paper uses 0.3).

    Raises:
      ValueError: An attribute is outside its range.

    Example:
      >>> from lpa_jax import models
      >>> models.WideResNet(num_classes=10, depth=40, width=2, dropout=0.3).layers
      ('input', 'stem', 'stage1', 'stage2', 'stage3', 'pool', 'logits')
    """

    depth: int = 28
    width: int = 10
    dropout: float = 0.0

    def __post_init__(self):
        self.depth = checks.integer("depth", self.depth, 1)
        self.width = checks.integer("width", self.width, 1)
        counted = self.depth >= 10 and self.depth % 6 == 4
        checks.require(counted, "depth", "6n + 4 for a whole number n >= 1", self.depth)
        self.dropout = checks.number("dropout", self.dropout, high=1.0, open_high=True)
        super().__post_init__()

    @property
    def stage_names(self) -> tuple[str, ...]:
        """`stem`, `stage1`, `stage2`, `stage3`, `pool`, `logits`."""
        return ("stem", *base.numbered("stage", 3), "pool", "logits")

    def setup(self):
        """Makes one module a stage."""
        stages = {"stem": Stem(16, self.primitives, name="stem")}
        for index, name in enumerate(base.numbered("stage", 3)):
            stages[name] = layers.BlockStage(
                functools.partial(
                    PreactivationBlock,
                    features=16 * 2**index * self.width,
                    dropout=self.dropout,
                    primitives=self.primitives,
                ),
                count=(self.depth - 4) // 6,
                stride=1 if index == 0 else 2,
                name=name,
            )
        stages["pool"] = NormReluPool(self.primitives, name="pool")
        stages["logits"] = self.classifier()
        self.stages = stages


class Stem(nn.Module):
    """The first 3x3 convolution; its norm belongs to the block above it."""

    features: int
    primitives: layers.Primitives

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[B, H, W, features]`."""
        del train
        return self.primitives.conv(x, self.features, 3, name="conv")


class PreactivationBlock(nn.Module):
    """Norm, relu, 3x3 convolution, twice, with dropout before the second convolution."""

    features: int
    stride: int
    dropout: float
    primitives: layers.Primitives

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[B, H/stride, W/stride, features]`."""
        conv, norm = self.primitives.conv, functools.partial(self.primitives.norm, train=train)
        y = layers.relu(norm(x, name="norm1"))
        if self.stride != 1 or x.shape[-1] != self.features:
            x = conv(y, self.features, 1, self.stride, name="shortcut_conv")
        y = conv(y, self.features, 3, self.stride, name="conv1")
        y = layers.dropout(layers.relu(norm(y, name="norm2")), self.dropout, train)
        return x + conv(y, self.features, 3, name="conv2")


class NormReluPool(nn.Module):
    """The norm and relu that close a pre-activation network, and the average over space."""

    primitives: layers.Primitives

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[B, F]`."""
        x = layers.relu(self.primitives.norm(x, train=train, name="norm"))
        return layers.global_average_pool(x, train)


WRN_16_8 = functools.partial(WideResNet, depth=16, width=8)
WRN_28_10 = functools.partial(WideResNet, depth=28, width=10)
