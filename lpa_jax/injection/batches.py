"""The entries of a batch that a network reads: its inputs and its labels."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lpa_jax import checks
from lpa_jax.injection.api import as_network
from lpa_jax.injection.base import Array, Network, Pass, Variables

Names = str | tuple[str, ...]
# What else a step reads, besides inputs and labels.
_FURTHER = ("mask", "domain", "position")


class BatchNames(NamedTuple):
    """Which entries of a batch hold the inputs and the labels.

    Attributes:
      inputs: The entry, or the entries of a dictionary that the network gets.
      labels: The entry.
    """

    inputs: Names = "image"
    labels: str = "label"


@dataclasses.dataclass(frozen=True)
class NamedBatches:
    """A network with the names of its batches' entries; made by `with_batch_names`.

    Attributes:
      network: The network.
      names: The entries of a batch that it reads.
    """

    network: Network
    names: BatchNames

    @property
    def layers(self) -> tuple[str, ...]:
        """Injection points of the network."""
        return self.network.layers

    def init(self, rng: Array, inputs: Any) -> Variables:
        """Initial variables; see `Network.init`."""
        return self.network.init(rng, inputs)

    def run(self, given: Pass, pinned: Mapping[str, Array], stop: str) -> tuple[Array, Variables]:
        """Runs the network; see `Network.run`."""
        return self.network.run(given, pinned, stop)

    def run_with_taps(
        self, given: Pass, taps: Mapping[str, Callable[[Array], Array]]
    ) -> tuple[Array, Variables]:
        """Runs the network; see `Network.run_with_taps`."""
        return self.network.run_with_taps(given, taps)


def with_batch_names(model: Any, inputs: Names = "image", labels: str = "label") -> Network:
    """The same network, for batches whose entries have names of their own.

    Everything that takes the network, or a state made with it, reads its batches by these names.

    Args:
      model: A staged model or a cut network, as for `TrainState.create`, which takes the result.
      inputs: The entry that holds the inputs, any pytree of arrays with the example axis first; or
        a tuple of entries, of which the network gets a dictionary.
      labels: The entry that holds the labels.

    Raises:
      ValueError: A name that is no string.

    Example:
      >>> from lpa_jax.models import MLP
      >>> network = with_batch_names(MLP(num_classes=3), inputs="pixels", labels="y")
      >>> sorted(read_batch(network, {"pixels": np.zeros((2, 4)), "y": np.zeros(2, int)}))
      ['image', 'label']
    """
    names = inputs if isinstance(inputs, tuple) else (inputs,)
    named = names and all(isinstance(name, str) for name in names)
    checks.require(bool(named), "inputs", "the name of an entry or a tuple of names", inputs)
    checks.require(isinstance(labels, str), "labels", "the name of an entry", labels)
    return NamedBatches(as_network(model), BatchNames(inputs, labels))


def names_of(network: Any) -> BatchNames:
    """The names of the entries that a network reads; of any other network the usual ones."""
    while not hasattr(network, "names") and hasattr(network, "network"):
        network = network.network
    names = getattr(network, "names", None)
    return names if isinstance(names, BatchNames) else BatchNames()


def read_batch(network: Network, batch: Mapping[str, Any], labels: bool = True) -> dict[str, Any]:
    """The batch with its inputs as `image` and its labels as `label`.

    Raises:
      ValueError: An entry is missing, or arrays that are read differ in the number of examples.

    Example:
      >>> read_batch(None, {"image": np.zeros((4, 2)), "label": np.zeros(3)})
      Traceback (most recent call last):
        ...
      ValueError: batch['label'] must have 4 examples like batch['image'], got shape (3,)
    """
    names = names_of(network)
    checks.instance("batch", batch, Mapping, "a dictionary of arrays")
    wanted = names.inputs if isinstance(names.inputs, tuple) else (names.inputs,)
    needed = (*wanted, names.labels) if labels else wanted
    usual = ("image", "label") if labels else ("image",)
    if not all(name in batch for name in needed) and all(name in batch for name in usual):
        names, wanted, needed = BatchNames(), ("image",), usual  # read already
    for name in needed:
        if name not in batch:
            raise ValueError(
                f"batch must have an entry {name!r}, got {', '.join(map(str, batch)) or 'none'}; "
                "lpa_jax.with_batch_names gives the entries other names"
            )
        checks.require(batch[name] is not None, f"batch[{name!r}]", "an array", None)
    inputs = batch[names.inputs] if isinstance(names.inputs, str) else {n: batch[n] for n in wanted}
    read = {name: values for name, values in batch.items() if name not in wanted}
    read["image"] = inputs
    if names.labels in read:
        read["label"] = read.pop(names.labels)
    used = {name: batch[name] for name in (*wanted, names.labels) if name in batch}
    check_examples({**used, **{name: read[name] for name in _FURTHER if name in read}})
    return read


def check_examples(batch: Mapping[str, Any]) -> None:
    """Raises ValueError unless all arrays of a batch have the same number of examples.

    Example:
      >>> check_examples({"x": {"ids": np.zeros((4, 2)), "mask": np.zeros((2, 4))}})
      Traceback (most recent call last):
        ...
      ValueError: batch['x']['mask'] must have 4 examples like batch['x']['ids'], got shape (2, 4)
    """
    leaves = jax.tree_util.tree_leaves_with_path(dict(batch))
    named = [(f"batch{jax.tree_util.keystr(path)}", leaf, np.shape(leaf)) for path, leaf in leaves]
    for name, leaf, shape in named:
        first, _, expected = named[0]
        kind = leaf.dtype.kind if isinstance(leaf, np.ndarray) else ""
        checks.require(kind not in ("O", "U", "S"), name, "an array of numbers", leaf)
        checks.require(bool(shape), name, "an array with the example axis first", leaf)
        if shape[0] != expected[0]:
            raise ValueError(
                f"{name} must have {expected[0]} examples like {first}, got shape {shape}"
            )
