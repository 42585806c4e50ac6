"""Seeded permutations that are the same on every machine and with every NumPy version.

NumPy keeps the raw output of its bit generators fixed but may change what `Generator.permutation`
makes of it, so the orders here are the argsort of raw 64-bit outputs. Splits, long tails and
batches all come from this one function: the same seed gives the same experiment anywhere.
"""

import numpy as np

from lpa_jax.data import checks

# The purposes that draw from one seed, apart from each other: the epoch orders of a seed say
# nothing about its long tail. The numbers are part of the meaning of a seed: never renumber them.
EPOCH, LONG_TAIL, SPLIT, REDUCED, BALANCED_CLASSES, BALANCED_MEMBERS, BALANCED_ORDER = range(7)


def permutation(size: int, seed: int, *stream: int) -> np.ndarray:
    """Returns a uniformly random order of 0..size-1, a pure function of its arguments.

    The order is argsort(Philox(seed, stream) raw 64-bit outputs); ties (chance below size^2 / 2^65)
    keep their place.

    Args:
      size: the number of elements, N.
      seed: a non-negative integer.
      *stream: non-negative integers that name independent streams of the same seed, for example
        (purpose, epoch).

    Returns:
      int64 [N].

    Raises:
      ValueError: size or seed is not a non-negative integer.

    Example:
      >>> permutation(5, 0, EPOCH, 0)
      array([3, 2, 4, 1, 0])
      >>> permutation(5, 0, EPOCH, 1)
      array([2, 1, 0, 4, 3])

    References:
      Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011 (Philox).
    """
    size = checks.integer("size", size, minimum=0)
    seed = checks.integer("seed", seed, minimum=0)
    raw = np.random.Philox(np.random.SeedSequence(seed, spawn_key=stream)).random_raw(size)
    return np.argsort(raw, kind="stable")
