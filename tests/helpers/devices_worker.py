"""Trains tiny networks on 1, 2, 4 and 8 forced CPU devices and prints what came out, as JSON.

Run by `test_parallel.py` in a process of its own, because the number of devices is fixed when JAX
starts: XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

import dataclasses
import functools
import json
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lpa_jax
from lpa_jax import parallel
from lpa_jax.checkpoints.checkpoints import Checkpoints
from lpa_jax.data.prefetch import Prefetched
from lpa_jax.diagnostics import geometry
from lpa_jax.models import MLP, convolution
from lpa_jax.parallel.explicit_axes import in_auto_axes
from lpa_jax.perturbations import stateless
from tests.helpers import mappings, toy

STEPS = 9
COMPILED = []  # every compilation since it was cleared
MANY = 40
OPTIMIZER = optax.sgd(0.1, momentum=0.9)
# On 8 devices two examples each: class 0 is everywhere, 1 on one device only, 2 on the borders of
# several, 3 absent. The second batch has one class, the third a class on its own; then again.
LABELS = (
    [0, 2, 2, 0, 1, 1, 0, 2, 0, 2, 2, 0, 0, 2, 0, 0],
    [3] * 16,
    [0, 1, 0, 0, 3, 0, 0, 3, 3, 0, 0, 0, 0, 3, 3, 0],
)
MANY_LABELS = tuple(np.arange(16) % 11 * 3 + step for step in range(3))

CONFIDENCE = lpa_jax.by_confidence(kappa=1.0, ema=0.5)


def frequency(num_classes):
    return lpa_jax.by_frequency(np.arange(num_classes, 0, -1), kappa=0.5)


def augment(rng, images, positions):
    return images + (jax.random.uniform(rng) * positions)[:, None, None, None]


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """What is trained, and on how many devices; 0 is without a mapper."""

    model: object
    perturbations: dict
    counts: tuple
    labels: tuple = LABELS
    augment: object = None

    @functools.cached_property
    def state(self):
        return lpa_jax.TrainState.create(
            self.model, OPTIMIZER, jax.random.key(0), batch(self, 0), self.perturbations
        )


@functools.cache
def step_of(setup, count, fsdp=False):
    """A setup's compiled step on so many devices; runs that share it do not trace it again."""
    step = functools.partial(
        lpa_jax.lpa_step, perturbations=setup.perturbations, augment=setup.augment
    )
    if fsdp:
        return mappings.over_fsdp(step, count)
    if count == 0:
        return jax.jit(step)
    return parallel.pmap_step(step, devices=jax.devices()[:count])


SETUPS = {
    "erm": Setup(MLP(toy.CLASSES, hidden=(8, 6)), {}, (1, 8)),
    "cold lpa and lpl": Setup(
        toy.NormalizedMLP(toy.CLASSES, axis_name=parallel.AXIS_NAME),
        {
            "hidden1": lpa_jax.lpa(0.3, steps=1, assignment=CONFIDENCE),
            "logits": lpa_jax.lpl(0.3, steps=1, assignment=frequency(toy.CLASSES)),
        },
        (1, 8),
    ),
    "carried and free lpa": Setup(
        MLP(toy.CLASSES, hidden=(8, 6)),
        {
            "input": lpa_jax.lpa(0.3, mode="carry", assignment=CONFIDENCE),
            "hidden2": lpa_jax.lpa(0.3, mode="free", assignment=CONFIDENCE),
        },
        (0, 8),
        augment=augment,
    ),
    "more classes than examples": Setup(
        toy.NormalizedMLP(MANY, axis_name=parallel.AXIS_NAME),
        {
            "hidden1": lpa_jax.lpa(0.3, mode="carry", assignment=CONFIDENCE),
            "hidden2": lpa_jax.lpa(0.3, mode="free", assignment=frequency(MANY)),
        },
        (1, 8),
        labels=MANY_LABELS,
    ),
}


