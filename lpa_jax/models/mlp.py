"""Multilayer perceptron, every hidden layer an injection point."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lpa_jax import checks
from lpa_jax.models import base, layers


class MLP(base.StagedModel):
    """Multilayer perceptron with relu and optional dropout.

    h_k = dropout(relu(W_k h_{k-1} + b_k)) with h_0 the flattened input, logits = W h_S + b.
    Layers: `input`, `hidden1` .. `hidden<S>`, `logits`; a hidden layer includes its dropout.

    Attributes:
      hidden: Widths of the hidden layers.
      dropout: Rate of the dropout after each hidden layer (Srivastava et al., JMLR 2014).

    Raises:
      ValueError: An attribute is outside its range.

    Example:
      >>> from lpa_jax import models
      >>> models.MLP(num_classes=10).layers
      ('input', 'hidden1', 'hidden2', 'hidden3', 'logits')
    """

    hidden: tuple[int, ...] = (256, 256, 128)
    dropout: float = 0.0

    def __post_init__(self):
        self.hidden = checks.positive_integers("hidden", self.hidden)
        self.dropout = checks.number("dropout", self.dropout, high=1.0, open_high=True)
        super().__post_init__()

    @property
    def stage_names(self) -> tuple[str, ...]:
        """`hidden1` .. `hidden<S>`, `logits`."""
        return (*base.numbered("hidden", len(self.hidden)), "logits")

    def setup(self):
        """Makes one module a stage."""
        widths = dict(zip(self.stage_names, self.hidden, strict=False))
        self.stages = {
            name: Hidden(width, self.dropout, self.dtype, name=name)
            for name, width in widths.items()
        } | {"logits": self.classifier()}


class Hidden(nn.Module):
    """One hidden layer; flattens its input, so that the first one takes images."""

    features: int
    dropout: float
    dtype: jnp.dtype | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """dropout(relu(W x + b)), `[B, features]`."""
        x = jnp.reshape(x, (x.shape[0], -1))
        x = nn.Dense(
            self.features, dtype=self.dtype, kernel_init=nn.initializers.he_normal(), name="dense"
        )(x)
        return layers.dropout(nn.relu(x), self.dropout, train)
