"""What a compiled training step costs: FLOPs and their floor, memory, time beside another step."""

import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lpa_jax
from lpa_jax import injection, models
from lpa_jax.perturbations import Perturbation

# Of no consequence for the time; small, so that activations stay in their range.
RADIUS = 0.05
WARM_UP_ROUNDS = 2

Batch = Mapping[str, jax.Array]
Compiled = Any


def make_state(
    model: models.StagedModel, batch_size: int, image_size: int, channels: int
) -> tuple[lpa_jax.TrainState, Batch]:
    """Train state of plain training and a random batch."""
    image_rng, label_rng, run_rng = jax.random.split(jax.random.key(0), 3)
    batch = {
        "image": jax.random.normal(image_rng, (batch_size, image_size, image_size, channels)),
        "label": jax.random.randint(label_rng, (batch_size,), 0, model.num_classes),
    }
    # A rate so small that random labels cannot drive a long run out of range.
    optimizer = optax.sgd(1e-3, momentum=0.9)
    return lpa_jax.TrainState.create(model, optimizer, run_rng, batch), batch


def with_perturbations(
    state: lpa_jax.TrainState, batch: Batch, chosen: Mapping[str, Perturbation]
) -> lpa_jax.TrainState:
    """The same state, as if created for `chosen`."""
    shapes = injection.activation_shapes(
        state.network, state.variables, batch["image"], tuple(chosen)
    )
    fresh = {layer: chosen[layer].init(shapes[layer], state.num_classes) for layer in chosen}
    return state.replace(perturbation_state=fresh)


def compile_step(
    state: lpa_jax.TrainState, batch: Batch, chosen: Mapping[str, Perturbation]
) -> tuple[Compiled, float]:
    """A training step that gives its state away, compiled, and the seconds that took."""
    step = functools.partial(lpa_jax.lpa_step, perturbations=chosen)
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    return compiled, time.perf_counter() - start


def lower_gradient_pass(state: lpa_jax.TrainState, batch: Batch, layer: str) -> jax.stages.Lowered:
    """Decode forward and backward, in training mode, to the activation at `layer` alone."""

    def gradient_pass(variables, activation, images, labels, rng):
        def total_loss(activation):
            logits = injection.decode(
                state.network, variables, activation, layer, inputs=images, train=True, rng=rng
            )
            return jnp.sum(lpa_jax.cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[-1])))

        return jax.grad(total_loss)(activation)

    shapes = injection.activation_shapes(state.network, state.variables, batch["image"], [layer])
    arguments = (state.variables, shapes[layer], batch["image"], batch["label"], state.rng)
    return jax.jit(gradient_pass).lower(*arguments)


def flops(compiled: Compiled) -> float:
    """Floating point operations of one call, as XLA counts them; nan where it does not."""
    return float((compiled.cost_analysis() or {}).get("flops", float("nan")))


def memory_mb(compiled: Compiled) -> float:
    """Memory of one call in 1e6 bytes: arguments, results and temporaries, aliases once."""
    memory = compiled.memory_analysis()
    own = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return (memory.argument_size_in_bytes + own) / 1e6


def floor_ratio(erm_flops: float, gradient_pass_flops: float, passes: int) -> float:
    """FLOPs of ERM and `passes` gradient passes above the layer, over those of ERM.

    >>> floor_ratio(300.0, 100.0, passes=3)
    2.0
    """
    return (erm_flops + passes * gradient_pass_flops) / erm_flops


def alternate(
    first: tuple[Compiled, lpa_jax.TrainState],
    second: tuple[Compiled, lpa_jax.TrainState],
    batch: Batch,
    rounds: int,
) -> list[tuple[float, float]]:
    """Milliseconds of one step of each, by round, in the same process at the same time.

    Each step starts from the state that its last one left, takes over its memory, and is waited
    for. Which of the two goes first alternates.
    """
    steps = [step for step, _ in (first, second)]
    # Steps give their state away; the caller keeps his.
    states = [jax.tree.map(jnp.copy, state) for _, state in (first, second)]
    measured = []
    for count in range(WARM_UP_ROUNDS + rounds):
        milliseconds = [0.0, 0.0]
        for which in (0, 1) if count % 2 == 0 else (1, 0):
            jax.block_until_ready(states[which])
            start = time.perf_counter()
            states[which], metrics = steps[which](states[which], batch)
            jax.block_until_ready((states[which], metrics))
            milliseconds[which] = 1e3 * (time.perf_counter() - start)
        measured.append((milliseconds[0], milliseconds[1]))
    return measured[WARM_UP_ROUNDS:]
