"""A step on many devices: the only file that names a mapper or devices.

`pmap_step` maps a step that reduces over an `axis_name` over the devices of all hosts: the batch is
split along its first axis, the state and all further arguments are replicated, and so are the
results. `mesh_step` compiles a step for a `jax.sharding.Mesh` instead: the step sees the whole
batch, the compiler adds the communication, and the state may be spread over the devices (FSDP).
`lpa_jax.multihost` connects the hosts; the mapped step is the same on one host and on many.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lpa_jax.checks import check_labels, choice, instance, is_known
from lpa_jax.injection import check_examples, names_of

AXIS_NAME = "batch"


@dataclasses.dataclass(frozen=True)
class PlacedBatch:
    """A checked batch whose arrays are on their way to the devices; made by `MappedStep.place`.

    Attributes:
      host: The batch on the host; `placed[name]` reads it without waiting for a device.
      arrays: Its arrays as the mapped step takes them.
    """

    host: Mapping[str, Any]
    arrays: Mapping[str, jax.Array]

    def __getitem__(self, name: str) -> Any:
        return self.host[name]


@dataclasses.dataclass(frozen=True)
class MappedStep:
    """A step compiled for devices, made by `pmap_step`, `mesh_step` or `map_step`.

    Called as (state, batch, *replicated) -> results: the batch is split over the devices, all
    further arguments are the same on each, and so is the state, unless `mesh_step` spreads it.

    Attributes:
      mapped: The compiled (state, arrays of the batch, tuple of replicated arguments) -> results.
      put_batch: Sends the arrays of a host batch to the devices.
      to_devices: Sends a pytree to every device, except the leaves that are there already.
      put_state: Sends a state to the devices, except the leaves that are there already.
      num_classes: C, against which labels are checked; None reads it from the state.
      bound: Replicated arguments that come before those of a call; see `bind`.
    """

    mapped: Callable[[Any, Mapping[str, Any], tuple[Any, ...]], Any]
    put_batch: Callable[[Mapping[str, Any]], Mapping[str, jax.Array]]
    to_devices: Callable[[Any], Any]
    put_state: Callable[[Any], Any]
    num_classes: int | None
    bound: tuple[Any, ...] = ()

    def bind(self, *replicated: Any) -> "MappedStep":
        """The same compiled step with its first replicated arguments given, as by a partial.

        They are sent to the devices once. Steps bound to other values of the same shapes and types
        share the compilation.
        """
        return dataclasses.replace(self, bound=(*self.bound, *self.to_devices(replicated)))

    def place(
        self, batch: Mapping[str, Any], num_classes: int | None = None, labels: str = "label"
    ) -> PlacedBatch:
        """Checks a host batch and starts to send it to the devices, without waiting for it.

        A call of the step does this first. A prefetcher does it for the next batch while the
        devices work on this one.

        Args:
          batch: Arrays [B, ...], or pytrees of them, by name.
          num_classes: C, if the step was made without it.
          labels: The entry that holds the labels.

        Raises:
          ValueError: Labels outside 0..C-1, or a batch that does not split evenly.
        """
        instance("batch", batch, Mapping, "a dictionary of arrays")
        check_batch(batch, self.num_classes or num_classes, labels)
        return PlacedBatch(batch, self.put_batch(batch))

    def __call__(self, state: Any, batch: Mapping[str, Any] | PlacedBatch, *replicated: Any) -> Any:
        """Runs the step; does not wait for its results."""
        if not isinstance(batch, PlacedBatch):
            labels = names_of(getattr(state, "network", None)).labels
            batch = self.place(batch, getattr(state, "num_classes", None), labels)
        replicated = (*self.bound, *self.to_devices(replicated))
        return self.mapped(self.put_state(state), batch.arrays, replicated)


def pmap_step(
    step: Callable[..., Any],
    *,
    axis_name: str = AXIS_NAME,
    devices: Sequence[jax.Device] | None = None,
    donate_state: bool = False,
    num_classes: int | None = None,
) -> MappedStep:
    """Maps a step over devices: takes this host's part of the batch, returns replicated results.

    Args:
      step: (state, batch, *replicated, axis_name=...) -> replicated results, such as `lpa_step` or
        `eval_step` with their keyword arguments bound by `functools.partial`.
      axis_name: Name of the mapped axis that the step reduces over.
      devices: The devices; all of them, of every host, if None.
      donate_state: Let the new state take the memory of the old one, which cannot be read again.
        The first state needs buffers of its own: see `with_own_buffers`. Other arguments keep
        theirs.
      num_classes: C, against which labels are checked; None reads it from a `TrainState`.

    Returns:
      (state, batch, *replicated) -> results. State and replicated arguments are ordinary pytrees,
      neither stacked nor unstacked; the arrays of the batch are [B, ...] over this host's devices,
      with B a multiple of their number.

    Raises:
      ValueError: (when called) the batch does not split evenly, or labels are outside 0..C-1.

    Example:
      >>> def count(state, batch, weight, axis_name):
      ...     return state + weight * jax.lax.psum(jnp.sum(batch["image"]), axis_name)
      >>> batch = {"image": np.ones(8 * jax.device_count(), np.float32)}
      >>> float(pmap_step(count)(1.0, batch, 2.0) - 1) / 8
      2.0
    """
    devices = jax.devices() if devices is None else list(devices)
    local = [device for device in devices if device.process_index == jax.process_index()]
    mapped = pmapped(step, devices, axis_name=axis_name, donate_state=donate_state)
    # All arguments and results of a mapped step are on this host's devices, with many hosts, too.
    mesh = jax.sharding.Mesh(np.asarray(local), (axis_name,))
    split = NamedSharding(mesh, PartitionSpec(axis_name))

    def put_batch(batch):
        return jax.device_put(shard_batch(batch, len(local)), split)

    def to_devices(tree):
        # Where the steps leave their results: for a state on one device XLA would compile again.
        return _put(tree, replicated_shardings(tree, mesh))

    return MappedStep(mapped, put_batch, to_devices, to_devices, num_classes)


def mesh_step(
    step: Callable[..., Any],
    mesh: jax.sharding.Mesh,
    *,
    axis_names: Sequence[str] | None = None,
    shardings: Callable[[Any, jax.sharding.Mesh], Any] | None = None,
    donate_state: bool = False,
    num_classes: int | None = None,
) -> MappedStep:
    """Compiles a step for a mesh with `jax.jit`: takes this host's part of the batch.

    The step is the one for a single device, with `axis_name=None`, and sees the global batch. All
    axes of the mesh are `AxisType.Auto` inside it, whatever they are outside.

    Args:
      step: (state, batch, *replicated, axis_name=...) -> results, as for `pmap_step`. A model with
        synchronised batch normalisation needs no `axis_name`.
      mesh: The mesh, such as `jax.make_mesh((8,), ("data",))`.
      axis_names: Axes of the mesh over which the batch is split; all if None.
      shardings: (tree, mesh) -> tree of `NamedSharding`: where the arrays of the state and of the
        results are. `replicated_shardings` if None; `fsdp_shardings` for FSDP.
      donate_state: As for `pmap_step`.
      num_classes: As for `pmap_step`.

    Returns:
      (state, batch, *replicated) -> results, as from `pmap_step`; the arrays of the batch are
      [B, ...] over this host's devices.

    Raises:
      ValueError: An axis that the mesh does not have; (when called) the batch does not split
        evenly, or labels are outside 0..C-1.

    Example:
      >>> def count(state, batch, axis_name):
      ...     return state + jnp.sum(batch["image"])
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> batch = {"image": np.ones(8 * jax.device_count(), np.float32)}
      >>> float(mesh_step(count, mesh)(1.0, batch) - 1) / jax.device_count()
      8.0
    """
    mesh = _in_auto_axes(mesh)
    axis_names = (axis_names,) if isinstance(axis_names, str) else axis_names
    axes = mesh.axis_names if axis_names is None else tuple(axis_names)
    for name in axes:
        choice("axis_names", name, mesh.axis_names)
    shardings = replicated_shardings if shardings is None else shardings
    split = NamedSharding(mesh, PartitionSpec(axes))
    hosts = len({device.process_index for device in mesh.devices.flat})
    shards = math.prod(mesh.shape[name] for name in axes) // hosts

    def placed(state, batch, replicated):
        results = step(state, batch, *replicated, axis_name=None)
        return jax.lax.with_sharding_constraint(results, shardings(results, mesh))

    def put_batch(batch):
        check_split(batch, shards)
        send = functools.partial(jax.make_array_from_process_local_data, split)
        return jax.tree.map(functools.partial(_by_data, send), dict(batch))

    return MappedStep(
        jax.jit(placed, donate_argnums=(0,) if donate_state else ()),
        put_batch,
        lambda tree: _put(tree, replicated_shardings(tree, mesh)),
        lambda state: _put(state, shardings(state, mesh)),
        num_classes,
    )


def replicated_shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """A sharding for every array of a tree: whole on every device of the mesh."""
    everywhere = NamedSharding(_in_auto_axes(mesh), PartitionSpec())
    return jax.tree.map(lambda leaf: everywhere, tree)


def fsdp_shardings(
    tree: Any, mesh: jax.sharding.Mesh, *, axis_name: str | None = None, min_size: int = 2**14
) -> Any:
    """A sharding for every array of a tree: large ones are spread over the devices (FSDP).

    An array is split along its largest axis whose length is a multiple of the number of devices; of
    equal ones, the first. Arrays with fewer than `min_size` entries, or without such an axis, are
    whole on every device. So every device keeps its part of the parameters, of the optimizer's
    state and of carried class tables; the compiler gathers parameters where they are used.

    Args:
      tree: Arrays or their shapes, such as a `TrainState`.
      mesh: The mesh.
      axis_name: Axis of the mesh over which arrays are split; all axes together if None.
      min_size: Smallest number of entries of an array that is split.

    Returns:
      A tree of `NamedSharding`, whose axes are `AxisType.Auto`.

    Example:
      >>> mesh = jax.sharding.AbstractMesh((4,), ("data",))
      >>> tree = {"kernel": jnp.zeros((8142, 64)), "bias": jnp.zeros(64)}
      >>> {name: s.spec for name, s in fsdp_shardings(tree, mesh).items()}
      {'bias': P(), 'kernel': P(None, 'data')}

    References:
      Zhao et al. 2023, PyTorch FSDP, arXiv 2304.11277; Rajbhandari et al. 2020, ZeRO, arXiv
      1910.02054, stage 3.
    """
    mesh = _in_auto_axes(mesh)
    if axis_name is not None:
        choice("axis_name", axis_name, mesh.axis_names)
    axes = mesh.axis_names if axis_name is None else axis_name
    devices = mesh.size if axis_name is None else mesh.shape[axis_name]

    def sharding(leaf):
        shape = np.shape(leaf)
        even = [axis for axis, length in enumerate(shape) if length % devices == 0]
        if math.prod(shape) < min_size or not even:
            return NamedSharding(mesh, PartitionSpec())
        largest = max(even, key=lambda axis: shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * largest, axes))

    return jax.tree.map(sharding, tree)


def _in_auto_axes(mesh: Any) -> Any:
    """The mesh with all axes `AxisType.Auto`."""
    types = (jax.sharding.AxisType.Auto,) * len(mesh.axis_names)
    if isinstance(mesh, jax.sharding.AbstractMesh):
        return jax.sharding.AbstractMesh(mesh.axis_sizes, mesh.axis_names, types)
    return jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=types)


def _put(tree: Any, shardings: Any) -> Any:
    """Sends arrays to where they are to be, except those that are there already."""
    return jax.tree.map(
        lambda leaf, sharding: (
            leaf if getattr(leaf, "sharding", None) == sharding else _send(leaf, sharding)
        ),
        tree,
        shardings,
    )


def _send(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """The array, which every host has as a whole, with a sharding over the devices of all hosts."""
    if sharding.is_fully_addressable or not getattr(leaf, "is_fully_addressable", True):
        return jax.device_put(leaf, sharding)
    return _by_data(
        lambda values: jax.make_array_from_callback(values.shape, sharding, lambda i: values[i]),
        leaf,
    )


def _by_data(send: Callable[[np.ndarray], jax.Array], leaf: Any) -> jax.Array:
    """Sends an array, or the numbers of random keys, which NumPy cannot hold."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = send(np.asarray(jax.random.key_data(leaf)))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    return send(np.asarray(leaf))


