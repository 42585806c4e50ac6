"""Long-tailed training sets: exponential and step profiles, and their index files."""

import hashlib
import json
import os
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lpa_jax import checks
from lpa_jax.data import random_order, splits
from lpa_jax.files import read_bytes, write_text

_FORMAT = "lpa_jax.indices.v1"


def _exponential(num_classes: int, imbalance: float) -> np.ndarray:
    return imbalance ** (-np.arange(num_classes) / (num_classes - 1))


def _step(num_classes: int, imbalance: float) -> np.ndarray:
    minority = np.arange(num_classes) >= num_classes - num_classes // 2
    return np.where(minority, 1.0 / imbalance, 1.0)


_PROFILES = {"exponential": _exponential, "step": _step}
PROFILES = tuple(_PROFILES)


def profile_fractions(profile: str, num_classes: int, imbalance: float) -> np.ndarray:
    """Each class's size as a fraction of the largest class.

    exponential: imbalance^(-c / (C - 1)), class 0 the most frequent.
    step: 1 for the first ceil(C/2) classes, 1 / imbalance for the last floor(C/2).

    Args:
      profile: "exponential" or "step".
      num_classes: C, at least 2.
      imbalance: Size of the largest class over that of the smallest, at least 1.

    Returns:
      float64 [C] in (0, 1].

    Raises:
      ValueError: An unknown profile, fewer than 2 classes, or an imbalance that is not a finite
        number of at least 1.

    Example:
      >>> profile_fractions("exponential", 3, 100.0)
      array([1.  , 0.1 , 0.01])

    References:
      Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019
      (exponential). Buda et al., "A systematic study of the class imbalance problem in
      convolutional neural networks", Neural Networks 2018 (step).
    """
    checks.choice("profile", profile, PROFILES)
    num_classes = checks.integer("num_classes", num_classes, minimum=2)
    checks.number("imbalance", imbalance, 1.0)
    return _PROFILES[profile](num_classes, float(imbalance))


def class_sizes(profile: str, largest: float, num_classes: int, imbalance: float) -> np.ndarray:
    """The size of each class: n_c = floor(largest * fraction_c).

    Args:
      profile: "exponential" or "step".
      largest: Size of the largest class.
      num_classes: C.
      imbalance: Size of the largest class over that of the smallest, at least 1.

    Returns:
      int64 [C].

    Raises:
      ValueError: As `profile_fractions`, or a class that would be left without an example.

    Example:
      >>> class_sizes("exponential", 5000, 10, 100)  # the published CIFAR-10-LT
      array([5000, 2997, 1796, 1077,  645,  387,  232,  139,   83,   50])
    """
    exact = largest * profile_fractions(profile, num_classes, imbalance)
    # in floating point 49 * (1 / 49) < 1
    sizes = np.floor(exact * (1 + 1e-12)).astype(np.int64)
    if sizes.min() < 1:
        raise ValueError(
            f"imbalance must be at most {int(largest)} for class {int(sizes.argmin())} to keep an "
            f"example, got {imbalance}"
        )
    return sizes


def long_tail_indices(
    labels: ArrayLike,
    *,
    num_classes: int,
    profile: str = "exponential",
    imbalance: float = 100.0,
    seed: int = 0,
) -> np.ndarray:
    """Chooses a long-tailed subset of a training pool.

    Class c keeps n_c = floor(n_max * fraction_c) of its N_c examples, the first n_c of a seeded
    random order of its own. n_max is the largest size that the pool can serve, min_c N_c /
    fraction_c: in a balanced pool the size of a class. Because each order depends on the seed and
    the class alone, a stronger imbalance (same seed and pool) takes a subset of a weaker one.

    Args:
      labels: int [N], the labels of the pool.
      num_classes: C; every class must be present.
      profile: "exponential" or "step".
      imbalance: Size of the largest class over that of the smallest, at least 1.
      seed: A non-negative integer.

    Returns:
      Ascending indices into the pool, int64 [sum of n_c].

    Raises:
      ValueError: As `class_sizes`, or a label out of range, or a class that the pool lacks.

    Example:
      >>> labels = np.repeat([0, 1, 2], 100)
      >>> np.bincount(labels[long_tail_indices(labels, num_classes=3, imbalance=100)])
      array([100,  10,   1])

    References:
      The sources of `profile_fractions`.
    """
    fractions = profile_fractions(profile, num_classes, imbalance)
    labels = checks.label_array(labels, num_classes)
    counts = np.bincount(labels, minlength=num_classes)
    if counts.min() == 0:
        raise ValueError(f"labels must hold every class, got none of class {int(counts.argmin())}")
    sizes = class_sizes(profile, float((counts / fractions).min()), num_classes, imbalance)
    orders = splits.class_orders(labels, seed, random_order.LONG_TAIL)
    return np.sort(np.concatenate([orders[c][:size] for c, size in enumerate(sizes)]))


