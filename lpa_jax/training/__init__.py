"""Training: the state, one step and the loop around it."""

from lpa_jax.training.state import TrainState
from lpa_jax.training.step import eval_step, lpa_step

__all__ = ["TrainState", "eval_step", "lpa_step"]