def pmapped(
    step: Callable[..., Any],
    devices: Sequence[jax.Device],
    *,
    axis_name: str = AXIS_NAME,
    donate_state: bool = False,
) -> Callable[[Any, Mapping[str, Any], tuple[Any, ...]], Any]:
    """The mapped step inside `pmap_step`, without its checks: for `.lower` and ahead-of-time use.

    Args:
      step: As for `pmap_step`.
      devices: The devices; for `.lower(...).compile()` alone they need not exist.
      axis_name: As for `pmap_step`.
      donate_state: As for `pmap_step`.

    Returns:
      (state, batch, tuple of replicated arguments) -> results, the arrays of the batch split as by
      `shard_batch`.
    """
    return jax.pmap(
        lambda state, batch, replicated: step(state, batch, *replicated, axis_name=axis_name),
        axis_name=axis_name,
        in_axes=(None, 0, None),
        out_axes=None,
        devices=devices,
        donate_argnums=(0,) if donate_state else (),
    )


def map_step(
    step: Callable[..., Any], *, donate_state: bool = False, num_classes: int | None = None
) -> MappedStep:
    """Compiles a step for all devices: with `jax.jit` for one, with `pmap_step` for several.

    Args:
      step: (state, batch, *replicated, axis_name=...) -> results, as for `pmap_step`.
      donate_state: As for `pmap_step`.
      num_classes: As for `pmap_step`.
    """
    if jax.device_count() > 1:
        return pmap_step(step, donate_state=donate_state, num_classes=num_classes)
    compiled = jax.jit(
        lambda state, batch, replicated: step(state, batch, *replicated, axis_name=None),
        donate_argnums=(0,) if donate_state else (),
    )
    return MappedStep(
        compiled,
        lambda batch: jax.device_put(dict(batch)),
        lambda tree: tree,
        lambda tree: tree,
        num_classes,
    )


