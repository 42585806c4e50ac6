"""Metrics count every example once, however the examples are padded, batched or spread."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpa_jax import metrics

# Predictions 0, 1, 2, 1 for labels 0, 1, 1, 2: two right of four.
LOGITS = np.array([[5, 0, 0], [0, 5, 0], [0, 0, 5], [0, 5, 0]], np.float32)
LABELS = np.array([0, 1, 1, 2])
LOSSES = np.array([0.5, 1.5, 2.0, 4.0], np.float32)


def all_pairs(losses, logits, labels, mask):
    return {
        "accuracy": metrics.accuracy(logits, labels, mask),
        "by_class": metrics.per_class_accuracy(logits, labels, mask, num_classes=3),
        "loss": metrics.mean(losses, mask),
    }


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


WHOLE = {
    "accuracy": (2.0, 4.0),
    "by_class": (np.array([1.0, 1.0, 0.0]), np.array([1.0, 2.0, 1.0])),
    "loss": (8.0, 4.0),
}


@pytest.mark.parametrize("mask", [None, np.ones(4, bool), np.ones(4, np.float32)])
def test_pairs_equal_the_ones_counted_by_hand(mask):
    assert_equal(all_pairs(LOSSES, LOGITS, LABELS, mask), WHOLE)


@pytest.mark.parametrize(("dtype", "label"), [(bool, 0), (np.float32, -1), (np.int32, 3)])
def test_padding_is_not_counted(dtype, label):
    # What stands in the padding is arbitrary: a loss may be NaN there, a label out of range.
    losses = np.append(LOSSES, [np.nan, np.inf]).astype(np.float32)
    logits = np.concatenate([LOGITS, np.full((2, 3), np.nan, np.float32)])
    labels = np.append(LABELS, [label, label])
    mask = np.array([1, 1, 1, 1, 0, 0], dtype)
    assert_equal(all_pairs(losses, logits, labels, mask), WHOLE)
    assert_equal(jax.jit(all_pairs)(losses, logits, labels, mask), WHOLE)


@pytest.mark.parametrize("cut", [1, 4])
def test_two_parts_added_equal_the_whole(cut):
    mask = np.ones(4, bool)
    first = all_pairs(LOSSES[:cut], LOGITS[:cut], LABELS[:cut], mask[:cut])
    rest = all_pairs(LOSSES[cut:], LOGITS[cut:], LABELS[cut:], mask[cut:])
    assert_equal(metrics.add(first, rest), WHOLE)


def test_pairs_summed_over_a_mapped_axis_equal_the_whole():
    def per_device(*shard):
        return metrics.reduce_over(all_pairs(*shard), "devices")

    shards = [x.reshape(2, 2, *x.shape[1:]) for x in (LOSSES, LOGITS, LABELS, np.ones(4, bool))]
    both = jax.vmap(per_device, axis_name="devices")(*shards)
    for device in range(2):
        assert_equal(jax.tree.map(lambda x, d=device: x[d], both), WHOLE)


def test_reducing_over_no_axis_returns_the_pairs():
    pairs = metrics.mean(LOSSES)
    assert metrics.reduce_over(pairs, None) is pairs


def test_values_are_summed_in_at_least_float32():
    # 1 + 256 * 2^-8 = 2, where bfloat16 would stay at 1.
    values = jnp.array([1.0] + [2.0**-8] * 256, jnp.bfloat16)
    total, count = metrics.mean(values)
    assert total.dtype == count.dtype == jnp.float32
    assert (float(total), float(count)) == (2.0, 257.0)


def test_nan_logits_are_wrong():
    logits = np.array([[np.nan, np.nan], [np.nan, 1.0]], np.float32)
    assert metrics.compute(metrics.accuracy(logits, np.array([0, 0]))) == 0.0


def test_labels_of_a_narrow_dtype_are_not_confused():
    # 256 as uint8 is 0.
    logits = np.eye(257, dtype=np.float32)[256:]
    assert metrics.compute(metrics.accuracy(logits, np.array([0], np.uint8))) == 0.0


def test_compute_gives_floats_and_arrays_of_the_same_tree():
    result = metrics.compute({"nested": [metrics.mean(LOSSES)], **WHOLE})
    assert result["nested"] == [2.0]
    assert type(result["loss"]) is float
    assert result["accuracy"] == 0.5
    assert isinstance(result["by_class"], np.ndarray)
    np.testing.assert_array_equal(result["by_class"], [1.0, 0.5, 0.0])


def test_count_0_gives_nan_without_a_warning():
    pair = metrics.mean(LOSSES, np.zeros(4, bool))
    assert math.isnan(metrics.compute(pair))
    by_class = metrics.per_class_accuracy(LOGITS[:1], LABELS[:1], None, num_classes=3)
    np.testing.assert_array_equal(metrics.compute(by_class), [1.0, np.nan, np.nan])


def test_shot_groups_at_the_boundaries():
    groups = metrics.shot_groups([101, 100, 20, 19, 0])
    assert list(groups) == ["many", "medium", "few"]
    np.testing.assert_array_equal(groups["many"], [True, False, False, False, False])
    np.testing.assert_array_equal(groups["medium"], [False, True, True, False, False])
    np.testing.assert_array_equal(groups["few"], [False, False, False, True, True])


def test_shot_groups_follow_their_thresholds():
    groups = metrics.shot_groups([5, 4, 3, 2], thresholds=(3, 4))
    assert [int(mask.argmax()) for mask in groups.values()] == [0, 1, 3]
    assert [int(mask.sum()) for mask in groups.values()] == [1, 2, 1]


@pytest.mark.parametrize(
    ("counts", "many", "medium", "few"),
    [
        ([1, 9, 5, 7, 3, 8], [1, 5], [2, 3], [0, 4]),
        ([7, 6, 5, 4, 3, 2, 1], [0, 1, 2], [3, 4], [5, 6]),
        ([8, 7, 6, 5, 4, 3, 2, 1], [0, 1, 2], [3, 4, 5], [6, 7]),
        ([4, 4, 4], [0], [1], [2]),
        ([1, 2], [1], [0], []),
    ],
)
def test_thirds_rank_by_count_with_ties_by_index(counts, many, medium, few):
    groups = metrics.shot_groups_by_thirds(counts)
    assert [np.flatnonzero(mask).tolist() for mask in groups.values()] == [many, medium, few]


def test_thirds_of_many_equal_counts_go_by_index():
    # Enough of them that an unstable sort would mix them up.
    groups = metrics.shot_groups_by_thirds(np.arange(99) % 2)
    odd, even = np.arange(1, 99, 2), np.arange(0, 99, 2)
    ranked = np.concatenate([odd, even])
    for members, mask in zip(
        (ranked[:33], ranked[33:66], ranked[66:]), groups.values(), strict=True
    ):
        np.testing.assert_array_equal(np.flatnonzero(mask), np.sort(members))


def test_every_class_is_in_exactly_one_group():
    counts = np.random.default_rng(0).integers(0, 200, size=50)
    for groups in (metrics.shot_groups(counts), metrics.shot_groups_by_thirds(counts)):
        np.testing.assert_array_equal(sum(mask.astype(int) for mask in groups.values()), 1)


def test_group_accuracy_weighs_classes_equally_and_leaves_untested_ones_out():
    pair = (np.array([9.0, 1.0, 0.0, 3.0]), np.array([10.0, 2.0, 0.0, 3.0]))
    groups = {
        "many": np.array([True, True, False, False]),
        "few": np.array([False, False, True, True]),
        "untested": np.array([False, False, True, False]),
    }
    result = metrics.group_accuracy(pair, groups)
    assert result["many"] == pytest.approx(0.7)  # and not 10 / 12
    assert result["few"] == 1.0
    assert math.isnan(result["untested"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.mean(LOSSES, np.ones(3)),
         r"mask must have one entry per example, shape \(4,\), got \(3,\)"),
        (lambda: metrics.accuracy(LOGITS, LABELS[:3]), r"logits and labels .*\(4, 3\) and \(3,\)"),
        (lambda: metrics.accuracy(LOGITS, LABELS + 0.5), "labels must be integers, got .*float"),
        (lambda: metrics.per_class_accuracy(LOGITS, LABELS, None, num_classes=4),
         "num_classes must be the number of logits, 3, got 4"),
        (lambda: metrics.compute({"loss": 1.0}), r"pairs must be a tree of .*got 1.0"),
        (lambda: metrics.compute((np.ones(2), np.ones(3))), "pairs must agree in shape"),
        (lambda: metrics.shot_groups([[1, 2]]),
         r"counts must be a non-empty vector of numbers, got shape \(1, 2\)"),
        (lambda: metrics.shot_groups([3, -1]),
         "counts must be finite and >= 0, got -1 at position 1"),
        (lambda: metrics.shot_groups_by_thirds([]),
         r"counts must be a non-empty vector of numbers, got shape \(0,\)"),
        (lambda: metrics.shot_groups([3], (100, 20)), r"thresholds must be .*\(100, 20\)"),
        (lambda: metrics.group_accuracy(WHOLE["by_class"], {"few": np.array([2])}),
         r"groups\['few'\] must be boolean of shape \(3,\)"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
