"""Staged models: networks that can be entered and left at every named layer.

A classifier with `S` stages is the chain

    h_0 = x,   h_k = stage_k(h_{k-1}),   k = 1..S,   h_S = logits,

and `layers` names the activations `(h_0, ..., h_S)`. Cutting the chain at layer `l` gives the two
functions `encode_l` (`start="input", stop=l`) and `decode_l` (`start=l, stop="logits"`), so that
a perturbation of `h_l` re-runs only the stages above it.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lpa_jax import checks
from lpa_jax.models.layers import Head, NormalizedHead, Primitives

NORMS = ("batch", "group", "none")
HEADS = ("linear", "normalized")


class StagedModel(nn.Module):
    """A classifier that is a chain of named stages, callable between any two layers.

    A subclass gives `stage_names`, the last one `"logits"`, and in `setup` a dictionary `stages`
    from each of these names to a callable `(x, train) -> x`: a parameter-free function, or a
    Linen module of that `name`. The parameters and statistics of a stage then have its
    name and its randomness depends on that name only, so two calls over `start..l` and `l..stop`
    with the same `rngs` compute what one call over `start..stop` does, dropout included. Running
    statistics (collection `"batch_stats"`) are updated for the stages that run and for no other.

    Attributes:
      num_classes: Number of classes `C`, the width of the logits.
      dtype: Floating type of the computation, or its name; `None` infers it from the input and
        the parameters. Parameters and running statistics are always float32, and
        logits are computed and returned in at least float32.
      head: The classifier behind the last activation: `"linear"` (`Head`), or `"normalized"`
        for cosines (`NormalizedHead`), which LDAM was published with.

    Raises:
      ValueError: An attribute is outside its range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lpa_jax import models
      >>> model = models.MLP(num_classes=3, hidden=(5, 4))
      >>> model.layers
      ('input', 'hidden1', 'hidden2', 'logits')
      >>> x = jnp.ones((2, 8, 8, 1))
      >>> variables = model.init(jax.random.key(0), x)
      >>> h = model.apply(variables, x, stop="hidden1")
      >>> h.shape
      (2, 5)
      >>> logits = model.apply(variables, h, start="hidden1")
      >>> bool((logits == model.apply(variables, x)).all())
      True
    """

    num_classes: int
    dtype: Any = dataclasses.field(default=None, kw_only=True)
    head: str = dataclasses.field(default="linear", kw_only=True)

    def __post_init__(self):
        self.num_classes = checks.integer("num_classes", self.num_classes, 1)
        checks.choice("head", self.head, HEADS)
        self.dtype = floating_dtype(self.dtype)
        super().__post_init__()

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Names of the stages in order, known without parameters; the last is `"logits"`."""
        raise NotImplementedError(f"{type(self).__name__} does not define stage_names")

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the activations in order: `"input"`, then one for each stage's output."""
        return ("input", *self.stage_names)

    def classifier(self) -> nn.Module:
        """Makes the last stage; `setup` calls it."""
        kind = Head if self.head == "linear" else NormalizedHead
        return kind(self.num_classes, self.dtype, name="logits")

    def __call__(
        self, x: jax.Array, *, train: bool = False, start: str = "input", stop: str = "logits"
    ) -> jax.Array:
        """Runs the stages after layer `start` up to and including layer `stop`.

        Args:
          x: Activation at `start`, `[B, ...]`; for `"input"` images `[B, H, W, channels]`.
          train: Whether normalisation uses batch statistics and dropout is active (which then
            needs an rng named `"dropout"`).
          start: Layer of `x`.
          stop: Layer to compute; `stop == start` is the identity.

        Returns:
          The activation at `stop`, `[B, ...]`; for `"logits"` `[B, C]`.

        Raises:
          ValueError: `start` or `stop` is not in `layers`, `stop` comes before `start`, or
            initialisation was asked for a part of the network.
        """
        checks.choice("start", start, self.layers)
        first = self.layers.index(start)
        checks.choice("stop", stop, self.layers[first:])
        last = self.layers.index(stop)
        if self.is_initializing() and last - first < len(self.stage_names):
            raise ValueError(
                "start and stop must span the whole network at initialisation, "
                f"got start={start!r}, stop={stop!r}"
            )
        for name in self.layers[first + 1 : last + 1]:
            x = self.stages[name](x, train)
        return x


class NormalizedModel(StagedModel):
    """A staged model with a choice of normalisation layers.

    Attributes:
      norm: `"batch"` (Ioffe and Szegedy, arXiv 1502.03167), `"group"` (Wu and He,
        arXiv 1803.08494) or `"none"`, with which the convolutions get biases.
      groups: Groups of `"group"`; a layer of `F` features has `gcd(groups, F)` of them.
      axis_name: Mapped axis over which `"batch"` averages its statistics in training, so that
        they are those of the global batch; `None` keeps them local.
      norm_momentum: Share of the old running statistics that one update of `"batch"` keeps.
      norm_epsilon: Added to the variance.
      frozen_norm: Whether `"batch"` normalises by its running statistics in training, too, and
        never updates them; its scales and biases are trained. For statistics that come with
        pretrained weights, as the code of DomainBed (arXiv 2007.01434) keeps them.

    Raises:
      ValueError: An attribute is outside its range.

    Example:
      >>> from lpa_jax import models
      >>> models.SmallCNN(10, norm="layer")
      Traceback (most recent call last):
      ...
      ValueError: norm must be one of batch, group, none, got 'layer'
    """

    norm: str = dataclasses.field(default="batch", kw_only=True)
    groups: int = dataclasses.field(default=8, kw_only=True)
    axis_name: str | None = dataclasses.field(default=None, kw_only=True)
    norm_momentum: float = dataclasses.field(default=0.9, kw_only=True)
    norm_epsilon: float = dataclasses.field(default=1e-5, kw_only=True)
    frozen_norm: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self):
        checks.choice("norm", self.norm, NORMS)
        self.groups = checks.integer("groups", self.groups, 1)
        checks.number("norm_momentum", self.norm_momentum, high=1.0, open_high=True)
        checks.number("norm_epsilon", self.norm_epsilon, open_low=True)
        if self.frozen_norm and self.norm != "batch":
            raise ValueError(f"norm must be batch with frozen_norm=True, got {self.norm!r}")
        super().__post_init__()

    @property
    def primitives(self) -> Primitives:
        """The convolution and normalisation layers that these attributes describe."""
        return Primitives(
            kind=self.norm,
            groups=self.groups,
            axis_name=self.axis_name,
            momentum=self.norm_momentum,
            epsilon=self.norm_epsilon,
            frozen=self.frozen_norm,
            dtype=self.dtype,
        )


def floating_dtype(dtype: Any) -> jnp.dtype | None:
    """`dtype` (a type or its name) as a NumPy dtype, or `None` for `None`.

    Raises:
      ValueError: It is not a floating type.
    """
    if dtype is None:
        return None
    try:
        result = jnp.dtype(dtype)
    except TypeError:
        result = None
    floating = result is not None and jnp.issubdtype(result, jnp.floating)
    checks.require(floating, "dtype", "a floating type such as float32 or bfloat16", dtype)
    return result


def numbered(prefix: str, count: int) -> tuple[str, ...]:
    """The names `prefix1` to `prefix<count>`."""
    return tuple(f"{prefix}{index + 1}" for index in range(count))
