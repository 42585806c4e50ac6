"""Trains tiny networks as one of several processes and writes what came out, array by array.

    python -m tests.helpers.hosts_worker train COORDINATOR PROCESSES ID FILE [SETUP, ELSE ALL]
    python -m tests.helpers.hosts_worker loop COORDINATOR PROCESSES ID HEARTBEAT [FAILING STEP]

Run by `test_multihost.py`, which also imports it for the run of a single process.
"""

import functools
import sys
import time

import jax
import numpy as np
import optax

import lpa_jax
from experiments.runtime import hosts as distributed
from lpa_jax import data, multihost, parallel
from lpa_jax.models import MLP
from tests.helpers import toy

STEPS = 12
BATCH = 16
MANY = 40
EVALUATED = 21
OPTIMIZER = optax.sgd(0.05, momentum=0.9)
# By quarter of a batch: class 0 and 2 live in one half only, 3 is absent from most batches.
QUARTERS = ((0, 0, 1, 0), (1, 0, 0, 1), (2, 1, 2, 2), (1, 2, 1, 2))
COMPILED = []


def dataset(num_classes):
    """STEPS batches in their own order, so that classes keep to their hosts."""
    labels = np.tile(np.concatenate(QUARTERS), STEPS)
    labels[::37] = 3
    if num_classes > toy.CLASSES:
        labels = (labels + 4 * (np.arange(labels.size) // BATCH % 9)).astype(labels.dtype)
    noise = np.random.default_rng(0).normal(size=(labels.size, *toy.IMAGE))
    centres = np.random.default_rng(1).normal(size=(num_classes, *toy.IMAGE))
    images = (centres[labels] + noise).astype(np.float32)
    return data.Dataset("toy", images, labels, num_classes)


CONFIDENCE = lpa_jax.by_confidence(kappa=1.0, ema=0.5)


def setups():
    """Model, perturbations and what maps the step, by name."""

    def normalized(num_classes=toy.CLASSES):
        return toy.NormalizedMLP(num_classes, axis_name=parallel.batch_axis())

    def lpa(**options):
        return lpa_jax.lpa(0.3, assignment=CONFIDENCE, **options)

    return {
        "erm": (normalized(), {}, parallel.map_step),
        "cold lpa and lpl": (
            normalized(),
            {"hidden1": lpa(steps=2), "logits": lpa_jax.lpl(0.3, steps=1, assignment=CONFIDENCE)},
            parallel.map_step,
        ),
        # More classes than examples: tables are compact, all hosts agree on their slots.
        "carried and free lpa": (
            normalized(MANY),
            {
                "hidden1": lpa(mode="carry"),
                "hidden2": lpa(mode="free"),
            },
            parallel.map_step,
        ),
        "carried lpa, spread": (MLP(MANY, hidden=(8, 8)), {"hidden1": lpa(mode="carry")}, spread),
    }


def spread(step, donate_state):
    """The step for a mesh of all devices, with the state spread over them."""
    return parallel.mesh_step(
        step,
        jax.make_mesh((jax.device_count(),), ("data",)),
        shardings=functools.partial(parallel.fsdp_shardings, min_size=16),
        donate_state=donate_state,
    )


def results(*names):
    """Every array of the setups' runs (all setups if none is named) by a name of its own."""
    jax.monitoring.register_event_duration_secs_listener(note)
    layout = np.array([jax.process_count(), jax.local_device_count(), jax.device_count()])
    found = {"layout": layout}
    for name in names or setups():
        for path, values in trained(*setups()[name]).items():
            found[f"{name}/{path}"] = values
    return found | evaluated()


def trained(model, perturbations, map_step):
    step = map_step(
        functools.partial(lpa_jax.lpa_step, perturbations=perturbations), donate_state=True
    )
    source = dataset(model.num_classes)
    batches = data.batches(source, 0, BATCH, shuffle=False, host_slice=multihost.host_slice())
    example = {"image": source.images[:BATCH]}
    state = lpa_jax.TrainState.create(model, OPTIMIZER, jax.random.key(0), example, perturbations)
    state = parallel.with_own_buffers(state)
    compilations = []
    for number in range(STEPS):
        COMPILED.clear()
        state, pairs = jax.block_until_ready(step(state, batches[number]))
        compilations.append(len(COMPILED))
    seen = {
        "metrics": pairs,
        "params": state.params,
        "opt_state": state.opt_state,
        "model_state": state.model_state,
        "perturbation_state": state.perturbation_state,
    }
    # What is spread over hosts cannot be read.
    return {**flat(step.to_devices(seen)), "compilations": np.array(compilations)}


def evaluated():
    source = dataset(toy.CLASSES).subset(np.arange(EVALUATED))
    batches = data.evaluation_batches(source, 8, host_slice=multihost.host_slice())
    state = lpa_jax.TrainState.create(
        MLP(toy.CLASSES, hidden=(8,)), OPTIMIZER, jax.random.key(0), batches[0]
    )
    step = parallel.map_step(lpa_jax.eval_step)
    # Several CPU devices of a process have to be waited for.
    pairs = [jax.block_until_ready(step(state, batches[i])) for i in range(len(batches))]
    total = functools.reduce(lpa_jax.metrics.add, pairs)
    return {f"evaluation/{path}": values for path, values in flat(total).items()}


def flat(tree):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def note(event, duration, **details):
    if event.endswith("backend_compile_duration"):
        COMPILED.append(details)


def loop(fail_at):
    """Sums over all processes again and again, without end."""
    step = parallel.pmap_step(lambda total, batch, axis_name: jax.lax.psum(total, axis_name))
    for number in range(10**6):
        float(step(np.float32(1), {"image": np.zeros((jax.local_device_count(), 1))}))
        if number == 0:
            print("ready", flush=True)
        if number == fail_at:
            raise ValueError("something broke")
        time.sleep(0.02)


def main(task, coordinator, processes, process, *rest):
    hosts = {"coordinator_address": coordinator, "num_processes": int(processes)}
    hosts |= {"process_id": int(process), "initialization_timeout": 60}
    if task == "loop":
        heartbeat, *fail_at = map(int, rest)
        hosts |= {"initialization_timeout": heartbeat, "heartbeat_timeout": heartbeat}
        print("joins", flush=True)
        with distributed.session(distributed.Hosts(**hosts)):
            loop(*fail_at or [-1])
        return
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    with distributed.session(distributed.Hosts(**hosts)):
        file, *names = rest
        np.savez(file, **results(*names))


if __name__ == "__main__":
    main(*sys.argv[1:])
