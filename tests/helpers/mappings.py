"""Each way to spread a step over devices, for each kind of step: how far it is from one device.

    python -m tests.helpers.mappings

prints all of them as JSON; XLA_FLAGS must force 8 CPU devices. `devices_worker` runs a part.
"""

import functools
import itertools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lpa_jax
from lpa_jax import parallel, penalties
from lpa_jax.models import MLP

RTOL, ATOL = 1e-5, 5e-7
COUNTS = (1, 2, 4, 8)
AXIS = "data"
MANY = 8142  # a multiple of 2, not of 4
# On 8 devices two examples each: class 0 is everywhere, 1 on one device only, 3 absent at first.
LABELS = (
    [0, 2, 2, 0, 1, 1, 0, 2, 0, 2, 2, 0, 0, 2, 0, -1],
    [0, 1, 0, 0, 3, 0, 0, 3, 3, 0, 0, 0, 0, 3, 3, 0],
)
CONFIDENCE = lpa_jax.by_confidence(kappa=1.0, ema=0.5)
FREQUENCY = lpa_jax.by_frequency(np.arange(4, 0, -1), kappa=0.5)


def batch(step):
    rng = np.random.default_rng(step)
    return {
        "image": rng.normal(size=(16, 4)).astype(np.float32),
        "label": np.asarray(LABELS[step], np.int32),
        "domain": np.arange(16, dtype=np.int32) * 7 % 3,
    }


def training(perturbations, penalties_=None, num_classes=4, optimizer=None):
    """A state and a step of `lpa_step`."""
    optimizer = optimizer or optax.sgd(0.1, momentum=0.9)
    model = MLP(num_classes, hidden=(8,))
    state = lpa_jax.TrainState.create(
        model, optimizer, jax.random.key(0), batch(0), perturbations, penalties_
    )
    step = functools.partial(
        lpa_jax.lpa_step, perturbations=perturbations, penalties=penalties_ or {}
    )
    return state, step


def evaluation():
    state, _ = training({})
    return state, lambda state, batch, axis_name: (
        state,
        lpa_jax.eval_step(state, batch, axis_name=axis_name),
    )


def perturbation():
    """`class_perturbation` with a loss that closes over parameters and labels."""
    kernel = np.random.default_rng(9).normal(size=(4, 4)).astype(np.float32)

    def step(kernel, batch, axis_name):
        labels = batch["label"]

        def losses(h):
            scores = jax.nn.log_softmax(h @ kernel)
            return -jnp.sum(scores * jax.nn.one_hot(labels, 4), axis=-1)

        delta = lpa_jax.class_perturbation(
            losses,
            batch["image"],
            labels,
            sign=jnp.array([1.0, -1.0, 1.0, -1.0]),
            radius=jnp.array([0.5, 0.4, 0.3, 0.2]),
            steps=2,
            axis_name=axis_name,
        )
        return kernel, delta

    return kernel, step


def relabelled(convert, loss=lpa_jax.cross_entropy):
    """`lpa_step` on batches whose labels are not one an example."""
    kernels = np.random.default_rng(8).normal(size=(2, 4, 4)).astype(np.float32)
    perturbations = {
        "hidden": lpa_jax.lpa(0.3, mode="carry", assignment=FREQUENCY),
        "logits": lpa_jax.lpl(0.3, 1, assignment=CONFIDENCE),
    }
    network = lpa_jax.CutFunctions(
        lambda kernels, x: jnp.tanh(x @ kernels[0]),
        lambda kernels, h: h @ kernels[1],
        init_params=lambda rng, x: jnp.asarray(kernels),
    )
    state = lpa_jax.TrainState.create(
        network, optax.sgd(0.1), jax.random.key(0), convert(batch(0)), perturbations
    )

    def step(state, batch, axis_name):
        options = {"perturbations": perturbations, "loss": loss, "axis_name": axis_name}
        return lpa_jax.lpa_step(state, convert(batch), **options)

    return state, step


def by_position(batch):
    images, labels = batch["image"], batch["label"]
    pairs = {"image": jnp.stack([images, images[:, ::-1]], 1), "label": [labels, (labels + 1) % 4]}
    return {**pairs, "label": jnp.stack(pairs["label"], 1)}


def of_two_classes(batch):
    labels = batch["label"]
    members = jax.nn.one_hot(labels, 4) + jax.nn.one_hot((labels + 1) % 4, 4)
    return {"image": batch["image"], "label": members.astype(jnp.int32)}