def _checksum(integers: ArrayLike) -> str:
    return hashlib.sha256(np.asarray(integers).astype("<i8").tobytes()).hexdigest()


def save_indices(
    path: str | os.PathLike,
    indices: ArrayLike,
    labels: ArrayLike,
    meta: dict[str, Any] | None = None,
) -> None:
    """Writes indices as JSON with checksums of themselves and of the labels that they index.

    The file appears whole or not at all: it is written beside its place and renamed. Parent
    folders are made.

    Args:
      path: The file to write.
      indices: int [M] into the labelled set.
      labels: int [N], the labels of the whole set that the indices point into.
      meta: Anything JSON can hold, for people to read.

    Raises:
      ValueError: Indices that are not a non-empty vector of different integers in 0..N-1, or meta
        that JSON cannot hold.
      OSError: The file cannot be written.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_indices(folder + "/tail.json", [0, 2], labels=[0, 1, 1], meta={"seed": 0})
      ...     load_indices(folder + "/tail.json", labels=[0, 1, 1])
      (array([0, 2]), {'seed': 0})
    """
    labels = checks.label_array(labels)
    indices = checks.index_array(indices, len(labels))
    if len(np.unique(indices)) < len(indices):
        raise ValueError("indices must name each example once, got one twice")
    content = {
        "format": _FORMAT,
        "num_labels": len(labels),
        "labels_sha256": _checksum(labels),
        "indices_sha256": _checksum(indices),
        "meta": {} if meta is None else meta,
        "indices": indices.tolist(),
    }
    try:
        text = json.dumps(content, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"meta must be what JSON can hold, got {meta!r} ({error})") from None
    write_text(path, text)


def load_indices(path: str | os.PathLike, labels: ArrayLike) -> tuple[np.ndarray, dict[str, Any]]:
    """Reads what `save_indices` wrote and checks that it belongs to this data set.

    Args:
      path: The file to read. Only JSON is read, so a file cannot run code.
      labels: int [N], the labels of the set that the indices are to point into.

    Returns:
      (int64 [M], meta).

    Raises:
      ValueError: Not a file of `save_indices`, a file that was changed, or one made for other
        labels.
      OSError: The file cannot be read.
    """
    labels = checks.label_array(labels)
    try:
        content = json.loads(read_bytes(path))
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"path must be an index file of format {_FORMAT}, got {os.fspath(path)!r}")
    if content.get("labels_sha256") != _checksum(labels):
        raise ValueError(
            f"path must be an index file of this data set ({len(labels)} labels), got "
            f"{os.fspath(path)!r} of another ({content.get('num_labels')} labels, checksums differ)"
        )
    try:
        indices = checks.index_array(content.get("indices"), len(labels))
    except (ValueError, OverflowError):
        indices = None
    meta = content.get("meta", {})
    changed = indices is None or content.get("indices_sha256") != _checksum(indices)
    if changed or not isinstance(meta, dict):
        raise ValueError(
            f"path must be an unchanged index file, got {os.fspath(path)!r} with changed indices"
        )
    return indices, meta
