"""A training step whose method's numbers are arguments: what all protocols compile."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from experiments.methods.build import Mixed
from lpa_jax.training import loop as trainer
from lpa_jax.training.step import TrainState, lpa_step

StateAndNumbers = tuple[TrainState, Mapping[str, jax.Array]]


def train(
    state_and_numbers: StateAndNumbers,
    batch: Mapping[str, Any],
    mixed: Mixed,
    stage: int,
    *,
    augment: Callable[..., jax.Array],
    axis_name: str | None,
) -> tuple[StateAndNumbers, Any]:
    """One step of training; the numbers come back with the state, for donation.

    Args:
      state_and_numbers: the state, whose optimizer is replaced for this step by the method's, and
        the numbers that `mixed` was made with.
      batch: of images and labels.
      mixed: the method, with traced numbers.
      stage: which of its losses is in force.
      augment: as in `lpa_step`.
      axis_name: as in `lpa_step`.
    """
    state, numbers = state_and_numbers
    new_state, pairs = lpa_step(
        state.replace(optimizer=mixed.optimizer),
        batch,
        perturbations=mixed.parts.perturbations,
        penalties=mixed.parts.penalties,
        loss=mixed.loss_stages[stage][1],
        augment=augment,
        axis_name=axis_name,
    )
    return (new_state.replace(optimizer=state.optimizer), numbers), pairs


def with_numbers(mapped: Callable[..., Any], numbers: Mapping[str, Any]) -> trainer.Step:
    """The mapped step of a state alone, its numbers put in."""

    def step(state, batch):
        (state, _), pairs = mapped((state, numbers), batch)
        return state, pairs

    return step
