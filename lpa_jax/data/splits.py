"""Stratified, seeded splits and reduced training sets."""

import numpy as np
from numpy.typing import ArrayLike

from lpa_jax import checks
from lpa_jax.data import random_order


def class_orders(labels: np.ndarray, seed: int, purpose: int) -> dict[int, np.ndarray]:
    """The examples of each class that is present, in a seeded random order.

    Every class has a stream of its own, so an order depends on its own class only. Taking the first
    n of it for growing n gives nested sets.

    Args:
      labels: int [N].
      seed: A non-negative integer.
      purpose: One of the purposes of `random_order`.

    Returns:
      {class: int64 [N_c]}, classes ascending.

    Raises:
      ValueError: The seed is not a non-negative integer.

    Example:
      >>> class_orders(np.array([0, 1, 0, 1, 1]), seed=0, purpose=random_order.SPLIT)
      {0: array([2, 0]), 1: array([4, 3, 1])}
    """
    orders = {}
    for c in np.unique(labels).tolist():
        members = np.flatnonzero(labels == c)
        orders[c] = members[random_order.permutation(len(members), seed, purpose, c)]
    return orders


def validation_split(
    labels: ArrayLike, *, per_class: int | None = None, fraction: float | None = None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Splits examples into training and validation, class by class.

    Of the N_c examples of class c, v_c go to validation: v_c = per_class, or fraction * N_c rounded
    to the nearest integer (halves up) and kept within 1..N_c-1. Every class stays in both parts.

    Args:
      labels: int [N].
      per_class: Validation examples of each class; give this or `fraction`.
      fraction: Share of each class, in (0, 1).
      seed: A non-negative integer.

    Returns:
      (training indices, validation indices), both ascending int64; together 0..N-1, each once.

    Raises:
      ValueError: Both or neither of per_class and fraction, a value out of range, or a class with
        too few examples to stay in both parts.

    Example:
      >>> train, validation = validation_split([0, 0, 0, 1, 1, 1], per_class=1)
      >>> train, validation
      (array([0, 1, 3, 4]), array([2, 5]))
    """
    labels = checks.label_array(labels)
    if (per_class is None) == (fraction is None):
        raise ValueError(
            "exactly one of per_class and fraction must be given, "
            f"got per_class={per_class}, fraction={fraction}"
        )
    if per_class is not None:
        per_class = checks.integer("per_class", per_class, minimum=1)
    else:
        checks.number("fraction", fraction, 0.0, 1.0, open_low=True, open_high=True)
    chosen = []
    for c, order in class_orders(labels, seed, random_order.SPLIT).items():
        size = len(order)
        wanted = per_class or min(max(int(fraction * size + 0.5), 1), size - 1)
        if not 1 <= wanted < size:
            name, asked = ("fraction", fraction) if per_class is None else ("per_class", per_class)
            raise ValueError(
                f"{name} must leave class {c} with its {size} examples in both parts, got {asked}"
            )
        chosen.append(order[:wanted])
    validation = np.sort(np.concatenate(chosen))
    return np.setdiff1d(np.arange(len(labels)), validation, assume_unique=True), validation


def reduced_indices(labels: ArrayLike, per_class: int, seed: int = 0) -> np.ndarray:
    """A reduced training set with `per_class` examples of every class that is present.

    Sets of one seed are nested: fewer examples a class give a subset of more.

    Args:
      labels: int [N].
      per_class: Examples of each class.
      seed: A non-negative integer.

    Returns:
      Ascending indices, int64 [per_class * classes].

    Raises:
      ValueError: per_class is not a positive integer, or more than the smallest class has.

    Example:
      >>> reduced_indices([0, 0, 0, 1, 1, 1], per_class=2)
      array([0, 1, 3, 4])
    """
    labels = checks.label_array(labels)
    per_class = checks.integer("per_class", per_class, minimum=1)
    chosen = []
    for c, order in class_orders(labels, seed, random_order.REDUCED).items():
        if per_class > len(order):
            raise ValueError(
                f"per_class must be at most {len(order)}, the size of class {c}, got {per_class}"
            )
        chosen.append(order[:per_class])
    return np.sort(np.concatenate(chosen))
