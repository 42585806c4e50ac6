"""Where the images of a classification run come from: TFDS and embedded sets, or list files."""

from typing import TYPE_CHECKING

from lpa_jax import data, multihost

if TYPE_CHECKING:
    from experiments.images.settings import Settings

# Image files whose decoded images take at most this many bytes are read into memory once.
_READ_INTO_MEMORY = 2 * 2**30

Images = data.Dataset | data.ImageFiles


def open_splits(settings: "Settings") -> tuple[Images, Images | None]:
    """The training split and the evaluation split; None where it is to be carved from training.

    A validation list is opened where one is published. The test split is opened only when the run
    is evaluated on it.
    """
    if settings.train_list is not None:
        return _listed(settings)
    if settings.published:
        return _published(settings)
    name, size = settings.dataset, settings.image_size
    train = data.load(name, "train", settings.data_dir, size)
    if settings.evaluate_on != "test":
        return train, None
    # ImageNet's published accuracies are those of its validation split: the other has no labels.
    known = data.split_names(name, settings.data_dir)
    split = "validation" if "test" not in known and "validation" in known else "test"
    return train, data.load(name, split, settings.data_dir, size)


def normalization(train: Images, settings: "Settings") -> data.Normalization:
    """That of the training split; of ImageNet for image files, which need not be read for it."""
    if settings.of_files:
        return data.IMAGENET_NORMALIZATION
    return data.Normalization.fit(train.images)


def train_batches(dataset: Images, seed: int, batch_size: int) -> data.Batches | data.Prefetched:
    """This host's training batches by step, read ahead where they come from files."""
    batches = data.batches(dataset, seed, batch_size, host_slice=multihost.host_slice())
    return batches if isinstance(dataset, data.Dataset) else data.read_ahead(batches)


def evaluation_batches(
    dataset: Images, batch_size: int
) -> data.EvaluationBatches | data.Prefetched:
    """This host's evaluation batches by number, read ahead where they come from files."""
    batches = data.evaluation_batches(dataset, batch_size, host_slice=multihost.host_slice())
    return batches if isinstance(dataset, data.Dataset) else data.read_ahead(batches)


def _listed(settings: "Settings") -> tuple[Images, Images | None]:
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
    return _to_train_on(train, settings), _kept(evaluation)


def _published(settings: "Settings") -> tuple[Images, Images | None]:
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
    return train, _kept(opened(settings.evaluate_on)) if has_split else None


def _to_train_on(files: data.ImageFiles, settings: "Settings") -> Images:
    """Files that are cropped at their own size are decoded whenever they are asked for."""
    crop = settings.file_crop
    return _kept(files) if crop is None else files.cropped(crop)


def _kept(files: data.ImageFiles) -> Images:
    return data.in_memory(files) if files.nbytes <= _READ_INTO_MEMORY else files
