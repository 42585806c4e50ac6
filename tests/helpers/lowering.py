"""Faster lowering of many small programs."""

import functools
import itertools

from jax._src.interpreters import mlir

PROGRAMS = 100  # constants of programs stay in their context


def share_contexts():
    """Has programs share MLIR contexts, each of which costs 6 ms and 1 MB.

    JAX makes one for every program, about a quarter of the time of a small one.
    """
    make = getattr(mlir, "make_ir_context", None)
    if make is None:  # in another version of JAX
        return
    number = itertools.count()
    context = functools.lru_cache(maxsize=1)(lambda _: make())
    mlir.make_ir_context = lambda: context(next(number) // PROGRAMS)
