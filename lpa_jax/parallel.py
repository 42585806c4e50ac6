"""Many devices: the only file that names a mapper, devices or hosts.

A step is written for one device's share of the batch with an `axis_name` over which it reduces.
`pmap_step` maps it over the devices: the state is replicated, the batch split along its first axis,
and whatever the step returns is the same on every device.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lpa_jax.pgd import check_labels

AXIS_NAME = "batch"


def pmap_step(
    step: Callable[..., Any],
    *,
    axis_name: str = AXIS_NAME,
    devices: Sequence[jax.Device] | None = None,
    donate_state: bool = False,
) -> Callable[[Any, Mapping[str, Any]], Any]:
    """Maps a step over devices: global batch in, replicated result out.

    Args:
      step: (state, batch, axis_name=...) -> replicated results, such as `lpa_step` or `eval_step`
        with their keyword arguments bound by `functools.partial`.
      axis_name: name of the mapped axis that the step reduces over.
      devices: the devices; all of them if None.
      donate_state: let the new state take the memory of the old one, which cannot be read again.

    Returns:
      (state, batch) -> results. The state is an ordinary pytree, neither stacked nor unstacked; the
      arrays of the batch are [B, ...] over this host's devices, with B a multiple of their number.

    Raises:
      ValueError: (when called) the batch does not split evenly, or labels are outside 0..C-1.

    >>> import jax.numpy as jnp
    >>> def count(state, batch, axis_name):
    ...     return state + jax.lax.psum(jnp.sum(batch["image"]), axis_name)
    >>> float(pmap_step(count)(1.0, {"image": np.ones(8 * jax.device_count(), np.float32)}) - 1) / 8
    1.0
    """
    devices = jax.devices() if devices is None else list(devices)
    local = [device for device in devices if device.process_index == jax.process_index()]
    mapped = pmapped(step, devices, axis_name=axis_name, donate_state=donate_state)

    mesh = jax.sharding.Mesh(np.asarray(devices), (axis_name,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def call(state, batch):
        check_batch(batch, getattr(state, "num_classes", None))
        batch = shard_batch(batch, len(local))
        first = jax.tree.leaves(state)[:1]
        settled = all(getattr(leaf, "sharding", None) == everywhere for leaf in first)
        if len(local) == len(devices) and not settled:
            # Where the steps leave it: for a state on one device XLA would compile once more.
            state = jax.device_put(state, everywhere)
        return mapped(state, batch)

    return call


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


def map_step(step: Callable[..., Any]) -> Callable[[Any, Mapping[str, Any]], Any]:
    """Compiles a step for the devices there are: `jax.jit` for one, `pmap_step` for several.

    Args:
      step: (state, batch, axis_name=...) -> results, as for `pmap_step`.
    """
    if jax.device_count() > 1:
        return pmap_step(step)
    compiled = jax.jit(lambda state, batch: step(state, batch, axis_name=None))

    def call(state, batch):
        check_batch(batch, getattr(state, "num_classes", None))
        return compiled(state, batch)

    return call


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
