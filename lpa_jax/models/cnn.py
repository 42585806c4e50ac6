"""A small convolutional network for small images on a CPU."""

import dataclasses

import flax.linen as nn
import jax

from lpa_jax import checks
from lpa_jax.models import base, layers


class SmallCNN(base.NormalizedModel):
    """Stride-2 convolutions with normalisation and relu, global pooling, a linear head.

    h_k = relu(norm(conv3x3(h_{k-1}, stride 2))). Layers: `input`, `stage1` .. `stage<S>`, `pool`,
    `logits`. The architecture is this library's. `norm` is `"group"` by default, so that
    small batches and class-wise perturbations do not meet each other in batch statistics.

    Attributes:
      widths: Features of each stage.

    Raises:
      ValueError: An attribute is outside its range.

    Example:
      >>> from lpa_jax import models
      >>> models.SmallCNN(num_classes=10).layers
      ('input', 'stage1', 'stage2', 'stage3', 'pool', 'logits')
    """

    widths: tuple[int, ...] = (16, 32, 64)
    norm: str = dataclasses.field(default="group", kw_only=True)

    def __post_init__(self):
        self.widths = checks.positive_integers("widths", self.widths)
        super().__post_init__()

    @property
    def stage_names(self) -> tuple[str, ...]:
        """`stage1` .. `stage<S>`, `pool`, `logits`."""
        return (*base.numbered("stage", len(self.widths)), "pool", "logits")

    def setup(self):
        """Makes one callable a stage."""
        widths = dict(zip(self.stage_names, self.widths, strict=False))
        self.stages = {
            name: ConvNormRelu(width, self.primitives, name=name) for name, width in widths.items()
        } | {"pool": layers.global_average_pool, "logits": self.classifier()}


class ConvNormRelu(nn.Module):
    """One stage: relu(norm(conv(x))) with a 3 x 3 convolution of stride 2."""

    features: int
    primitives: layers.Primitives

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[B, H/2, W/2, features]`."""
        x = self.primitives.conv(x, self.features, 3, 2, name="conv")
        return layers.relu(self.primitives.norm(x, train=train, name="norm"))
