"""Many devices: the only file that names a mapper or devices.

A step is written for one device's share of the batch with an `axis_name` over which it reduces.
`pmap_step` maps it over the devices of all hosts: the state is replicated, the batch split along
its first axis, and whatever the step returns is the same on every device. Hosts are told of each
other by `lpa_jax.multihost`; the mapped step is the same on one host and on many.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpa_jax.pgd import check_labels

AXIS_NAME = "batch"


@dataclasses.dataclass(frozen=True)
class PlacedBatch:
    """A batch that is checked, split and on its way to the devices; made by `MappedStep.place`.

    Attributes:
      host: the batch as it came; `placed[name]` reads it, so that no one waits for a device.
      arrays: its arrays as the mapped step takes them.
    """

    host: Mapping[str, Any]
    arrays: Mapping[str, jax.Array]

    def __getitem__(self, name: str) -> Any:
        return self.host[name]


class MappedStep:
    """A step compiled for devices, (state, batch) -> results; made by `pmap_step` or `map_step`."""

    def __init__(
        self,
        mapped: Callable[[Any, Mapping[str, Any]], Any],
        place: Callable[[Mapping[str, Any]], Mapping[str, jax.Array]],
        settle: Callable[[Any], Any],
        num_classes: int | None,
    ):
        self._mapped, self._place, self._settle = mapped, place, settle
        self._num_classes = num_classes

    def place(self, batch: Mapping[str, Any], num_classes: int | None = None) -> PlacedBatch:
        """Checks a host batch and starts its way to the devices, without waiting for it.

        What `__call__` does with a batch first, as a step of its own: a prefetcher does it for the
        next batch while the devices are busy with this one.

        Args:
          batch: arrays [B, ...] by name.
          num_classes: C, where the step was not told.

        Raises:
          ValueError: labels outside 0..C-1, or a batch that does not split evenly.
        """
        check_batch(batch, self._num_classes or num_classes)
        return PlacedBatch(batch, self._place(batch))

    def __call__(self, state: Any, batch: Mapping[str, Any] | PlacedBatch) -> Any:
        """Runs the step; does not wait for its results."""
        if not isinstance(batch, PlacedBatch):
            batch = self.place(batch, getattr(state, "num_classes", None))
        return self._mapped(self._settle(state), batch.arrays)


def pmap_step(
    step: Callable[..., Any],
    *,
    axis_name: str = AXIS_NAME,
    devices: Sequence[jax.Device] | None = None,
    donate_state: bool = False,
    num_classes: int | None = None,
) -> MappedStep:
    """Maps a step over devices: this host's part of the batch in, replicated result out.

    Args:
      step: (state, batch, axis_name=...) -> replicated results, such as `lpa_step` or `eval_step`
        with their keyword arguments bound by `functools.partial`.
      axis_name: name of the mapped axis that the step reduces over.
      devices: the devices; all of them, of every host, if None.
      donate_state: let the new state take the memory of the old one, which cannot be read again.
        The first state needs buffers of its own: see `with_own_buffers`.
      num_classes: C, against which labels are checked; None reads it from a `TrainState`.

    Returns:
      (state, batch) -> results. The state is an ordinary pytree, neither stacked nor unstacked; the
      arrays of the batch are [B, ...] over this host's devices, with B a multiple of their number.

    Raises:
      ValueError: (when called) the batch does not split evenly, or labels are outside 0..C-1.

    >>> def count(state, batch, axis_name):
    ...     return state + jax.lax.psum(jnp.sum(batch["image"]), axis_name)
    >>> float(pmap_step(count)(1.0, {"image": np.ones(8 * jax.device_count(), np.float32)}) - 1) / 8
    1.0
    """
    devices = jax.devices() if devices is None else list(devices)
    local = [device for device in devices if device.process_index == jax.process_index()]
    mapped = pmapped(step, devices, axis_name=axis_name, donate_state=donate_state)
    # What crosses the border of a mapped step belongs to this host, on one host as on many.
    mesh = jax.sharding.Mesh(np.asarray(local), (axis_name,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(axis_name))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def place(batch):
        return jax.device_put(shard_batch(batch, len(local)), split)

    def settle(state):
        # Where the steps leave it: for a state on one device XLA would compile once more.
        return jax.tree.map(
            lambda leaf: (
                leaf
                if getattr(leaf, "sharding", None) == everywhere
                else jax.device_put(leaf, everywhere)
            ),
            state,
        )

    return MappedStep(mapped, place, settle, num_classes)


def pmapped(
    step: Callable[..., Any],
    devices: Sequence[jax.Device],
    *,
    axis_name: str = AXIS_NAME,
    donate_state: bool = False,
) -> Callable[[Any, Mapping[str, Any]], Any]:
    """The mapped step inside `pmap_step`, without its checks: what `.lower` compiles ahead of time.

    Args:
      step: as for `pmap_step`.
      devices: the devices, which need not exist where nothing but `.lower(...).compile()` is asked.
      axis_name: as for `pmap_step`.
      donate_state: as for `pmap_step`.

    Returns:
      (state, batch) -> results, the arrays of the batch split as by `shard_batch`.
    """
    return jax.pmap(
        lambda state, batch: step(state, batch, axis_name=axis_name),
        axis_name=axis_name,
        in_axes=(None, 0),
        out_axes=None,
        devices=devices,
        donate_argnums=(0,) if donate_state else (),
    )


def map_step(
    step: Callable[..., Any], *, donate_state: bool = False, num_classes: int | None = None
) -> MappedStep:
    """Compiles a step for the devices there are: `jax.jit` for one, `pmap_step` for several.

    Args:
      step: (state, batch, axis_name=...) -> results, as for `pmap_step`.
      donate_state: as for `pmap_step`.
      num_classes: as for `pmap_step`.
    """
    if jax.device_count() > 1:
        return pmap_step(step, donate_state=donate_state, num_classes=num_classes)
    compiled = jax.jit(
        lambda state, batch: step(state, batch, axis_name=None),
        donate_argnums=(0,) if donate_state else (),
    )
    return MappedStep(
        compiled, lambda batch: jax.device_put(dict(batch)), lambda state: state, num_classes
    )


def with_own_buffers(state: Any) -> Any:
    """The same state in memory that nothing else refers to, so that a step may take it over.

    A new state can name one array twice (slow weights that start as the weights, for example).

    >>> zero = jnp.zeros(2)
    >>> a, b = with_own_buffers((zero, zero))
    >>> a is b
    False
    """
    return jax.tree.map(jnp.copy, state)


def batch_axis() -> str | None:
    """The axis that a mapped step reduces over where `map_step` maps: None on a single device.

    What a model's `axis_name` should be for synchronised batch normalisation.
    """
    return AXIS_NAME if jax.device_count() > 1 else None


def must_block() -> bool:
    """Whether every step must be waited for: several CPU devices of one process deadlock else."""
    return jax.default_backend() == "cpu" and jax.local_device_count() > 1


def shard_batch(batch: Mapping[str, Any], num_shards: int) -> dict[str, Any]:
    """Splits every array of a host batch, [B, ...] -> [num_shards, B / num_shards, ...].

    Raises:
      ValueError: B is not a multiple of `num_shards`.

    >>> shard_batch({"label": np.arange(4)}, 2)["label"].tolist()
    [[0, 1], [2, 3]]
    """
    for name, values in batch.items():
        if values.shape[0] % num_shards:
            raise ValueError(
                f"batch[{name!r}] has {values.shape[0]} examples, which do not split evenly over "
                f"{num_shards} devices"
            )
    return {
        name: values.reshape((num_shards, values.shape[0] // num_shards, *values.shape[1:]))
        for name, values in batch.items()
    }


def check_batch(batch: Mapping[str, Any], num_classes: int | None) -> None:
    """Refuses batches whose labels a device would silently clamp.

    Raises:
      ValueError: a label outside 0..num_classes-1.
    """
    if num_classes is not None and "label" in batch:
        check_labels(batch["label"], num_classes)
