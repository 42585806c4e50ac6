"""Residual networks in the CIFAR and the ImageNet form, every stage an injection point.

References:
  He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385: section 4.2 (CIFAR
  form, depth 6n+2, identity shortcuts) and table 1 (ImageNet form).
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from lpa_jax import checks
from lpa_jax.models import base, layers

STEMS = ("cifar", "strided", "imagenet")
BLOCKS = ("basic", "bottleneck")
SHORTCUTS = ("pad", "projection")


class ResNet(base.NormalizedModel):
    """Residual network: stem, stages of residual blocks, global pooling, a linear head.

    A block computes relu(x + f(x)), f being two 3x3 convolutions (`"basic"`) or 1x1, 3x3, 1x1
    with a fourfold width at the end (`"bottleneck"`), each followed by a norm. Every stage but
    the first halves the resolution; a bottleneck does so in its 3x3 convolution (the form known
    as v1.5; the paper's v1 strides in the first 1x1). Layers: `input`, `stem`, `stage1` ..
    `stage<S>`, `pool`, `logits`.

    The constructors:

    | constructor | stages, their blocks | classes | parameters |
    |---|---|---|---|
    | `ResNet8` | 3, basic, 1 each | 10 | 75,290 |
    | `ResNet20` | 3, basic, 3 each | 10 | 269,722 |
    | `ResNet32` | 3, basic, 5 each | 10 | 464,154 |
    | `ResNet56` | 3, basic, 9 each | 10 | 853,018 |
    | `ResNet110` | 3, basic, 18 each | 10 | 1,727,962 |
    | `ResNet8Slim` | 3, basic, 1 each | 10 | 19,218 |
    | `ResNet18` | 4, basic, 2, 2, 2, 2 | 1000 | 11,689,512 |
    | `ResNet34` | 4, basic, 3, 4, 6, 3 | 1000 | 21,797,672 |
    | `ResNet50` | 4, bottleneck, 3, 4, 6, 3 | 1000 | 25,557,032 |

    The 3-stage ones are the CIFAR form (widths 16, 32, 64; `shortcut="pad"`), the others the
    ImageNet form (widths 64 to 512; `shortcut="projection"`, `stem="imagenet"`). `ResNet8Slim` is
    this library's, for a CPU: half the CIFAR widths at half the resolution (`stem="strided"`).

    Attributes:
      stage_sizes: Number of blocks of each stage.
      widths: Features of each stage, one for each entry of `stage_sizes` (a bottleneck stage
        ends in four times as many).
      block: `"basic"` or `"bottleneck"`.
      shortcut: What meets a change of shape: `"pad"` (subsample, append zero features; He's
        option A, no parameters) or `"projection"` (1x1 convolution and norm; option B).
      stem: `"cifar"` (3x3 convolution), `"strided"` (the same with stride 2) or `"imagenet"` (7x7
        of stride 2, 3x3 max pooling of stride 2).
      dropout: Rate of a dropout after global pooling, before the head (as in DomainBed,
        arXiv 2007.01434, table 8); `pool` includes it.
      zero_init: Whether the scale of each block's last norm starts at 0, so that every block
        starts as the identity (Goyal et al., arXiv 1706.02677, section 5.1).

    Raises:
      ValueError: An attribute is outside its range.

    Example:
      >>> from lpa_jax import models
      >>> models.ResNet32(num_classes=100).layers
      ('input', 'stem', 'stage1', 'stage2', 'stage3', 'pool', 'logits')
      >>> models.ResNet50(num_classes=10, stem="cifar").stage_sizes
      (3, 4, 6, 3)
    """

    stage_sizes: tuple[int, ...] = (3, 3, 3)
    widths: tuple[int, ...] = (16, 32, 64)
    block: str = "basic"
    shortcut: str = "pad"
    stem: str = "cifar"
    zero_init: bool = False
    dropout: float = 0.0

    def __post_init__(self):
        self.stage_sizes = checks.positive_integers("stage_sizes", self.stage_sizes)
        self.widths = checks.positive_integers("widths", self.widths)
        self.dropout = checks.number("dropout", self.dropout, high=1.0, open_high=True)
        super().__post_init__()
        if len(self.widths) != len(self.stage_sizes):
            raise ValueError(
                f"widths must be one for each of stage_sizes={self.stage_sizes}, got {self.widths}"
            )
        checks.choice("block", self.block, BLOCKS)
        checks.choice("shortcut", self.shortcut, SHORTCUTS)
        checks.choice("stem", self.stem, STEMS)
        if self.zero_init and self.norm == "none":
            raise ValueError("norm must be batch or group with zero_init=True, got 'none'")

    @property
    def stage_names(self) -> tuple[str, ...]:
        """`stem`, `stage1` .. `stage<S>`, `pool`, `logits`."""
        return ("stem", *base.numbered("stage", len(self.stage_sizes)), "pool", "logits")

    def setup(self):
        """Makes one callable a stage."""
        make_block = functools.partial(
            BasicBlock if self.block == "basic" else BottleneckBlock,
            primitives=self.primitives,
            shortcut=self.shortcut,
            scale_init=nn.initializers.zeros if self.zero_init else nn.initializers.ones,
        )
        stages = {"stem": Stem(self.widths[0], self.stem, self.primitives, name="stem")}
        for index, name in enumerate(base.numbered("stage", len(self.stage_sizes))):
            stages[name] = layers.BlockStage(
                functools.partial(make_block, features=self.widths[index]),
                count=self.stage_sizes[index],
                stride=1 if index == 0 else 2,
                name=name,
            )
        stages["pool"] = (
            PoolDropout(self.dropout, name="pool") if self.dropout else layers.global_average_pool
        )
        stages["logits"] = self.classifier()
        self.stages = stages


class PoolDropout(nn.Module):
    """Global pooling, of whose features some are dropped in training."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """dropout(mean over space of x), `[B, F]`."""
        x = layers.global_average_pool(x, train)
        return nn.Dropout(self.rate, deterministic=not train, name="dropout")(x)


class Stem(nn.Module):
    """The first convolution with its norm and relu, and max pooling in the ImageNet form."""

    features: int
    form: str
    primitives: layers.Primitives

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[B, H/s, W/s, features]`, s being 1 (CIFAR), 2 (strided) or 4 (ImageNet)."""
        size, stride = {"cifar": (3, 1), "strided": (3, 2), "imagenet": (7, 2)}[self.form]
        x = self.primitives.conv(x, self.features, size, stride, name="conv")
        x = layers.relu(self.primitives.norm(x, train=train, name="norm"))
        if self.form == "imagenet":
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        return x


class ResidualBlock(nn.Module):
    """What the two residual blocks share: their attributes and the shortcut."""

    features: int
    stride: int
    primitives: layers.Primitives
    shortcut: str
    scale_init: Callable

    def add(self, x: jax.Array, residual: jax.Array, train: bool) -> jax.Array:
        """relu(shortcut(x) + residual), `x` being brought to the residual's shape."""
        features = residual.shape[-1]
        if self.stride == 1 and x.shape[-1] == features:
            return layers.relu(x + residual)
        if self.shortcut == "projection":
            x = self.primitives.conv(x, features, 1, self.stride, name="shortcut_conv")
            x = self.primitives.norm(x, train=train, name="shortcut_norm")
        else:
            x = x[:, :: self.stride, :: self.stride]
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, features - x.shape[-1])))
        return layers.relu(x + residual)


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions, the stride in the first; `[B, H/stride, W/stride, features]`."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """relu(shortcut(x) + norm(conv(relu(norm(conv(x))))))."""
        conv, norm = self.primitives.conv, functools.partial(self.primitives.norm, train=train)
        y = conv(x, self.features, 3, self.stride, name="conv1")
        y = layers.relu(norm(y, name="norm1"))
        y = conv(y, self.features, 3, name="conv2")
        y = norm(y, name="norm2", scale_init=self.scale_init)
        return self.add(x, y, train)


class BottleneckBlock(ResidualBlock):
    """1x1, 3x3 (with the stride), 1x1 convolutions; `[B, H/stride, W/stride, 4*features]`."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """relu(shortcut(x) + residual(x)), each convolution being followed by a norm."""
        conv, norm = self.primitives.conv, functools.partial(self.primitives.norm, train=train)
        y = layers.relu(norm(conv(x, self.features, 1, name="conv1"), name="norm1"))
        y = conv(y, self.features, 3, self.stride, name="conv2")
        y = layers.relu(norm(y, name="norm2"))
        y = conv(y, 4 * self.features, 1, name="conv3")
        y = norm(y, name="norm3", scale_init=self.scale_init)
        return self.add(x, y, train)


_cifar = functools.partial(ResNet, widths=(16, 32, 64), shortcut="pad", stem="cifar")
ResNet8 = functools.partial(_cifar, stage_sizes=(1, 1, 1))
ResNet20 = functools.partial(_cifar, stage_sizes=(3, 3, 3))
ResNet32 = functools.partial(_cifar, stage_sizes=(5, 5, 5))
ResNet56 = functools.partial(_cifar, stage_sizes=(9, 9, 9))
ResNet110 = functools.partial(_cifar, stage_sizes=(18, 18, 18))
ResNet8Slim = functools.partial(
    ResNet, stage_sizes=(1, 1, 1), widths=(8, 16, 32), shortcut="pad", stem="strided"
)

# 32 groups is what the group normalisation paper uses on ImageNet.
_imagenet = functools.partial(
    ResNet, widths=(64, 128, 256, 512), shortcut="projection", stem="imagenet", groups=32
)
ResNet18 = functools.partial(_imagenet, stage_sizes=(2, 2, 2, 2))
ResNet34 = functools.partial(_imagenet, stage_sizes=(3, 4, 6, 3))
ResNet50 = functools.partial(_imagenet, stage_sizes=(3, 4, 6, 3), block="bottleneck")
