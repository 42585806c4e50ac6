"""The same global batch on one device, on eight, and on a mesh: the same network.

    python docs/examples/pmap_many_devices.py

Eight CPU devices act as the cores of an accelerator. `lpa_step` is written for one device's share
of the batch and reduces over a named axis; `pmap_step` maps it. `mesh_step` compiles the same step
with `jax.jit` for a mesh, here with parameters and optimizer state spread over it (FSDP). The
examples of a class are on several devices, and its perturbation is that of the global batch.
"""

import functools

import digits_lt
import jax
import numpy as np
import optax

import lpa_jax
from lpa_jax import data

# Before JAX starts. Remove both lines on a machine with several devices.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)


if __name__ == "__main__":
    train, test = digits_lt.load()
    batches = data.batches(train, seed=0, batch_size=64)
    perturbations = {
        "hidden1": lpa_jax.lpa(radius=0.3, assignment=lpa_jax.by_frequency(train.counts)),
        "logits": lpa_jax.lpl(radius=1.0, assignment=lpa_jax.by_frequency(train.counts)),
    }
    model = lpa_jax.models.MLP(num_classes=10, hidden=(64, 64))
    start = lpa_jax.TrainState.create(
        model, optax.sgd(0.1), jax.random.key(0), batches[0], perturbations
    )
    step = functools.partial(lpa_jax.lpa_step, perturbations=perturbations)

    shares = np.split(batches[0]["label"], jax.device_count())
    holders = sum(0 in share for share in shares)
    print(f"{jax.device_count()} devices; digit 0 of the first batch lies on {holders} of them")

    parallel, devices = lpa_jax.parallel, jax.devices()
    mesh = jax.sharding.Mesh(devices, ("data",))
    ways = {
        "1 device": parallel.pmap_step(step, devices=devices[:1]),
        "8 devices": parallel.pmap_step(step, devices=devices),
        "a mesh": parallel.mesh_step(step, mesh, shardings=parallel.fsdp_shardings),
    }
    trained = {}
    for name, mapped in ways.items():
        state = start
        for number in range(20):
            state, metrics = mapped(state, batches[number])
            jax.block_until_ready(metrics)  # CPU devices can deadlock without it
        trained[name] = jax.device_get(state.params)
        print(f"{name}: loss {lpa_jax.metrics.compute(metrics)['loss']:.6f} after 20 steps")

    for name, params in trained.items():
        differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), trained["1 device"], params)
        print(f"{name}: largest difference of any weight: {max(jax.tree.leaves(differences)):.1e}")
