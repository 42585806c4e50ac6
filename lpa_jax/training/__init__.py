"""Training: the state, one step and the loop around it."""

from lpa_jax.training.forward import Forward, learned_states, perturbed_forward, zero_probes
from lpa_jax.training.state import TrainState, initial_states
from lpa_jax.training.step import eval_step, lpa_step

__all__ = [
    "Forward",
    "TrainState",
    "eval_step",
    "initial_states",
    "learned_states",
    "lpa_step",
    "perturbed_forward",
    "zero_probes",
]
