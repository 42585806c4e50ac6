"""Metrics as (sum, count) pairs, which do not depend on padding, batches or devices.

A metric of a batch is the pair of a weighted sum and the number of examples in it. `add` adds the
pairs of several batches, `reduce_over` those of several devices, and `compute` divides the total on
the host. So the result does not depend on how the examples were cut into batches, and a padded
example, whose mask is 0, counts nowhere.

Sums and counts are float32 (float64 for float64 values): counts are exact up to 2^24 examples.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from lpa_jax import checks
from lpa_jax.tables import at_least_float32

Pair = tuple[jax.Array, jax.Array]


def mean(values: jax.Array, mask: jax.Array | None = None) -> Pair:
    """Pair of the mean over the examples that count.

        sum = sum_{i: mask_i != 0} values_i,    count = #{i: mask_i != 0}

    Args:
      values: One value per example [B].
      mask: 0 or False for padding [B]; None counts every example. Values under a zero mask are
        never read, so they may be NaN.

    Raises:
      ValueError: The shapes of values and mask differ.

    Example:
      >>> total, count = mean(jnp.array([1.0, 2.0, jnp.nan]), jnp.array([1, 1, 0]))
      >>> float(total), float(count)
      (3.0, 2.0)
    """
    values = at_least_float32(checks.array("values", values))
    counted = _counted(mask, values.shape)
    return jnp.sum(jnp.where(counted, values, 0.0)), jnp.sum(counted.astype(values.dtype))


def accuracy(logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None) -> Pair:
    """Pair of the share of examples whose largest logit is that of the label.

    Of equal logits the first wins. A row with a NaN is wrong, so that a diverged network does not
    score as if it predicted a class.

    Args:
      logits: Scores [B, C].
      labels: Class indices [B], in 0..C-1 wherever the mask is not 0.
      mask: As in `mean`.

    Raises:
      ValueError: The shapes do not fit.

    Example:
      >>> pair = accuracy(jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([0, 1]))
      >>> compute(pair)
      0.5
    """
    return mean(_correct(logits, labels), mask)


def per_class_accuracy(
    logits: jax.Array, labels: jax.Array, mask: jax.Array | None, num_classes: int
) -> Pair:
    """Pairs of the accuracy within each class, two vectors [C].

        B_c = {i: label_i = c, mask_i != 0}
        sum_c = #{i in B_c: prediction_i = c},    count_c = #B_c

    Args:
      logits: Scores [B, C].
      labels: As in `accuracy`.
      mask: As in `mean`.
      num_classes: C, the length of the result.

    Raises:
      ValueError: The shapes do not fit or num_classes is not the number of logits.

    Example:
      >>> logits, labels = jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([0, 1])
      >>> compute(per_class_accuracy(logits, labels, None, num_classes=2))
      array([1., 0.])
    """
    correct = _correct(logits, labels)
    if logits.shape[1] != num_classes:
        raise ValueError(
            f"num_classes must be the number of logits, {logits.shape[1]}, got {num_classes!r}"
        )
    counted = _counted(mask, labels.shape).astype(correct.dtype)
    members = jax.nn.one_hot(labels, num_classes, dtype=correct.dtype) * counted[:, None]
    return jnp.sum(members * correct[:, None], axis=0), jnp.sum(members, axis=0)


def accuracy_of_several(logits: jax.Array, labels: jax.Array) -> Pair:
    """Pair of the share of the known labels that the sign of the logit predicts.

    Args:
      logits: Scores [N, C]; above 0 predicts 1, a NaN is wrong.
      labels: 0, 1 or -1 (not known, not counted), [N, C].

    Example:
      >>> compute(accuracy_of_several(jnp.array([[1.0, 1.0, 0.5]]), jnp.array([[1, 0, -1]])))
      0.5
    """
    right, known = _right_and_known(logits, labels)
    return jnp.sum(right & known, dtype=jnp.float32), jnp.sum(known, dtype=jnp.float32)


def several_classes(logits: jax.Array, labels: jax.Array) -> dict[str, Pair]:
    r"""Pairs of the measures of several classes an example; arguments as `accuracy_of_several`.

        exact_match:         share of the examples with all known labels right
        per_class_accuracy:  share of the members of class c that are found (recall), [C]
        per_class_f1:        2 TP_c / (2 TP_c + FP_c + FN_c), [C]
        f1:                  the same of all classes together

    Example:
      >>> pairs = several_classes(jnp.array([[1.0, 1.0], [-1.0, 1.0]]), jnp.array([[1, 0], [1, 1]]))
      >>> compute(pairs)["per_class_f1"].round(2).tolist(), round(compute(pairs)["f1"], 2)
      ([0.67, 0.67], 0.67)
    """
    right, known = _right_and_known(logits, labels)
    found = jnp.sum(right & (labels > 0), axis=0, dtype=jnp.float32)
    members = jnp.sum(labels > 0, axis=0, dtype=jnp.float32)
    wrong = jnp.sum(~right & known, axis=0, dtype=jnp.float32)
    counted = jnp.any(known, axis=1)
    return {
        "exact_match": mean(jnp.all(right | ~known, axis=1).astype(jnp.float32), counted),
        "per_class_accuracy": (found, members),
        "per_class_f1": (2 * found, 2 * found + wrong),
        "f1": (jnp.sum(2 * found), jnp.sum(2 * found + wrong)),
    }


def _right_and_known(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape:
        raise ValueError(
            f"logits and labels must have shape [N, C], got {logits.shape} and {labels.shape}"
        )
    return ((logits > 0) == (labels > 0)) & ~jnp.isnan(logits), labels >= 0


def add(a: Any, b: Any) -> Any:
    """Sum of two trees of pairs of one structure, for example those of two batches.

    Example:
      >>> add({"loss": (3.0, 2.0)}, {"loss": (4.0, 1.0)})
      {'loss': (7.0, 3.0)}
    """
    return jax.tree.map(lambda x, y: x + y, a, b)


def reduce_over(pairs: Any, axis_name: str | None) -> Any:
    """Sum of a tree of pairs over the devices along a mapped axis; None returns it as it is.

    Example:
      >>> total = jax.vmap(lambda x: reduce_over(mean(x), "d"), axis_name="d")(jnp.ones((2, 3)))
      >>> [x.tolist() for x in total]
      [[6.0, 6.0], [6.0, 6.0]]
    """
    return pairs if axis_name is None else jax.lax.psum(pairs, axis_name)


def compute(pairs: Any) -> Any:
    """Sum / count of every pair, on the host.

    Args:
      pairs: Tree whose innermost 2-tuples are pairs (sum, count).

    Returns:
      The tree with a Python float (scalars) or a float64 array (vectors) in place of each pair, nan
      where the count is 0.

    Raises:
      ValueError: The tree holds anything outside a pair, or sum and count differ in shape.

    Example:
      >>> compute({"accuracy": (0.0, 0.0), "loss": (3.0, 2.0)})
      {'accuracy': nan, 'loss': 1.5}
    """
    return jax.tree.map(_ratio, jax.device_get(pairs), is_leaf=_is_pair)


def shot_groups(
    counts: ArrayLike, thresholds: tuple[float, float] = (20, 100)
) -> dict[str, np.ndarray]:
    """Boolean masks [C] of the classes with many, a medium number of and few training examples.

        few: N_c < low,    medium: low <= N_c <= high,    many: N_c > high

    Args:
      counts: Training examples N_c of each class [C].
      thresholds: (low, high), in examples.

    Raises:
      ValueError: Counts are not a vector of finite numbers >= 0, or thresholds do not ascend.

    Example:
      >>> shot_groups([101, 100, 20, 19])["medium"]
      array([False,  True,  True, False])

    References:
      Liu et al. 2019, Large-Scale Long-Tailed Recognition in an Open World, arXiv 1904.05160.
    """
    counts = checks.vector("counts", counts)
    limits = checks.vector("thresholds", thresholds)
    ascend = limits.size == 2 and limits[0] <= limits[1]
    checks.require(ascend, "thresholds", "(low, high), 0 <= low <= high", thresholds)
    many, few = counts > limits[1], counts < limits[0]
    return {"many": many, "medium": ~(many | few), "few": few}


def shot_groups_by_thirds(counts: ArrayLike) -> dict[str, np.ndarray]:
    """Boolean masks [C] of thirds of the classes by number of training examples.

    For sets too small for the thresholds of `shot_groups`. Classes are ranked by decreasing count,
    ties by index. When C is not a multiple of 3, "many" gets the first class left over and "medium"
    the second: 10 classes give 4, 3 and 3. With C < 3 the last groups are empty.

    Args:
      counts: Training examples N_c of each class [C].

    Raises:
      ValueError: Counts are not a vector of finite numbers >= 0.

    Example:
      >>> shot_groups_by_thirds([5, 50, 500])["few"]
      array([ True, False, False])
    """
    counts = checks.vector("counts", counts)
    ranked = np.argsort(-counts, kind="stable")
    classes = np.arange(counts.size)
    thirds = zip(("many", "medium", "few"), np.array_split(ranked, 3), strict=True)
    return {name: np.isin(classes, members) for name, members in thirds}


def group_accuracy(
    per_class_pair: tuple[Any, Any], groups: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Mean over the classes of each group of the accuracy within the class.

        accuracy_G = mean_{c in G, count_c > 0} sum_c / count_c

    Args:
      per_class_pair: Vectors (number correct, number of examples), [C] each.
      groups: Boolean masks [C] by name, as from `shot_groups`.

    Returns:
      One accuracy in [0, 1] for each group, nan for a group without a tested class.

    Raises:
      ValueError: A mask is not boolean of shape [C].

    Example:
      >>> pair = (np.array([9.0, 1.0, 0.0]), np.array([10.0, 2.0, 0.0]))
      >>> group_accuracy(pair, {"all": np.array([True, True, True])})
      {'all': 0.7}
    """
    by_class = np.atleast_1d(compute(tuple(per_class_pair)))
    tested = ~np.isnan(by_class)
    checks.instance("groups", groups, Mapping, "boolean masks by name")
    result = {}
    for name, mask in groups.items():
        mask = np.asarray(mask)
        if mask.dtype != bool or mask.shape != by_class.shape:
            raise ValueError(
                f"groups[{name!r}] must be boolean of shape {by_class.shape}, "
                f"got {mask.dtype} of shape {mask.shape}"
            )
        members = by_class[mask & tested]
        result[name] = float(members.mean()) if members.size else math.nan
    return result