MODES = {
    "erm": lambda: training({}),
    "more classes than examples": lambda: training(
        {
            "input": lpa_jax.lpa(0.3, steps=1, assignment=CONFIDENCE),
            "hidden1": lpa_jax.lpa(0.3, mode="carry", assignment=CONFIDENCE),
        },
        num_classes=MANY,
    ),
    "cold": lambda: training({"hidden1": lpa_jax.lpa(0.3, 2, assignment=CONFIDENCE)}),
    "carry": lambda: training({"hidden1": lpa_jax.lpa(0.3, mode="carry", assignment=FREQUENCY)}),
    "free": lambda: training({"hidden1": lpa_jax.lpa(0.3, mode="free", assignment=CONFIDENCE)}),
    "lpl": lambda: training({"logits": lpa_jax.lpl(0.3, 2, assignment=FREQUENCY)}),
    "radius_target": lambda: training(
        {"hidden1": lpa_jax.lpa(0.3, 1, radius_target=0.1, assignment=CONFIDENCE)}
    ),
    "sam": lambda: training(
        {"hidden1": lpa_jax.lpa(0.3, steps=1)}, optimizer=lpa_jax.optimizers.sam(optax.sgd(0.1))
    ),
    "penalty": lambda: training({}, {"irm": penalties.create("irm", num_domains=3)}),
    "labels of positions": lambda: relabelled(by_position),
    "several classes": lambda: relabelled(of_two_classes, lpa_jax.losses.sigmoid_cross_entropy()),
    "class_perturbation": perturbation,
    "eval_step": evaluation,
}


def mesh_of(count, kind=AxisType.Auto):
    return jax.make_mesh((count,), (AXIS,), axis_types=(kind,), devices=jax.devices()[:count])


def over_shard_map(step, count, check_vma=True, mesh=None, axes=AXIS):
    return jax.jit(
        jax.shard_map(
            functools.partial(step, axis_name=axes),
            mesh=mesh or mesh_of(count),
            in_specs=(PartitionSpec(), PartitionSpec(axes)),
            out_specs=PartitionSpec(),
            check_vma=check_vma,
        )
    )


def over_two_axes(step, count):
    shape, axes = (-(-count // 2), min(count, 2)), (AXIS, "more")
    kinds, devices = (AxisType.Auto,) * 2, jax.devices()[:count]
    mesh = jax.make_mesh(shape, axes, axis_types=kinds, devices=devices)
    return over_shard_map(step, count, mesh=mesh, axes=axes)


def over_jit(step, count, kind):
    mesh = mesh_of(count, kind)
    everywhere, split = (
        NamedSharding(mesh, PartitionSpec(*names)) for names in ((), mesh.axis_names)
    )
    compiled = jax.jit(functools.partial(step, axis_name=None))
    return lambda state, batch: compiled(
        jax.device_put(state, everywhere), jax.device_put(batch, split)
    )


def over_fsdp(step, count):
    shardings = functools.partial(parallel.fsdp_shardings, min_size=16)
    return parallel.mesh_step(step, mesh_of(count, AxisType.Explicit), shardings=shardings)


MAPPINGS = {
    "shard_map": over_shard_map,
    "shard_map of two axes": over_two_axes,
    "pmap": lambda step, count: parallel.pmap_step(step, devices=jax.devices()[:count]),
    "shard_map unchecked": functools.partial(over_shard_map, check_vma=False),
    "jit, Auto mesh": functools.partial(over_jit, kind=AxisType.Auto),
    "jit, Explicit mesh": functools.partial(over_jit, kind=AxisType.Explicit),
    "mesh_step": lambda step, count: parallel.mesh_step(step, mesh_of(count)),
    "mesh_step, FSDP": over_fsdp,
}
TABLE = tuple(itertools.product(MAPPINGS, MODES, COUNTS))
# Every mapping but FSDP, with the kinds of step that `devices_worker` does not train by pmap; it
# trains one with FSDP.
PART = (
    ("shard_map", "radius_target", 8),
    ("shard_map of two axes", "free", 4),
    ("pmap", "penalty", 4),
    ("shard_map", "penalty", 4),
    ("shard_map unchecked", "sam", 8),
    ("jit, Auto mesh", "labels of positions", 8),
    ("jit, Explicit mesh", "several classes", 4),
    ("mesh_step", "class_perturbation", 2),
)


def two_steps(step, state):
    """What two steps return, by path. The second starts from what the first learned."""
    seen = {}
    for number in range(len(LABELS)):
        state, seen[number] = jax.block_until_ready(step(state, batch(number)))
    if isinstance(state, lpa_jax.TrainState):
        state = state.replace(rng=jax.random.key_data(state.rng))
    leaves = jax.tree_util.tree_leaves_with_path((state, seen))
    return {jax.tree_util.keystr(path): np.asarray(leaf, float) for path, leaf in leaves}


@functools.cache
def made(mode):
    """The state, the step, and the result of one device."""
    state, step = MODES[mode]()
    return state, step, two_steps(jax.jit(functools.partial(step, axis_name=None)), state)


def deviation(mapping, mode, count):
    """The largest difference from one device in units of the tolerance, and its path."""
    state, step, expected = made(mode)
    found = two_steps(MAPPINGS[mapping](step, count), state)
    assert found.keys() == expected.keys()
    sizes = {
        path: np.max(np.abs(found[path] - value) / (ATOL + RTOL * np.abs(value)), initial=0.0)
        for path, value in expected.items()
    }
    worst = max(sizes, key=sizes.get)
    return float(sizes[worst]), worst


def deviations(cells):
    return [[cell, deviation(*cell)] for cell in cells]


if __name__ == "__main__":
    json.dump(deviations(TABLE), sys.stdout)
