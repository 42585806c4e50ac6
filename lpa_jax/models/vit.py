"""Vision transformers, every block an injection point.

References:
  Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv 2010.11929, section 3.1.
  Touvron et al., "Training data-efficient image transformers", arXiv 2012.12877, table 1
  (the tiny and small sizes).
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from lpa_jax import checks
from lpa_jax.models import base


class ViT(base.StagedModel):
    """Vision transformer with a class token and learned positions.

    z_0 = [class; patches W + b] + positions; in block k, z' = z + attention(norm(z)) and
    z = z' + mlp(norm(z')); the pooled activation is the class token of norm(z). With N patches
    an activation of a block is `[B, 1 + N, width]`. Layers: `input`, `embed`, `block1` ..
    `block<depth>`, `pool`, `logits`.

    The image size is that of the images at initialisation. At 224 x 224 and 1000 classes
    `ViT_Ti16` has 5,717,416, `ViT_S16` 22,050,664 and `ViT_L16` 304,326,632 parameters.

    Attributes:
      patch: Side of a patch in pixels; must divide the image's height and width.
      width: Features of a token.
      depth: Number of blocks.
      heads: Number of attention heads; must divide `width`.
      mlp_ratio: Hidden features of a block's MLP, in units of `width`.
      dropout: Rate of the dropout after the embedding and after every layer of a block.
      norm_epsilon: Added to the variance in the layer norms.

    Raises:
      ValueError: An attribute is outside its range, or the images do not divide into patches.

    Example:
      >>> from lpa_jax import models
      >>> models.ViT(num_classes=10, patch=4, width=32, depth=2, heads=2).layers
      ('input', 'embed', 'block1', 'block2', 'pool', 'logits')
    """

    patch: int = 16
    width: int = 192
    depth: int = 12
    heads: int = 3
    mlp_ratio: int = 4
    dropout: float = 0.0
    norm_epsilon: float = 1e-6

    def __post_init__(self):
        for name in ("patch", "width", "depth", "heads", "mlp_ratio"):
            setattr(self, name, checks.integer(name, getattr(self, name), 1))
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads={self.heads}, got {self.width}")
        self.dropout = checks.number("dropout", self.dropout, high=1.0, open_high=True)
        checks.number("norm_epsilon", self.norm_epsilon, open_low=True)
        super().__post_init__()

    @property
    def stage_names(self) -> tuple[str, ...]:
        """`embed`, `block1` .. `block<depth>`, `pool`, `logits`."""
        return ("embed", *base.numbered("block", self.depth), "pool", "logits")

    def setup(self):
        """Makes one module a stage."""
        make_block = functools.partial(
            Block, self.heads, self.mlp_ratio, self.dropout, self.norm_epsilon, self.dtype
        )
        self.stages = (
            {"embed": Embed(self.patch, self.width, self.dropout, self.dtype, name="embed")}
            | {name: make_block(name=name) for name in base.numbered("block", self.depth)}
            | {
                "pool": ClassToken(self.norm_epsilon, self.dtype, name="pool"),
                "logits": self.classifier(),
            }
        )


class Embed(nn.Module):
    """Linear patch embedding, class token, positions, dropout."""

    patch: int
    width: int
    dropout: float
    dtype: jnp.dtype | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Tokens `[B, 1 + H*W/patch^2, width]`, the class token first."""
        batch, height, width, _ = x.shape
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"patch must divide the image size {height} x {width}, got {self.patch}"
            )
        x = nn.Conv(
            self.width,
            (self.patch, self.patch),
            strides=(self.patch, self.patch),
            padding="VALID",
            dtype=self.dtype,
            name="conv",
        )(x)
        x = jnp.reshape(x, (batch, -1, self.width))
        token = self.param("token", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.tile(token.astype(x.dtype), (batch, 1, 1)), x], axis=1)
        positions = self.param(
            "positions", nn.initializers.normal(0.02), (1, x.shape[1], self.width)
        )
        x = x + positions.astype(x.dtype)
        return nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)


class Block(nn.Module):
    """Pre-norm transformer encoder block."""

    heads: int
    mlp_ratio: int
    dropout: float
    norm_epsilon: float
    dtype: jnp.dtype | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Tokens of the shape of `x`, `[B, 1 + N, width]`."""
        norm = functools.partial(nn.LayerNorm, epsilon=self.norm_epsilon, dtype=self.dtype)
        dropout = functools.partial(nn.Dropout, self.dropout, deterministic=not train)
        dense = functools.partial(
            nn.Dense, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform()
        )
        y = nn.MultiHeadDotProductAttention(
            num_heads=self.heads,
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            force_fp32_for_softmax=True,
            name="attention",
        )(norm(name="norm1")(x))
        x = x + dropout(name="dropout1")(y)
        y = dense(self.mlp_ratio * x.shape[-1], name="dense1")(norm(name="norm2")(x))
        y = dropout(name="dropout2")(nn.gelu(y, approximate=False))
        y = dense(x.shape[-1], name="dense2")(y)
        return x + dropout(name="dropout3")(y)


class ClassToken(nn.Module):
    """The class token after the last layer norm."""

    norm_epsilon: float
    dtype: jnp.dtype | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[B, width]`; the norm acts on each token alone, so one suffices."""
        del train
        return nn.LayerNorm(epsilon=self.norm_epsilon, dtype=self.dtype, name="norm")(x[:, 0])


ViT_Ti16 = functools.partial(ViT, patch=16, width=192, depth=12, heads=3)
ViT_S16 = functools.partial(ViT, patch=16, width=384, depth=12, heads=6)
ViT_L16 = functools.partial(ViT, patch=16, width=1024, depth=24, heads=16)
