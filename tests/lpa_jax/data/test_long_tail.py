"""Long tails, their index files, validation splits and reduced sets."""

import json
import pathlib
import pickle

import numpy as np
import pytest

from lpa_jax import data
from lpa_jax.data import random_order

POOL = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 400))


def test_exponential_sizes_are_the_published_ones():
    # Cui et al. 2019 / Cao et al. 2019: CIFAR-10-LT has 12406 images, CIFAR-100-LT 10847
    ten = data.class_sizes("exponential", 5000, 10, 100)
    np.testing.assert_array_equal(ten, [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50])
    assert ten.sum() == 12406
    hundred = data.class_sizes("exponential", 500, 100, 100)
    assert (hundred.sum(), hundred[0], hundred[-1]) == (10847, 500, 5)


def test_exponential_sizes_of_mnist5k_match_hand_computation():
    # 400 * 100^(-c/9), rounded down
    expected = [400, 239, 143, 86, 51, 30, 18, 11, 6, 4]
    chosen = data.long_tail_indices(POOL, num_classes=10, imbalance=100)
    np.testing.assert_array_equal(np.bincount(POOL[chosen]), expected)


def test_step_sizes_make_the_last_half_rare():
    np.testing.assert_array_equal(data.class_sizes("step", 400, 4, 10), [400, 400, 40, 40])
    np.testing.assert_array_equal(data.class_sizes("step", 400, 5, 10), [400, 400, 400, 40, 40])
    chosen = data.long_tail_indices(POOL, num_classes=10, profile="step", imbalance=20)
    np.testing.assert_array_equal(np.bincount(POOL[chosen]), [400] * 5 + [20] * 5)


def test_sizes_that_are_whole_numbers_are_not_rounded_below_them():
    # in floating point 49 * (1 / 49) < 1
    np.testing.assert_array_equal(data.class_sizes("exponential", 49, 2, 49), [49, 1])


def test_imbalance_one_keeps_a_balanced_pool_whole():
    chosen = data.long_tail_indices(POOL, num_classes=10, imbalance=1)
    np.testing.assert_array_equal(chosen, np.arange(4000))


def test_chosen_examples_are_sorted_seeded_and_nested():
    def choose(**options):
        return data.long_tail_indices(POOL, num_classes=10, **options)

    weak, strong = choose(imbalance=10), choose(imbalance=100)
    assert (np.diff(strong) > 0).all()
    assert set(strong) < set(weak)
    np.testing.assert_array_equal(strong, choose(imbalance=100))
    assert not np.array_equal(strong, choose(imbalance=100, seed=1))


def test_an_unbalanced_pool_serves_the_largest_tail_it_can():
    labels = np.repeat([0, 1, 2], [90, 30, 6])
    # fractions 1, 0.1, 0.01: class 0 binds with 90
    chosen = data.long_tail_indices(labels, num_classes=3, imbalance=90)
    np.testing.assert_array_equal(np.bincount(labels[chosen]), [90, 9, 1])
    # fractions 1, 1/2, 1/4: class 2 binds with 6 * 4 = 24
    chosen = data.long_tail_indices(labels, num_classes=3, imbalance=4)
    np.testing.assert_array_equal(np.bincount(labels[chosen]), [24, 12, 6])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"imbalance": 0.5}, r"imbalance must be finite and >= 1, got 0\.5"),
        ({"imbalance": float("nan")}, "imbalance must be finite and >= 1, got nan"),
        ({"imbalance": float("inf")}, "imbalance must be finite and >= 1, got inf"),
        (
            {"imbalance": 401},
            "imbalance must be at most 400 for class 9 to keep an example, got 401",
        ),
        ({"profile": "pareto"}, "profile must be one of exponential, step, got 'pareto'"),
        ({"num_classes": 11}, "labels must hold every class, got none of class 10"),
        ({"num_classes": 9}, r"labels must be in 0\.\.8, got 9 at position 3"),
        ({"num_classes": 1}, "num_classes must be a whole number >= 2, got 1"),
        ({"seed": -1}, "seed must be a whole number >= 0, got -1"),
    ],
)
def test_bad_long_tails_get_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        data.long_tail_indices(POOL, **{"num_classes": 10, "imbalance": 100} | options)
    assert "\n" not in str(caught.value)


@pytest.fixture
def index_file(tmp_path):
    path = tmp_path / "new" / "tail.json"
    indices = data.long_tail_indices(POOL, num_classes=10)
    data.save_indices(path, indices, POOL, {"profile": "exponential", "seed": 0})
    return path, indices


def test_index_files_round_trip_and_leave_nothing_else_behind(index_file):
    path, indices = index_file
    loaded, meta = data.load_indices(path, POOL)
    np.testing.assert_array_equal(loaded, indices)
    assert meta == {"profile": "exponential", "seed": 0}
    assert [entry.name for entry in path.parent.iterdir()] == ["tail.json"]


def test_index_files_of_another_data_set_are_refused(index_file):
    path, _ = index_file
    other = POOL.copy()
    other[0] = (other[0] + 1) % 10
    for labels in (other, POOL[:-1]):
        with pytest.raises(
            ValueError,
            match=r"of this data set \(.* labels\), got .*tail\.json.* of another \(4000",
        ):
            data.load_indices(path, labels)