def with_own_buffers(state: Any) -> Any:
    """Copies every array of a state, so that a step may take over their memory (`donate_state`).

    A new state can hold one array twice, for example slow weights that start as the weights.

    Example:
      >>> zero = jnp.zeros(2)
      >>> a, b = with_own_buffers((zero, zero))
      >>> a is b
      False
    """
    return jax.tree.map(jnp.copy, state)


def batch_axis() -> str | None:
    """The axis that a step made by `map_step` reduces over: None on a single device.

    A model needs it as `axis_name` for synchronised batch normalisation.
    """
    return AXIS_NAME if jax.device_count() > 1 else None


def must_block() -> bool:
    """Whether to wait for every step: without it, several CPU devices of one process deadlock."""
    return jax.default_backend() == "cpu" and jax.local_device_count() > 1


def shard_batch(batch: Mapping[str, Any], num_shards: int) -> dict[str, Any]:
    """Splits every array of a host batch: [B, ...] -> [num_shards, B / num_shards, ...].

    Entries may be pytrees of arrays.

    Raises:
      ValueError: B is not a multiple of `num_shards`, or not the same for all arrays.

    Example:
      >>> shard_batch({"label": np.arange(4)}, 2)["label"].tolist()
      [[0, 1], [2, 3]]
    """
    check_split(batch, num_shards)
    return jax.tree.map(
        lambda values: values.reshape(
            (num_shards, values.shape[0] // num_shards, *values.shape[1:])
        ),
        dict(batch),
    )


def check_split(batch: Mapping[str, Any], num_shards: int) -> None:
    """Raises ValueError unless the arrays [B, ...] of a batch agree and split into equal parts."""
    check_examples(batch)
    for path, values in jax.tree_util.tree_leaves_with_path(dict(batch)):
        if values.shape[0] % num_shards:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} has {values.shape[0]} examples, which do not "
                f"split evenly over {num_shards} devices"
            )


def check_batch(batch: Mapping[str, Any], num_classes: int | None, labels: str = "label") -> None:
    """Refuses labels that a device would silently clamp.

    Raises:
      ValueError: A label outside 0..num_classes-1.
    """
    if num_classes is not None and labels in batch:
        values = np.asarray(batch[labels]) if is_known(batch[labels]) else batch[labels]
        values = values.astype(np.int32) if values.dtype == bool else values
        check_labels(values, num_classes, may_ignore=True)
