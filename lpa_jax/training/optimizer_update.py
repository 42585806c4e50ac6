"""The optimizer's update, with what some transformations need besides the gradient."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lpa_jax.training.state import TrainState

Array = jax.Array


def optimizer_update(
    state: TrainState,
    gradient: Any,
    *,
    value: Array,
    value_at: Callable[[Any], Array],
    gradient_at: Callable[..., Any],
    axis_name: str | None,
) -> tuple[Any, optax.OptState]:
    """The updates of the parameters and the optimizer's next state.

    Args:
      state: The train state.
      gradient: Of the global batch's objective at `state.params`.
      value: That objective.
      value_at: Parameters -> this device's part of the objective; the parts' mean is the objective.
      gradient_at: (parameters, ...) -> gradient of the objective.
      axis_name: Mapped axis of the global batch or None.

    Raises:
      ValueError: The optimizer needs an argument that a step does not have.
    """

    def objective(params):
        part = value_at(params)
        return part if axis_name is None else jax.lax.pmean(part, axis_name)

    # The gradient is that of the global batch, on every device, whatever differentiates.
    across_devices = jax.custom_jvp(objective)

    @across_devices.defjvp
    def _(params, directions):
        return objective(*params), optax.tree.vdot(gradient_at(*params), *directions)

    def objective_fn(params, grad_fn=None, obj_fn=None):
        del grad_fn, obj_fn  # optax's line searches refuse arguments that this does not take
        return objective(params) if axis_name is None else across_devices(params)

    given = {
        "value": jnp.asarray(value),
        "grad": gradient,
        "value_fn": objective_fn,
        "obj_fn": objective_fn,
        "grad_fn": gradient_at,
    }
    update = optax.with_extra_args_support(state.optimizer).update
    while True:
        try:
            return update(gradient, state.opt_state, state.params, **given)
        except TypeError as error:
            # Some transformations refuse what they do not need, such as optax.contrib.sam.
            refused = re.search(r"got an unexpected keyword argument '(\w+)'", str(error))
            missing = re.search(r"missing .* required .*: (.*)", str(error))
            if missing is not None:
                raise ValueError(
                    "optimizer must need no arguments but value, grad, value_fn, obj_fn and "
                    f"grad_fn, got one that also needs {missing[1]}"
                ) from None
            if refused is None or given.pop(refused[1], None) is None:
                raise