def batch(setup, step):
    labels = np.asarray(setup.labels[step % len(setup.labels)], np.int32)
    images = np.random.default_rng(step).normal(size=(labels.size, *toy.IMAGE))
    return {"image": images.astype(np.float32), "label": labels}


def trained(setup, step):
    """What all steps leave behind, every array by its path, and how often they compiled."""
    state, seen, compilations = setup.state, {}, []
    for number in range(STEPS):
        COMPILED.clear()
        state, pairs = jax.block_until_ready(step(state, batch(setup, number)))
        seen[f"metrics {number}"] = pairs
        compilations.append(len(COMPILED))
    for field in ("params", "opt_state", "model_state", "perturbation_state"):
        seen[field] = getattr(state, field)
    return {**flat(seen), "compilations": compilations}


def flat(tree):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf).tolist()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def all_runs():
    return {
        name: {count: trained(setup, step_of(setup, count)) for count in setup.counts}
        for name, setup in SETUPS.items()
    }


def moved():
    """A run that is saved and read twice: after a step on 8 devices, and after one with FSDP.

    It ends on one device.
    """
    setup = SETUPS["carried and free lpa"]
    steps = [step_of(setup, 8), step_of(setup, 4, fsdp=True), step_of(setup, 0)]

    def step(state, batch):
        done = int(state.step)
        if done in (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                Checkpoints(folder).save(done, state)
                state = Checkpoints(folder).restore(setup.state).state
        return steps[min(done, 2)](state, batch)

    return trained(setup, step)


def evaluation():
    """13 examples in padded batches of 8 on 8 devices, and all at once on none."""
    state = SETUPS["erm"].state
    labels = np.arange(16, dtype=np.int32) % toy.CLASSES
    data = {
        "image": np.random.default_rng(5).normal(size=(16, *toy.IMAGE)).astype(np.float32),
        "label": labels,
        "mask": (np.arange(16) < 13).astype(np.float32),
    }
    step = parallel.map_step(lpa_jax.eval_step)
    halves = [
        {key: values[part] for key, values in data.items()} for part in (slice(8), slice(8, 16))
    ]
    padded = functools.reduce(lpa_jax.metrics.add, [step(state, half) for half in halves])
    whole = {key: values[:13] for key, values in data.items() if key != "mask"}
    return {"padded": flat(padded), "whole": flat(jax.jit(lpa_jax.eval_step)(state, whole))}


def randomness():
    """Same image, same class on 8 devices: only the devices' keys tell the examples apart."""
    layers = ("input", "hidden1")
    shift = stateless("shift", lambda site: (site.activation + 1.0, site.targets))
    perturbations = {layers: toy.recording(shift), "logits": toy.recording(toy.site_key())}
    same = {"image": np.ones((8, *toy.IMAGE), np.float32), "label": np.zeros(8, np.int32)}
    state = lpa_jax.TrainState.create(
        MLP(toy.CLASSES, hidden=(32,), dropout=0.5),
        OPTIMIZER,
        jax.random.key(0),
        same,
        perturbations,
    )
    step = parallel.pmap_step(functools.partial(lpa_jax.lpa_step, perturbations=perturbations))
    seen = []
    for _ in range(6):
        old = state.perturbation_state
        state, _ = jax.block_until_ready(step(state, same))
        new = state.perturbation_state
        used = [layer for layer in layers if np.any(old[layer]["decoded"] != new[layer]["decoded"])]
        seen.append(
            {
                "used": used,
                "decoded": np.asarray(new[used[0]]["decoded"]).tolist(),
                "logits": np.asarray(new["logits"]["before"]).tolist(),
                "keys": np.asarray(new["logits"]["inner"]).tolist(),
            }
        )
    return seen


def local_statistics():
    """Running means after one step where BatchNorm is left local to 2 devices."""
    setup = Setup(toy.NormalizedMLP(toy.CLASSES), {}, (2,))
    state, _ = jax.block_until_ready(step_of(setup, 2)(setup.state, batch(setup, 0)))
    dense = setup.state.params["hidden1"]["dense"]
    below = batch(setup, 0)["image"].reshape(16, -1)
    return {
        "means": np.asarray(state.model_state["batch_stats"]["hidden1"]["norm"]["mean"]).tolist(),
        "batch": np.asarray(below @ dense["kernel"] + dense["bias"][None]).mean(0).tolist(),
    }


def donation():
    """Whether the old states are gone after steps that take their memory, and the result."""
    setup = SETUPS["erm"]
    step = parallel.pmap_step(lpa_jax.lpa_step, donate_state=True)
    states = [jax.tree.map(jnp.copy, setup.state)]
    for number in range(STEPS):
        state, _ = jax.block_until_ready(step(states[-1], batch(setup, number)))
        states.append(state)
    gone = [
        [leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state))]
        for state in states
    ]
    return {"gone": gone, "params": flat({"params": states[-1].params})}


