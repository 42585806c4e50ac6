"""Random search: what is drawn for each method, from which range.

All methods draw their learning rate and weight decay from the same ranges, and the same values in
trial t, so that they differ only in their own options.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.methods import names
from experiments.runtime import fields
from lpa_jax import models
from lpa_jax.injection import activation_shapes, as_network, check_layer


@dataclasses.dataclass(frozen=True)
class LogUniform:
    """Uniform in the logarithm between `low` and `high`, to three significant digits."""

    low: float
    high: float

    def draw(self, rng: np.random.Generator) -> float:
        """One value."""
        value = np.exp(rng.uniform(np.log(self.low), np.log(self.high)))
        return float(f"{value:.3g}")


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several values with equal chances."""

    values: tuple[Any, ...]

    def draw(self, rng: np.random.Generator) -> Any:
        """One value."""
        return self.values[rng.integers(len(self.values))]


Space = LogUniform | Choice


def parse_space(text: str) -> tuple[str, Space]:
    """An option and the range that a text names: two bounds, or values to choose from.

    Args:
      text: `OPTION=LOW:HIGH`, uniform in the logarithm, or `OPTION=VALUE|VALUE`; OPTION is
        `PART.OPTION`, `learning_rate`, `weight_decay` or, in domain generalization,
        `batch_size` or `model_dropout`.

    Raises:
      ValueError: it names no such option, or no such range.

    >>> parse_space("lpa.radius_target=0.03:2"), parse_space("lpa.steps=1|3")
    (('lpa.radius_target', LogUniform(low=0.03, high=2.0)), ('lpa.steps', Choice(values=(1, 3))))
    """
    name, _, values = text.partition("=")
    chosen = tuple(names.parsed_value(value) for value in values.split("|"))
    is_range = ":" in values
    for value in (1.0,) if is_range else chosen:
        fields.named(f"space: {text!r}", functools.partial(names.check_option, name, value))
    if not is_range:
        return name, Choice(chosen)
    try:
        low, high = (float(bound) for bound in values.split(":"))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 < low <= high < math.inf:
        raise ValueError(f"--space: {text!r} must be OPTION=LOW:HIGH with 0 < LOW <= HIGH")
    return name, LogUniform(low, high)


RUN_SPACE: dict[str, Space] = {
    "learning_rate": LogUniform(0.005, 0.1),
    "weight_decay": LogUniform(1e-4, 5e-3),
}
# DomainBed's, for Adam: on its MNIST sets, and on photographs.
ADAM_SMALL: dict[str, Space] = {
    "learning_rate": LogUniform(10**-4.5, 10**-2.5),
    "weight_decay": Choice((0.0,)),
}
ADAM_LARGE: dict[str, Space] = {
    "learning_rate": LogUniform(1e-5, 10**-3.5),
    "weight_decay": LogUniform(1e-6, 1e-2),
}
# LDAM's scale in front of cosines, around the published 30.
COSINE_SCALE: dict[str, Space] = {
    "ldam.scale": LogUniform(10.0, 60.0),
    "ldam_drw.scale": LogUniform(10.0, 60.0),
}
# Relative radii that are harmless in dense layers make training in convolutional ones fail.
SPATIAL_RADIUS = LogUniform(0.001, 0.1)
_RELATIVE_RADII = ("lpa", "adversarial")


class HiddenLayers(NamedTuple):
    """Layers at which a search places perturbations.

    Attributes:
      names: layers, each with the same probability.
      spatial: layers whose activations have positions, `[B, H, W, F]` or `[B, T, F]`.
    """

    names: tuple[str, ...]
    spatial: frozenset[str] = frozenset()


@functools.cache
def hidden_layers(model: str, chosen: tuple[str, ...] = ()) -> HiddenLayers:
    """Hidden layers of a model, or the chosen ones among them.

    Args:
      model: its name.
      chosen: layers to keep; all hidden layers if empty.

    Raises:
      ValueError: a chosen layer that the model does not have.

    >>> hidden_layers("small_cnn", ("stage3", "pool"))
    HiddenLayers(names=('stage3', 'pool'), spatial=frozenset({'stage3'}))
    """
    network = as_network(models.create(model, 2))
    for layer in chosen:
        check_layer(network.layers, layer)
    layers = chosen or network.layers[1:-1]
    # How many axes an activation has does not depend on the size of the image.
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), image)
    shapes = activation_shapes(network, variables, image, layers)
    return HiddenLayers(layers, frozenset(name for name in layers if len(shapes[name].shape) > 2))


def moved(value: float, source: LogUniform, target: LogUniform) -> float:
    """The value at the same place of `target` as `value` in `source`, on a logarithmic scale.

    >>> moved(0.1, LogUniform(0.01, 1.0), LogUniform(2.0, 8.0))  # in the middle
    4.0
    """
    place = math.log(value / source.low) / math.log(source.high / source.low)
    return float(f"{target.low * (target.high / target.low) ** place:.3g}")


