"""How programs are compiled."""

import os
from typing import Any

import jax

from lpa_jax.checks import is_known

QUICK = {"xla_backend_optimization_level": 1}


def quick(*arguments: Any) -> dict[str, Any] | None:
    """Compiler options for a program whose compilation takes longer than its calls.

    With less optimization, the initializers of networks compile about four times as fast on CPUs,
    to the same values bit by bit.

    Args:
      *arguments: Of the call. While jit traces them, its own options hold.

    Returns:
      Options for `jax.jit`; None on accelerators, and where XLA_FLAGS decide.
    """
    decided = any(option in os.environ.get("XLA_FLAGS", "") for option in QUICK)
    known = all(map(is_known, jax.tree.leaves(arguments)))
    return QUICK if known and not decided and jax.default_backend() == "cpu" else None
