"""Batches: a pure function of (seed, step), each example once an epoch, shared between hosts."""

import threading

import grain
import numpy as np
import pytest

from lpa_jax import data
from tests.helpers.toy import assert_batches_equal


def _toy(size=10, labels=None):
    labels = np.arange(size) % 3 if labels is None else np.asarray(labels)
    # pixel 0 of image i is i: batches can be traced back to examples
    images = np.zeros((size, 2, 2, 1), np.uint8)
    images[:, 0, 0, 0] = np.arange(size)
    return data.Dataset("toy", images, labels, 3)


def _examples(batch):
    return batch["image"][:, 0, 0, 0]


@pytest.mark.parametrize("class_balanced", [False, True])
def test_a_batch_depends_on_seed_and_step_only(class_balanced):
    def fresh(seed=3):
        return data.batches(_toy(), seed, batch_size=4, class_balanced=class_balanced)

    forwards, used = [fresh()[step] for step in range(12)], fresh()
    for step in (11, 0, 7, 7, 3, 11):
        assert_batches_equal(used[step], forwards[step])
        assert_batches_equal(fresh()[np.int64(step)], forwards[step])
    other = [fresh(seed=4)[step] for step in range(12)]
    assert any((_examples(a) != _examples(b)).any() for a, b in zip(forwards, other, strict=True))