def replicated(count):
    """A step with an argument after the batch, called and bound: totals, and who gave memory up."""

    def step(state, batch, weight, axis_name):
        return state + weight * jax.lax.psum(jnp.sum(batch["image"]), axis_name)

    mapped = parallel.pmap_step(step, devices=jax.devices()[:count], donate_state=True)
    batch = {"image": np.arange(8, dtype=np.float32)}
    states, weight = mapped.to_devices(([1.0, 1.0, 1.0], np.float32(2)))
    totals = [float(mapped(states[0], batch, weight))]
    COMPILED.clear()
    totals.append(float(mapped(states[1], batch, weight)))
    totals.append(float(mapped.bind(np.float32(3))(states[2], batch)))
    return {
        "totals": totals,
        "states are gone": [state.is_deleted() for state in states],
        "argument is gone": weight.is_deleted(),
        "compilations after the first": len(COMPILED),
    }


def fully_sharded(count):
    """What `trained` gives with the state spread over devices, batches placed ahead; and shards."""
    setup = SETUPS["carried and free lpa"]
    step = step_of(setup, count, fsdp=True)
    state, _ = step(setup.state, batch(setup, 0))
    shards = {
        name: [leaf.shape, leaf.addressable_shards[0].data.shape]
        for name, leaf in (
            ("parameters", state.params["hidden1"]["dense"]["kernel"]),
            ("momentum", state.opt_state[0].trace["hidden1"]["dense"]["kernel"]),
            ("class table", state.perturbation_state["hidden2"]["delta"]),
            ("bias", state.params["hidden1"]["dense"]["bias"]),
        )
    }
    with Prefetched([batch(setup, number) for number in range(STEPS)], step.place) as ahead:
        run = trained(setup, lambda state, _: step(state, ahead[int(state.step)]))
    return {"run": run, "shards": shards}


def relabelled(convert, *loss):
    state, _ = mappings.relabelled(convert, *loss)
    return state, convert(mappings.batch(0)), "hidden", *loss


RELABELLED = {
    "positions": relabelled(mappings.by_position),
    "several classes": relabelled(mappings.of_two_classes, lpa_jax.losses.sigmoid_cross_entropy()),
}


