"""Seeded orders and coin tosses that are the same on every machine and with every NumPy version.

NumPy keeps the raw output of its bit generators fixed but may change what `Generator.permutation`
makes of it, so the orders here are the argsort of raw 64-bit outputs. Splits, long tails, domains
and batches all come from here: the same seed gives the same experiment anywhere.
"""

import numpy as np

from lpa_jax import checks

# The purposes that draw from one seed, apart from each other: the epoch orders of a seed say
# nothing about its long tail. The numbers are part of the meaning of a seed: never renumber them.
EPOCH, LONG_TAIL, SPLIT, REDUCED, BALANCED_CLASSES, BALANCED_MEMBERS, BALANCED_ORDER = range(7)
DOMAIN_ASSIGNMENT, DOMAIN_HOLDOUT, LABEL_NOISE, COLOUR, FILE_CROP = range(7, 12)


def permutation(size: int, seed: int, *stream: int) -> np.ndarray:
    """A uniformly random order of 0..size-1, a pure function of its arguments.

    The order is argsort(Philox(seed, stream) raw 64-bit outputs); ties (chance below size^2 / 2^65)
    keep their place.

    Args:
      size: The number of elements, N.
      seed: A non-negative integer.
      *stream: Non-negative integers that name independent streams of the same seed, for example
        (purpose, epoch).

    Returns:
      int64 [N].

    Raises:
      ValueError: Size or seed is not a non-negative integer.

    Example:
      >>> permutation(5, 0, EPOCH, 0)
      array([3, 2, 4, 1, 0])
      >>> permutation(5, 0, EPOCH, 1)
      array([2, 1, 0, 4, 3])

    References:
      Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011 (Philox).
    """
    return np.argsort(_raw(size, seed, stream), kind="stable")


def bernoulli(probability: float, size: int, seed: int, *stream: int) -> np.ndarray:
    """Independent coin tosses, a pure function of the arguments.

    Toss i is whether the i-th of `uniforms` is below the probability.

    Args:
      probability: Probability of True, in [0, 1].
      size: The number of tosses, N.
      seed: A non-negative integer.
      *stream: As in `permutation`.

    Returns:
      bool [N].

    Raises:
      ValueError: Size or seed is not a non-negative integer, or a probability outside [0, 1].

    Example:
      >>> bernoulli(0.5, 5, 0, COLOUR)
      array([False,  True, False,  True,  True])
    """
    checks.number("probability", probability, 0.0, 1.0)
    return uniforms(size, seed, *stream) < probability


def uniforms(size: int, seed: int, *stream: int) -> np.ndarray:
    """Independent numbers from [0, 1), a pure function of the arguments.

    Number i is (the upper 53 bits of the i-th raw output) / 2^53.

    Args:
      size: How many, N.
      seed: A non-negative integer.
      *stream: As in `permutation`.

    Returns:
      float64 [N].

    Raises:
      ValueError: Size or seed is not a non-negative integer.

    Example:
      >>> uniforms(2, 0, FILE_CROP, 0).round(3)
      array([0.03 , 0.197])
    """
    return (_raw(size, seed, stream) >> np.uint64(11)) * 2.0**-53


def _raw(size: int, seed: int, stream: tuple[int, ...]) -> np.ndarray:
    """uint64 [N]."""
    size = checks.integer("size", size, minimum=0)
    seed = checks.integer("seed", seed, minimum=0)
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=stream)).random_raw(size)