@pytest.mark.parametrize("batch_size", [1, 4, 10, 23])
def test_every_example_occurs_exactly_once_an_epoch(batch_size):
    train = data.batches(_toy(), seed=0, batch_size=batch_size)
    stream = np.concatenate([_examples(train[step]) for step in range(60 // batch_size + 1)])
    epochs = stream[:60].reshape(6, 10)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(10), (6, 1)))
    assert len({epoch.tobytes() for epoch in epochs}) == 6  # a new order each time
    assert train.steps_per_epoch == -(-10 // batch_size)


def test_labels_stay_with_their_images_and_unshuffled_order_is_the_sets_own():
    toy = _toy()
    shuffled = data.batches(toy, seed=0, batch_size=10)[5]
    np.testing.assert_array_equal(shuffled["label"], toy.labels[_examples(shuffled)])
    walk = data.batches(toy, seed=0, batch_size=4, shuffle=False)
    np.testing.assert_array_equal(_examples(walk[2]), [8, 9, 0, 1])


def test_host_slices_concatenate_to_the_global_batch():
    toy = _toy()
    sources = {
        "batches": lambda host: data.batches(toy, 1, 6, host_slice=host),
        "balanced": lambda host: data.batches(toy, 1, 6, class_balanced=True, host_slice=host),
        "evaluation": lambda host: data.evaluation_batches(toy, 6, host_slice=host),
        "grain": lambda host: data.grain_batches(_source(toy), 1, 6, host_slice=host),
    }
    for name, create in sources.items():
        for step in (0, 1):
            parts = [create((host, 3))[step] for host in range(3)]
            whole = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            assert_batches_equal(whole, create((0, 1))[step])
            assert len(parts[0]["label"]) == 2, name


def test_positions_number_the_global_batch():
    second = data.batches(_toy(), 0, 6, host_slice=(1, 2))
    np.testing.assert_array_equal(second[9]["position"], [3, 4, 5])


def test_evaluation_shows_each_example_once_and_masks_the_padding():
    toy = _toy()
    evaluation = data.evaluation_batches(toy, batch_size=4)
    assert len(evaluation) == 3
    assert sum(batch["mask"].sum() for batch in evaluation) == 10
    assert all(batch["image"].shape == (4, 2, 2, 1) for batch in evaluation)
    seen = np.concatenate([_examples(b)[b["mask"] == 1] for b in evaluation])
    np.testing.assert_array_equal(seen, np.arange(10))
    # hosts beyond the end of a short last batch get padding only
    masks = [data.evaluation_batches(toy, 8, host_slice=(h, 4))[1]["mask"] for h in range(4)]
    np.testing.assert_array_equal(masks, [[1, 1], [0, 0], [0, 0], [0, 0]])


def test_class_balanced_epochs_draw_classes_equally_and_members_evenly():
    toy = _toy(11, labels=[0] * 8 + [1] * 2 + [2])
    train = data.batches(toy, seed=0, batch_size=11, class_balanced=True)
    heads = set()
    for epoch in range(20):
        batch = train[epoch]
        draws = np.bincount(_examples(batch), minlength=11)
        per_class = np.bincount(batch["label"], minlength=3)
        assert sorted(per_class) == [3, 4, 4]
        assert draws[:8].max() == 1  # the large class: without replacement
        assert abs(int(draws[8]) - int(draws[9])) <= 1  # the small one: evenly
        heads |= set(np.flatnonzero(draws[:8]))
    assert heads == set(range(8))  # anew each epoch: no example is lost for good


def test_class_balanced_sampling_ignores_absent_classes():
    toy = _toy(4, labels=[0, 0, 0, 2])
    batch = data.batches(toy, seed=0, batch_size=4, class_balanced=True)[0]
    np.testing.assert_array_equal(np.bincount(batch["label"]), [2, 0, 2])


def _source(dataset):
    return [
        {"image": image, "label": int(label)}
        for image, label in zip(dataset.images, dataset.labels, strict=True)
    ]


def test_grain_batches_equal_batches_in_memory():
    toy = _toy()
    streamed, in_memory = data.grain_batches(_source(toy), 5, 4), data.batches(toy, 5, 4)
    assert isinstance(streamed, grain.MapDataset)
    for step in (7, 0, 2, 10**6):
        assert_batches_equal(streamed[step], in_memory[step])


def test_grain_batches_resume_at_a_step_with_threads():
    toy = _toy()
    options = grain.ReadOptions(num_threads=3, prefetch_buffer_size=4)
    resumed = iter(data.grain_batches(_source(toy), 5, 4)[6:].to_iter_dataset(options))
    in_memory = data.batches(toy, 5, 4)
    for step in range(6, 16):
        assert_batches_equal(next(resumed), in_memory[step])


def test_grain_batches_transform_each_example():
    def halve(example):
        return example | {"image": example["image"][:1]}

    batch = data.grain_batches(_source(_toy()), 0, 4, transform=halve)[0]
    assert batch["image"].shape == (4, 1, 2, 1)


def test_threads_may_share_batches():
    train, expected = data.batches(_toy(), 0, 7), data.batches(_toy(), 0, 7)
    wrong = []

    def read(first):
        wrong.extend(s for s in range(first, 400, 3) if (train.indices(s) != want[s]).any())

    want = [expected.indices(step) for step in range(400)]
    threads = [threading.Thread(target=read, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda toy: data.batches(toy, 0, 0), "batch_size must be a whole number >= 1, got 0"),
        (lambda toy: data.batches(toy, 0, 2.0),
         r"batch_size must be a whole number >= 1, got 2\.0"),
        (lambda toy: data.batches(toy, -1, 2), "seed must be a whole number >= 0, got -1"),
        (lambda toy: data.batches(toy, True, 2), "seed must be a whole number >= 0, got True"),
        (lambda toy: data.batches(toy, 0, 2)[-1], "step must be a whole number >= 0, got -1"),
        (lambda toy: data.batches(toy, 0, 2)[0.5], r"step must be a whole number >= 0, got 0\.5"),
        (lambda toy: data.batches(toy, 0, 3, host_slice=(0, 2)),
         "batch_size must be a multiple of the 2 hosts, got 3"),
        (lambda toy: data.batches(toy, 0, 4, host_slice=(2, 2)),
         r"host_slice\[0\] must be a whole number in 0\.\.1, got 2"),
        (lambda toy: data.batches(toy, 0, 4, host_slice=2),
         r"host_slice must be \(process_index, process_count\), got 2"),
        (lambda toy: data.batches(toy, 0, 4, shuffle=False, class_balanced=True),
         "shuffle must be True with class_balanced=True, got False"),
        (lambda toy: data.evaluation_batches(toy, 0),
         "batch_size must be a whole number >= 1, got 0"),
        (lambda toy: data.evaluation_batches(toy, 5)[-1],
         "number must be a whole number >= 0, got -1"),
        (lambda toy: data.grain_batches([], 0, 4),
         "number of examples must be a whole number >= 1, got 0"),
    ],
)  # fmt: skip
def test_bad_arguments_get_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(_toy())
    assert "\n" not in str(caught.value)