def on_explicit_axes(state, images, layer, loss=lpa_jax.cross_entropy):
    """Each pair: what a function gives on one device, and over 4 of a mesh of Explicit axes."""
    perturbation = lpa_jax.lpa(0.3, steps=1)
    mesh = mappings.mesh_of(4, jax.sharding.AxisType.Explicit)
    everywhere, split = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))
        for names in ((), mesh.axis_names)
    )
    placed = jax.device_put(state.variables, everywhere), jax.device_put(images, split)

    def own_pass(variables, batch):
        states = lpa_jax.initial_states({layer: perturbation}, state.network, variables, batch)
        options = {"rng": jax.random.key(0), "loss": loss}
        return lpa_jax.perturbed_forward(
            {layer: perturbation}, states, state.network, variables, batch, **options
        ).logits

    def effect(variables, batch):
        options = {"rng": jax.random.key(0), "loss": loss}
        observed = geometry.observe(
            state.network, variables, batch, {layer: perturbation}, **options
        )[layer]
        return observed.delta, observed.loss_before, observed.loss_after

    def radius(variables, batch):
        options = {"target": 0.1, "loss": loss, "assignment": lpa_jax.all_positive()}
        return lpa_jax.suggest_radius(state.network, variables, batch, layer, **options)

    functions = {
        "own pass": jax.jit(in_auto_axes()(own_pass)),
        "observe": jax.jit(effect),
        "suggest_radius": radius,
    }
    found = {
        name: [flat(function(state.variables, images)), flat(function(*placed))]
        for name, function in functions.items()
    }
    try:
        jax.jit(own_pass)(*placed)
    except ValueError as error:
        found["refusal"] = str(error)
    return found


def split_convolution(count):
    """Largest errors of a kernel's gradient by parts with the batch on `count` devices.

    By `jit` over a sharded batch, whose collectives are listed, and by `pmap`.
    """
    images = jax.random.normal(jax.random.key(0), (32, 6, 6, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 2))

    def gradient(convolve, images, kernel):
        layout = ("NHWC", "HWIO", "NHWC")

        def loss(kernel):
            return jnp.mean(convolve(images, kernel, (1, 1), "SAME", dimension_numbers=layout) ** 3)

        return jax.grad(loss)(kernel)

    def mean_gradient(images, kernel):
        return jax.lax.pmean(gradient(convolution.conv_general_dilated, images, kernel), "batch")

    expected = gradient(jax.lax.conv_general_dilated, images, kernel)
    mesh = jax.sharding.Mesh(jax.devices()[:count], ("batch",))
    arguments = [
        jax.device_put(array, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names)))
        for array, names in ((images, ("batch",)), (kernel, ()))
    ]
    by_parts = functools.partial(gradient, convolution.conv_general_dilated)
    compiled = jax.jit(by_parts).lower(*arguments).compile()
    mapped = jax.pmap(
        mean_gradient, "batch", in_axes=(0, None), out_axes=None, devices=jax.devices()[:count]
    )(images.reshape(count, -1, 6, 6, 3), kernel)
    names = ("all-gather", "all-to-all", "collective-permute", "all-reduce")
    return {
        "convolutions": compiled.as_text().count("convolution("),
        "collectives": [name for name in names if name in compiled.as_text()],
        "errors": [
            float(jnp.max(jnp.abs(found - expected)) / jnp.max(jnp.abs(expected)))
            for found in (compiled(*arguments), mapped)
        ],
    }


def refusals():
    def never(state, batch, axis_name):
        raise AssertionError("a device was called")

    step = parallel.pmap_step(never)
    messages = []
    for size in (12, 4):
        try:
            step(0.0, {"image": np.zeros((size, 2))})
        except ValueError as error:
            messages.append(str(error))
    return messages


def note(event, duration, **details):
    if event.endswith("backend_compile_duration"):
        COMPILED.append(details)


def main():
    jax.monitoring.register_event_duration_secs_listener(note)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    convolution.PART_BYTES = 4 * 6 * 6 * 3 * 4  # four images of `split_convolution`
    results = {
        "devices": jax.device_count(),
        "runs": all_runs(),
        "moved": moved(),
        "evaluation": evaluation(),
        "randomness": randomness(),
        "local_statistics": local_statistics(),
        "donation": donation(),
        "replicated": {count: replicated(count) for count in (1, 2)},
        "fsdp": fully_sharded(4),
        "mappings": mappings.deviations(mappings.PART),
        "explicit axes": {kind: on_explicit_axes(*given) for kind, given in RELABELLED.items()},
        "split convolution": split_convolution(4),
        "refusals": refusals(),
    }
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
