"""Strengths that may be traced: a radius or rate that is an argument of a compiled step.

A strength given as a Python number is checked where it enters, and 0 turns its method off bitwise.
A traced one (a schedule over training, a value in the state, a number that changes between runs
of one compiled program) cannot be read on the host: it is used as it is.
"""

from typing import Any

import jax


def is_known(value: Any) -> bool:
    """Whether the host can read the value, which it cannot while jit traces it.

    >>> is_known(0.5), jax.eval_shape(lambda x: x if is_known(x) else x[None], 1.0).shape
    (True, (1,))
    """
    return not isinstance(value, jax.core.Tracer)


def vanishes(value: Any) -> bool:
    """Whether the value is known to be 0."""
    return is_known(value) and value == 0
