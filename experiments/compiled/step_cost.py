"""What a compiled training step costs: FLOPs and their floor, memory."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

import lpa_jax
from experiments.compiled import timing
from experiments.compiled.timing import Compiled
from lpa_jax import injection, models
from lpa_jax.perturbations import Perturbation

# The time does not depend on it; small, so that activations stay in their range.
RADIUS = 0.05
# So small that training on random labels does not diverge.
LEARNING_RATE, MOMENTUM = 1e-3, 0.9

Batch = Mapping[str, jax.Array]


def make_state(
    model: models.StagedModel, batch_size: int, image_size: int, channels: int
) -> tuple[lpa_jax.TrainState, Batch]:
    """Train state of plain training and a random batch.

    Args:
      model: the network.
      batch_size: B.
      image_size: height and width of the images, [B, image_size, image_size, channels].
      channels: of the images.
    """
    image_rng, label_rng, run_rng = jax.random.split(jax.random.key(0), 3)
    batch = {
        "image": jax.random.normal(image_rng, (batch_size, image_size, image_size, channels)),
        "label": jax.random.randint(label_rng, (batch_size,), 0, model.num_classes),
    }
    optimizer = optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
    return lpa_jax.TrainState.create(model, optimizer, run_rng, batch), batch


def with_perturbations(
    state: lpa_jax.TrainState, batch: Batch, chosen: Mapping[str, Perturbation]
) -> lpa_jax.TrainState:
    """The state with a fresh perturbation state for `chosen`, layer -> perturbation."""
    shapes = injection.activation_shapes(
        state.network, state.variables, batch["image"], tuple(chosen)
    )
    fresh = {layer: chosen[layer].init(shapes[layer], state.num_classes) for layer in chosen}
    return state.replace(perturbation_state=fresh)


def compile_step(
    state: lpa_jax.TrainState, batch: Batch, chosen: Mapping[str, Perturbation]
) -> tuple[Compiled, float]:
    """Compiles a training step that donates its state; also the seconds that it took."""
    step = functools.partial(lpa_jax.lpa_step, perturbations=chosen)
    _, now = timing.clock()
    start = now()
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    return compiled, now() - start


def lower_gradient_pass(state: lpa_jax.TrainState, batch: Batch, layer: str) -> jax.stages.Lowered:
    """Lowers one gradient pass: decode in training mode, and the gradient at `layer` alone."""

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
    """FLOPs of one call by XLA's cost analysis; NaN where XLA gives none."""
    return float((compiled.cost_analysis() or {}).get("flops", float("nan")))


def memory_mb(compiled: Compiled) -> float:
    """Memory of one call in 1e6 bytes: arguments, results and temporaries, donated ones once."""
    memory = compiled.memory_analysis()
    own = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return (memory.argument_size_in_bytes + own) / 1e6


def floor_ratio(erm_flops: float, gradient_pass_flops: float, passes: float) -> float:
    """FLOPs of ERM and `passes` gradient passes above the layer, relative to those of ERM.

    >>> floor_ratio(300.0, 100.0, passes=3)
    2.0
    """
    return (erm_flops + passes * gradient_pass_flops) / erm_flops
