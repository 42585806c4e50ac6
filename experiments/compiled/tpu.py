"""Compiles training steps for a TPU slice on a machine without TPUs, with libtpu's compiler.

The result is the program that the slice would run: the same XLA passes, collectives and memory. It
gives no timing of the step.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

import lpa_jax
from experiments.compiled import hlo, step_cost
from lpa_jax import models, parallel
from lpa_jax.perturbations import Perturbation

GIB = 2**30
# Published memory of one chip by device kind. A chip of some kinds holds two devices.
CHIP_GIB = {
    "TPU v2": 16,
    "TPU v3": 32,
    "TPU v4": 32,
    "TPU v5 lite": 16,
    "TPU v5": 95,
    "TPU v6 lite": 32,
}
# Where the arrays of the state are, by placement.
PLACEMENTS = {"pmap": None, "mesh": parallel.replicated_shardings, "fsdp": parallel.fsdp_shardings}
# libtpu must neither ask a cloud which machine this is nor reserve devices nor write a log.
_NO_DEVICE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A TPU slice to compile for.

    Attributes:
      name: such as v5e:16x16.
      devices: all of its devices; they are abstract and hold no arrays.
      chips: number of chips; a chip of some kinds holds two devices.
    """

    name: str
    devices: tuple[jax.Device, ...]
    chips: int

    @property
    def kind(self) -> str:
        """Device kind, such as TPU v5 lite."""
        return self.devices[0].device_kind

    @property
    def memory(self) -> int:
        """Bytes of memory of one device; the compiler reserves a little of it."""
        return CHIP_GIB[self.kind] * GIB * self.chips // len(self.devices)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What plain training and the method have in common.

    Attributes:
      topology: name of the slice.
      model, dtype, num_classes: the network.
      batch_size: examples in a step over all devices.
      image_size, channels: shape of an image, [image_size, image_size, channels].
      placement: one of `PLACEMENTS`: "pmap", or `parallel.mesh_step` with the state whole on every
        device ("mesh") or spread over all of them ("fsdp").
    """

    topology: str
    model: str
    dtype: str
    num_classes: int
    batch_size: int
    image_size: int
    channels: int
    placement: str = "pmap"


@dataclasses.dataclass(frozen=True)
class Program:
    """Costs of one compiled program, per device.

    Attributes:
      flops, bytes_accessed: from XLA's cost analysis.
      memory: bytes of arguments, results, aliased (arguments whose memory results reuse),
        temporaries and code.
      collectives: every exchange between devices, in the order of the program's text.
      contractions: number of each (layer, role, result), see `hlo.tally`.
      compile_s: seconds of tracing, lowering and compiling.
      refused: why the compiler failed, "" if it did not; if it did, all fields above are empty.
    """

    flops: float = float("nan")
    bytes_accessed: float = float("nan")
    memory: Mapping[str, int] = dataclasses.field(default_factory=dict)
    collectives: Sequence[hlo.Collective] = ()
    contractions: Counter = dataclasses.field(default_factory=Counter)
    compile_s: float = 0.0
    refused: str = ""

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory of one call; aliased arrays count once."""
        return sum(self.memory.values()) - 2 * self.memory["aliased"]

    @property
    def exchanged_bytes(self) -> int:
        """Bytes of all collectives."""
        return sum(exchange.bytes for exchange in self.collectives)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file; `from_dict` reads them."""
        return {
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            "collectives": [
                [exchange.kind, *map(str, exchange.arrays)] for exchange in self.collectives
            ],
            "contractions": [[*key, count] for key, count in sorted(self.contractions.items())],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Program":
        """The program that `as_dict` wrote. JSON has no NaN; null is read as NaN."""
        plain = {key: float("nan") if value is None else value for key, value in values.items()}
        plain["collectives"] = [
            hlo.Collective(kind, tuple(map(hlo.Array.parse, arrays)))
            for kind, *arrays in values["collectives"]
        ]
        plain["contractions"] = Counter(
            {tuple(key): count for *key, count in values["contractions"]}
        )
        return cls(**plain)


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A traced and lowered program; compiling it takes most of the time.

    Attributes:
      lowered: the `jax.stages.Lowered`.
      target: the devices to compile for, a topology or a device kind.
      layers: the network's injection points.
      seconds: time of tracing and lowering.
    """

    lowered: Any
    target: str
    layers: Sequence[str]
    seconds: float

    @property
    def text(self) -> str:
        """The StableHLO text. With the target it is all that the compiler gets."""
        return self.lowered.as_text()

    def compile(self) -> Program:
        """The compiled program. One that does not fit the device is returned as `refused`."""
        start = time.perf_counter()
        try:
            with _no_compilation_cache():
                compiled: Any = self.lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            refused = str(error).splitlines()[0]
            return Program(compile_s=self.seconds + time.perf_counter() - start, refused=refused)
        seconds = self.seconds + time.perf_counter() - start
        instructions = hlo.executed(compiled.as_text())
        memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
        return Program(
            flops=step_cost.flops(compiled),
            bytes_accessed=float(cost["bytes accessed"]),
            memory={
                "arguments": memory.argument_size_in_bytes,
                "results": memory.output_size_in_bytes,
                "aliased": memory.alias_size_in_bytes,
                "temporaries": memory.temp_size_in_bytes,
                "code": memory.generated_code_size_in_bytes,
            },
            collectives=hlo.collectives(instructions),
            contractions=hlo.tally(hlo.contractions(instructions), self.layers),
            compile_s=round(seconds, 1),
        )


