"""Many devices: a step mapped over them, and functions of arrays on meshes of Explicit axes."""

from lpa_jax.parallel.explicit_axes import in_auto_axes
from lpa_jax.parallel.mapped_step import (
    AXIS_NAME,
    MappedStep,
    PlacedBatch,
    batch_axis,
    check_batch,
    check_split,
    fsdp_shardings,
    map_step,
    mesh_step,
    must_block,
    pmap_step,
    pmapped,
    replicated_shardings,
    shard_batch,
    with_own_buffers,
)

__all__ = [
    "AXIS_NAME", "MappedStep", "PlacedBatch", "batch_axis", "check_batch", "check_split",
    "fsdp_shardings", "in_auto_axes", "map_step", "mesh_step", "must_block", "pmap_step",
    "pmapped", "replicated_shardings", "shard_batch", "with_own_buffers",
]  # fmt: skip
