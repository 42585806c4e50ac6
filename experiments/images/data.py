"""The data of a classification run: TFDS and embedded sets, or images that list files name."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from experiments.images.settings import Settings
from experiments.training.task import (
    LARGEST_EVALUATION_BATCH,
    Images,
    Length,
    Task,
    digests,
    evaluation_batches,
    intact,
    read_ahead,
    rounded_up,
)
from lpa_jax import data, multihost

# Image files whose decoded images take at most this many bytes are read into memory once.
_READ_INTO_MEMORY = 2 * 2**30


@dataclasses.dataclass(frozen=True)
class ImageTask(Task):
    """The data of one run.

    Attributes:
      train: training set, long-tailed if the settings say so.
      evaluation: test or validation set.
      normalization: of the images, the same for all seeds.
      train_indices: positions of the training examples in the training split.
      digests: of the training split and of the test split, if it is opened; see `digests`.
    """

    train: Images
    evaluation: Images
    normalization: data.Normalization
    train_indices: np.ndarray
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """C."""
        return self.train.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, channels)."""
        return self.train.image_shape

    @property
    def counts(self) -> tuple[int, ...]:
        """Training examples of each class, [C]."""
        return tuple(int(count) for count in self.train.counts)

    def length(self, settings: Settings) -> Length:
        """Epochs are passes over the training set."""
        steps_per_epoch = -(-len(self.train) // settings.batch_size)
        return Length(settings.epochs, steps_per_epoch, settings.evaluate_every)

    def train_batches(self, settings: Settings, seed: int) -> data.Batches | data.Prefetched:
        """This host's training batches by step."""
        batches = data.batches(
            self.train, seed, settings.batch_size, host_slice=multihost.host_slice()
        )
        return read_ahead(batches, files=isinstance(self.train, data.ImageFiles))

    def evaluation_batches(self) -> dict[str, data.EvaluationBatches | data.Prefetched]:
        """This host's batches of the one set, named "evaluation"."""
        size = rounded_up(min(len(self.evaluation), LARGEST_EVALUATION_BATCH))
        return {"evaluation": evaluation_batches(self.evaluation, size)}


class TaskSource:
    """Loads a data set once and makes the task of every seed from it.

    With `evaluate_on="validation"` the test split is never opened. If no validation list is
    published, a validation set is taken from the training split first, and the long-tailed training
    set from the rest.

    Attributes:
      digests: of the data, see `digests`.
    """

    def __init__(self, settings: Settings):
        self._settings = settings
        self._pool, self._evaluation = open_splits(settings)
        self._normalization = normalization(self._pool, settings)
        self.digests = digests("train", self._pool)
        if self._evaluation is not None:
            self.digests |= digests(settings.evaluate_on, self._evaluation)

    @property
    def pool(self) -> Images:
        """The whole training split."""
        return self._pool

    def task(self, seed: int) -> ImageTask:
        """The task of a seed; its split follows the seed unless `--split_seed` fixes it."""
        settings, labels = self._settings, self._pool.labels
        split_seed = seed if settings.split_seed is None else settings.split_seed
        available = np.arange(len(labels))
        evaluation = self._evaluation
        if evaluation is None:
            available, held_out = data.validation_split(
                labels, fraction=settings.validation_fraction, seed=split_seed
            )
            evaluation = self._pool.subset(held_out)
        if settings.per_class is not None:
            kept = data.reduced_indices(labels[available], settings.per_class, seed=split_seed)
            available = available[kept]
        if settings.profile != "none":
            chosen = data.long_tail_indices(
                labels[available],
                num_classes=self._pool.num_classes,
                profile=settings.profile,
                imbalance=settings.imbalance,
                seed=split_seed,
            )
            available = available[chosen]
        train = self._pool.subset(available)
        return ImageTask(train, evaluation, self._normalization, available, self.digests)


def open_splits(settings: Settings) -> tuple[Images, Images | None]:
    """The training and the evaluation split; None if it must be taken from the training split.

    A published validation list is opened. The test split is opened only if the run is evaluated on
    it.
    """
    if settings.train_list is not None:
        return _listed(settings)
    if settings.published:
        return _published(settings)
    name, size = settings.dataset, settings.image_size
    try:
        train = data.load(name, "train", settings.data_dir, size)
    except ValueError as error:
        if "not prepared in" not in str(error):
            raise
        raise ValueError(f"{error}; or give --prepare once") from None
    if settings.evaluate_on != "test":
        return train, None
    # As with ImageNet, whose published accuracies are those of its validation split, a test split
    # may be missing or have no labels.
    known, split = data.split_names(name, settings.data_dir), "test"
    if "validation" in known and not (
        "test" in known and data.has_labels(name, "test", settings.data_dir)
    ):
        split = "validation"
    return train, data.load(name, split, settings.data_dir, size)


def normalization(train: Images, settings: Settings) -> data.Normalization:
    """Fitted to the training split; ImageNet's for image files, which need not be read for it."""
    if settings.of_files:
        return data.IMAGENET_NORMALIZATION
    return data.Normalization.fit(train.images)


def _listed(settings: Settings) -> tuple[Images, Images | None]:
    train = data.read_list(
        settings.train_list,
        settings.image_root,
        all_classes=True,
        name=settings.dataset,
        image_size=settings.image_size,
    )
    if settings.evaluate_on != "test":
        return _to_train_on(train, settings), None
    evaluation = data.read_list(
        settings.eval_list,
        settings.image_root,
        num_classes=train.num_classes,
        name=settings.dataset,
        image_size=settings.image_size,
    )
    return _to_train_on(train, settings), _kept(evaluation, settings)


def _published(settings: Settings) -> tuple[Images, Images | None]:
    def opened(split: str) -> data.ImageFiles:
        return data.open_published(
            settings.dataset,
            split,
            settings.data_dir,
            image_root=settings.image_root,
            image_size=settings.image_size,
        )

    has_split = settings.evaluate_on in data.PUBLISHED[settings.dataset].lists
    train = _to_train_on(opened("train"), settings)
    return train, _kept(opened(settings.evaluate_on), settings) if has_split else None


def _to_train_on(files: data.ImageFiles, settings: Settings) -> Images:
    """Files that are cropped at their own size are decoded in every epoch."""
    crop = settings.file_crop
    return _kept(files, settings) if crop is None else intact(files, settings).cropped(crop)


def _kept(files: data.ImageFiles, settings: Settings) -> Images:
    files = intact(files, settings)
    return data.in_memory(files) if files.nbytes <= _READ_INTO_MEMORY else files