@contextlib.contextmanager
def _no_compilation_cache() -> Iterator[None]:
    """Turns JAX's compilation cache off: loading a program from it needs a device."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    # JAX decides once per process whether it uses a cache.
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


@functools.cache
def topology(name: str) -> Topology:
    """The TPU slice of a name, KIND:AxB or KIND:AxBxC.

    Raises:
      ValueError: libtpu is not installed or has no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "--topology needs libtpu, which is not installed: pip install 'lpa_jax[tpu-check]'"
        )
    for variable, value in _NO_DEVICE.items():
        os.environ.setdefault(variable, value)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--topology must be a TPU slice such as v5e:4x4, v5e:16x16, v4:4x4x4 or v6e:8x8, "
            f"got {name!r}: {reason}"
        ) from None
    devices = tuple(found.devices)
    if devices[0].device_kind not in CHIP_GIB:
        known = ", ".join(CHIP_GIB)
        raise ValueError(
            f"--topology must be a slice of {known}, got one of {devices[0].device_kind}"
        )
    return Topology(name, devices, len({tuple(device.coords) for device in devices}))


def share(setting: Setting) -> int:
    """Examples in a step on each device.

    Raises:
      ValueError: no such topology, or the batch does not split evenly.
    """
    devices = len(topology(setting.topology).devices)
    if setting.batch_size % devices:
        raise ValueError(
            f"--batch_size must be a multiple of the {devices} devices of {setting.topology}, "
            f"got {setting.batch_size}"
        )
    return setting.batch_size // devices


def abstract_state(
    setting: Setting, perturbations: Mapping[str, Perturbation]
) -> tuple[lpa_jax.TrainState, Mapping[str, jax.ShapeDtypeStruct]]:
    """Shapes of the train state and of the batch of one device.

    Raises:
      ValueError: the model or a perturbation does not fit.
    """
    model = models.create(setting.model, setting.num_classes, dtype=setting.dtype)

    def make():
        state, batch = step_cost.make_state(
            model, share(setting), setting.image_size, setting.channels
        )
        return step_cost.with_perturbations(state, batch, perturbations), batch

    return jax.eval_shape(make)


def lower_step(setting: Setting, perturbations: Mapping[str, Perturbation]) -> Lowered:
    """Lowers the training step, placed over all devices; it donates its state."""
    start = time.perf_counter()
    devices = topology(setting.topology).devices
    state, batch = abstract_state(setting, perturbations)
    step = functools.partial(lpa_jax.lpa_step, perturbations=perturbations)
    if setting.placement == "pmap":
        batch = {
            name: jax.ShapeDtypeStruct((len(devices), *part.shape), part.dtype)
            for name, part in batch.items()
        }
        lowered = parallel.pmapped(step, devices, donate_state=True).lower(state, batch, ())
    else:
        lowered = _lower_for_mesh(step, devices, PLACEMENTS[setting.placement], state, batch)
    seconds = time.perf_counter() - start
    return Lowered(lowered, setting.topology, state.network.layers, seconds)


def _lower_for_mesh(step, devices, shardings, state, batch):
    """Lowers `parallel.mesh_step`, with `batch` the shapes of one device's share."""
    mesh = jax.sharding.Mesh(np.asarray(devices), (parallel.AXIS_NAME,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    placed = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings(state, mesh),
    )
    batch = {
        name: jax.ShapeDtypeStruct(
            (len(devices) * part.shape[0], *part.shape[1:]), part.dtype, sharding=split
        )
        for name, part in batch.items()
    }
    compiled = parallel.mesh_step(step, mesh, shardings=shardings, donate_state=True)
    return compiled.mapped.lower(placed, batch, ())


def lower_gradient_pass(setting: Setting, layer: str) -> Lowered:
    """Lowers one gradient pass above `layer` on one device: see `experiments.benchmark`."""
    start = time.perf_counter()
    slice_ = topology(setting.topology)
    place = jax.sharding.SingleDeviceSharding(slice_.devices[0])
    state, batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract_state(setting, {}),
    )
    lowered = step_cost.lower_gradient_pass(state, batch, layer)
    return Lowered(lowered, slice_.kind, state.network.layers, time.perf_counter() - start)


def table_row(setting: Setting, layer: str, shape: str) -> tuple[int, ...]:
    """Shape of one class's row in a perturbation's class table at `layer`."""
    state, batch = abstract_state(setting, {})
    at = lpa_jax.injection.activation_shapes(
        state.network, state.variables, batch["image"], [layer]
    )
    row = jax.eval_shape(lambda h: lpa_jax.pgd.reduce_to_shape(h, shape), at[layer])
    return row.shape[1:]