def part_space(name: str, hidden_layers: Sequence[str]) -> dict[str, Space]:
    """Ranges of a perturbation's own options.

    Args:
      name: a registered perturbation.
      hidden_layers: layers to draw from.
    """
    layer = {"layer": Choice(tuple(hidden_layers))}
    signed = {"negative_scale": Choice((0.1, 0.3, 0.5, 1.0))}
    spaces = {
        "lpa": {"radius": LogUniform(0.01, 0.8), **signed, **layer},
        "lpl": {"radius": LogUniform(0.3, 30.0), **signed},
        "adversarial": {"radius": LogUniform(0.005, 0.8), **layer},
        "dropout": {"rate": Choice((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)), **layer},
        "spatial_dropout": {"rate": Choice((0.05, 0.1, 0.2, 0.3, 0.4, 0.5)), **layer},
        "gaussian_noise": {"sigma": LogUniform(0.03, 2.0), **layer},
        "manifold_mixup": {"alpha": LogUniform(0.1, 4.0), **layer},
        "mixstyle": {
            "alpha": LogUniform(0.05, 1.0),
            "probability": Choice((0.25, 0.5, 0.75, 1.0)),
            **layer,
        },
        "mixup": {"alpha": LogUniform(0.05, 2.0)},
        "rsc": {"drop_f": Choice((0.1, 0.2, 0.33, 0.5)), "drop_b": Choice((0.2, 0.33, 0.5, 1.0))},
        "sam": {"rho": LogUniform(0.01, 0.5)},
        "label_smoothing": {"smoothing": LogUniform(0.01, 0.4)},
        "logit_adjusted": {"tau": LogUniform(0.3, 3.0)},
        "posthoc_logit_adjustment": {"tau": LogUniform(0.3, 3.0)},
        "balanced_softmax": {},
        "focal": {"gamma": LogUniform(0.3, 5.0)},
        "class_balanced": {"beta": Choice((0.9, 0.99, 0.999, 0.9999))},
        "ldam": {"max_margin": LogUniform(0.1, 5.0), "scale": LogUniform(0.5, 10.0)},
        "ldam_drw": {
            "max_margin": LogUniform(0.1, 5.0),
            "scale": LogUniform(0.5, 10.0),
            "beta": Choice((0.9, 0.99, 0.999, 0.9999)),
            "switch": Choice((0.6, 0.7, 0.8, 0.9)),
        },
        "isda": {"strength": LogUniform(0.05, 1.0)},
        "group_dro": {"eta": LogUniform(1e-3, 1e-1)},
        "coral": {"weight": LogUniform(0.03, 10.0)},
        "irm": {"weight": LogUniform(0.1, 1e3), "anneal_steps": Choice((0, 50, 100, 200))},
        "vrex": {"weight": LogUniform(0.1, 1e3), "anneal_steps": Choice((0, 50, 100, 200))},
        "spectral_decoupling": {"weight": LogUniform(1e-3, 1.0)},
    }
    # Of a perturbation that a user registered, the layer is searched; of another part, nothing.
    return spaces.get(name, layer if "layer" in names.part_options(name) else {})


def radius_space(name: str, layer: str | None, hidden: HiddenLayers) -> LogUniform:
    """Range of a part's radius at a layer: relative radii are smaller in spatial ones.

    >>> radius_space("lpa", "stage3", hidden_layers("small_cnn")) == SPATIAL_RADIUS
    True
    """
    if name in _RELATIVE_RADII and layer in hidden.spatial:
        return SPATIAL_RADIUS
    return part_space(name, hidden.names)["radius"]


def draw(
    method: str,
    trial: int,
    hidden: HiddenLayers,
    seed: int = 0,
    ranges: Mapping[str, Space] = MappingProxyType({}),
) -> dict[str, Any]:
    """The options of a trial: a pure function of all arguments.

    Args:
      method: its name.
      trial: number of the trial.
      hidden: layers to draw from; in spatial layers radii come from `SPATIAL_RADIUS`.
      seed: of the search.
      ranges: by option (`learning_rate`, `lpa.radius`), in place of the usual ranges, or for
        options that are not searched otherwise.

    >>> draw("erm", 0, HiddenLayers(("hidden1",))) == draw("erm", 0, HiddenLayers(("hidden1",)))
    True
    """
    shared = np.random.default_rng([seed, trial])
    options = {name: ranges.get(name, space).draw(shared) for name, space in RUN_SPACE.items()}
    for name in names.DOMAIN_RUN_OPTIONS:
        if name in ranges and name not in options:
            options[name] = ranges[name].draw(shared)
    if "batch_size" in options:
        options["batch_size"] = int(options["batch_size"])
    for part in names.parse(method):
        # Streams are keyed by the part alone: lpa+lpl explores what lpa and lpl explore.
        rng = np.random.default_rng([seed, trial, zlib.crc32(part.name.encode())])
        spaces = part_space(part.name, hidden.names)
        # Options that are not searched otherwise come last, so that they change no other draw.
        own = names.own_options(part.name, ranges)
        spaces = {name: own.get(name, space) for name, space in spaces.items()} | own
        drawn = {name: space.draw(rng) for name, space in spaces.items()}
        if "radius" in drawn and f"{part.name}.radius" not in ranges:
            range_there = radius_space(part.name, part.layer or drawn.get("layer"), hidden)
            if range_there != spaces["radius"]:
                drawn["radius"] = moved(drawn["radius"], spaces["radius"], range_there)
        if part.layer:
            drawn.pop("layer", None)
        options |= {f"{part.name}.{name}": value for name, value in drawn.items()}
    return options