@pytest.mark.parametrize(
    "tamper",
    [
        lambda indices: indices[:-1],
        lambda indices: [*indices[:-1], indices[-1] + 1],
        lambda indices: indices[::-1],
        lambda indices: [*indices[:-1], 4000],
        lambda indices: [*indices[:-1], 10**30],
        lambda indices: [str(index) for index in indices],
        lambda indices: None,
    ],
)
def test_tampered_index_files_are_refused(index_file, tamper):
    path, _ = index_file
    content = json.loads(path.read_text())
    content["indices"] = tamper(content["indices"])
    path.write_text(json.dumps(content))
    with pytest.raises(
        ValueError,
        match=r"path must be an unchanged index file, got .*tail\.json.* with changed indices",
    ):
        data.load_indices(path, POOL)


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_files_that_could_run_code_or_are_no_index_files_are_refused_unread(tmp_path):
    path, mark = tmp_path / "tail.npy", tmp_path / "exploded"
    bomb = np.array([_Bomb(mark)], dtype=object)
    np.save(path, bomb, allow_pickle=True)
    contents = [path.read_bytes(), pickle.dumps(_Bomb(mark)), b"", b"[1, 2]", b'{"format": "x"}']
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(
            ValueError,
            match=r"path must be an index file of format lpa_jax\.indices\.v1, got .*tail\.npy",
        ):
            data.load_indices(path, POOL)
    assert not mark.exists()


def test_a_failed_write_keeps_the_old_index_file(index_file, monkeypatch):
    path, indices = index_file
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        data.save_indices(path, indices[:3], POOL)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["tail.json"]


@pytest.mark.parametrize(
    ("indices", "meta", "message"),
    [
        ([0, 0], None, "indices must name each example once, got one twice"),
        ([4000], None, r"indices must be in 0\.\.3999, got 4000 at position 0"),
        ([], None,
         r"indices must be a non-empty vector of integers, got shape \(0,\) and dtype float64"),
        ([0], {"x": object()}, "must be what JSON can hold"),
        ([0], {"x": float("nan")}, "must be what JSON can hold"),
    ],
)  # fmt: skip
def test_bad_index_files_are_not_written(tmp_path, indices, meta, message):
    with pytest.raises(ValueError, match=message):
        data.save_indices(tmp_path / "tail.json", indices, POOL, meta)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"per_class": 1}, [1, 1, 1]),
        ({"fraction": 0.25}, [5, 2, 1]),  # 5, 1.5 -> 2, 0.5 -> 1
        ({"fraction": 0.01}, [1, 1, 1]),  # at least one
        ({"fraction": 0.99}, [19, 5, 1]),  # at most all but one: 19.8, 5.94, 1.98
    ],
)
def test_validation_takes_its_share_of_every_class_and_nothing_twice(options, sizes):
    labels = np.repeat([0, 1, 2], [20, 6, 2])
    train, validation = data.validation_split(labels, **options)
    np.testing.assert_array_equal(np.bincount(labels[validation]), sizes)
    np.testing.assert_array_equal(np.sort([*train, *validation]), np.arange(28))
    assert (np.diff(train) > 0).all()


def test_validation_splits_depend_on_the_seed():
    first, again, other = (data.validation_split(POOL, per_class=40, seed=s)[1] for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_reduced_sets_are_balanced_and_nested():
    small, large = data.reduced_indices(POOL, 5), data.reduced_indices(POOL, 50)
    np.testing.assert_array_equal(np.bincount(POOL[small]), np.full(10, 5))
    np.testing.assert_array_equal(np.bincount(POOL[large]), np.full(10, 50))
    assert set(small) < set(large)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.validation_split([0, 1]),
         "exactly one of per_class and fraction must be given, got per_class=None"),
        (lambda: data.validation_split([0, 1], per_class=1, fraction=0.5),
         r"exactly one of per_class and fraction must be given, got per_class=1, fraction=0\.5"),
        (lambda: data.validation_split([0, 0], per_class=0),
         "per_class must be a whole number >= 1, got 0"),
        (lambda: data.validation_split([0, 0], per_class=2),
         "per_class must leave class 0 with its 2 examples in both parts, got 2"),
        (lambda: data.validation_split([0, 1, 1], fraction=0.5),
         r"fraction must leave class 0 with its 1 examples in both parts, got 0\.5"),
        (lambda: data.validation_split([0, 0], fraction=1.0),
         r"fraction must be in \(0, 1\), got 1\.0"),
        (lambda: data.validation_split([-1, 0], per_class=1),
         r"labels must be in 0\.\.2147483647, got -1 at position 0"),
        (lambda: data.reduced_indices([0, 0, 1], 2),
         "per_class must be at most 1, the size of class 1, got 2"),
        (lambda: data.reduced_indices([0, 0, 1], 0),
         "per_class must be a whole number >= 1, got 0"),
        (lambda: data.reduced_indices([], 1),
         r"labels must be a non-empty vector of integers, got shape \(0,\) and dtype float64"),
    ],
)  # fmt: skip
def test_bad_splits_get_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_permutations_are_uniform_and_pinned():
    # pinned: every saved seed means this order (random_order.py says why it is stable)
    np.testing.assert_array_equal(random_order.permutation(6, 42, 1, 2), [5, 1, 2, 3, 0, 4])
    orders = [tuple(random_order.permutation(3, seed)) for seed in range(6000)]
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 6
    # 1000 each; 5 standard deviations of a binomial are 144
    np.testing.assert_allclose(counts, 1000, atol=144)