def _counted(mask: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
    if mask is None:
        return jnp.ones(shape, dtype=bool)
    mask = checks.array("mask", mask)
    if mask.shape != shape:
        raise ValueError(f"mask must have one entry per example, shape {shape}, got {mask.shape}")
    return mask.astype(bool)


def _correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    logits, labels = checks.array("logits", logits), checks.array("labels", labels)
    floating = jnp.issubdtype(labels.dtype, jnp.inexact)
    checks.require(not floating, "labels", "integers", labels.dtype)
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            "logits and labels must have shapes [B, C] and [B], "
            f"got {logits.shape} and {labels.shape}"
        )
    # The comparison is in int32: a prediction of 256 cast to uint8 labels would be 0.
    hit = jnp.argmax(logits, axis=-1).astype(jnp.int32) == labels.astype(jnp.int32)
    hit &= ~jnp.any(jnp.isnan(logits), axis=-1)
    return hit.astype(jnp.float32)


def _is_pair(node: Any) -> bool:
    return isinstance(node, tuple) and len(node) == 2 and jax.tree_util.all_leaves(node)


def _ratio(pair: Any) -> float | np.ndarray:
    checks.require(_is_pair(pair), "pairs", "a tree of (sum, count) tuples", pair)
    total, count = (np.asarray(x, dtype=np.float64) for x in pair)
    if total.shape != count.shape:
        raise ValueError(f"pairs must agree in shape, got sum {total.shape}, count {count.shape}")
    ratio = np.full(total.shape, np.nan)
    np.divide(total, count, out=ratio, where=count != 0)
    return ratio if ratio.ndim else float(ratio)
