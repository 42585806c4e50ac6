"""Where the images of a classification run come from: TFDS and embedded sets, or list files."""

from typing import TYPE_CHECKING

from lpa_jax import data, multihost

if TYPE_CHECKING:
    from experiments.images.settings import Settings

# Image files whose decoded images take at most this many bytes are read into memory once.
_READ_INTO_MEMORY = 2 * 2**30

Images = data.Dataset | data.ImageFiles


def are_listed(settings: "Settings") -> bool:
    """Whether the images are files that a list names."""
    return settings.train_list is not None or _is_published(settings)


def check_flags(settings: "Settings") -> None:
    """Refuses list flags that do not fit together.

    Raises:
      ValueError: naming the flag.
    """
    published, listed = _is_published(settings), are_listed(settings)
    if settings.eval_list is not None and settings.train_list is None:
        raise ValueError(f"--eval_list={settings.eval_list} needs --train_list")
    if settings.image_root is not None and not listed:
        raise ValueError(
            f"--image_root={settings.image_root} needs --train_list or --dataset="
            f"{'|'.join(data.PUBLISHED)}"
        )
    if settings.image_size < 1:
        raise ValueError(f"--image_size must be >= 1, got {settings.image_size!r}")
    if not listed:
        return
    if published and settings.data_dir is None:
        first = data.PUBLISHED[settings.dataset].lists["train"]
        raise ValueError(f"--data_dir must be the folder that holds {first}, got none")
    if not published and settings.image_root is None:
        raise ValueError("--image_root must be the folder that --train_list starts from, got none")
    if not published and settings.evaluate_on == "test" and settings.eval_list is None:
        raise ValueError("--eval_list must be set with --train_list and --evaluate_on=test")
    if settings.profile != "none":
        raise ValueError(
            f"--profile must be none with list files, which say how many images a class has; "
            f"got {settings.profile!r}"
        )


def open_splits(settings: "Settings") -> tuple[Images, Images | None]:
    """The training split and the evaluation split; None where it is to be carved from training.

    A validation list is opened where one is published. The test split is opened only when the run
    is evaluated on it.
    """
    if settings.train_list is not None:
        return _listed(settings)
    if settings.dataset in data.PUBLISHED:
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
    if are_listed(settings):
        return data.IMAGENET_NORMALIZATION
    return data.Normalization.fit(train.images)


def train_batches(dataset: Images, seed: int, batch_size: int) -> data.Batches | data.ReadAhead:
    """This host's training batches by step, read ahead where they come from files."""
    batches = data.batches(dataset, seed, batch_size, host_slice=multihost.host_slice())
    return batches if isinstance(dataset, data.Dataset) else data.read_ahead(batches)


def evaluation_batches(dataset: Images, batch_size: int) -> data.EvaluationBatches | data.ReadAhead:
    """This host's evaluation batches by number, read ahead where they come from files."""
    batches = data.evaluation_batches(dataset, batch_size, host_slice=multihost.host_slice())
    return batches if isinstance(dataset, data.Dataset) else data.read_ahead(batches)


def _is_published(settings: "Settings") -> bool:
    return settings.dataset in data.PUBLISHED and settings.train_list is None


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
