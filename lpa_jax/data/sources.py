"""Where data sets come from: our own TFDS builders and every TFDS image-classification set.

Reading needs no TensorFlow (`as_data_source` over array_record files). `digits` and `mnist5k` are
prepared on first use from installed packages; every other set is prepared once by `prepare`, which
downloads and needs TensorFlow. TFDS itself prints and logs while it works: here it is kept quiet.
"""

import contextlib
import dataclasses
import importlib.util
import io
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lpa_jax import checks
from lpa_jax.data import optional
from lpa_jax.data.dataset import Dataset
from lpa_jax.data.image_files import ImageFiles, fitted

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

# sets that prepare themselves on first use
EMBEDDED = ("digits", "mnist5k")

_READ_AT_A_TIME = 1024
_IN_MEMORY_LIMIT = 8 * 2**30  # bytes

PathLike = str | os.PathLike


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSource(Sequence):
    """Random access to the labelled images of one split on disk; made by `open_source`.

    Attributes:
      name: The name of the data set.
      num_classes: C.
      class_names: C names.
      image_shape: (H, W, ch); None where images differ.
      split: Name of the split.
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...] = dataclasses.field(repr=False)
    image_shape: tuple[int | None, ...]
    split: str
    _records: Sequence[Mapping[str, Any]] = dataclasses.field(repr=False)
    _keys: tuple[str, str] = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """{"image": [H, W, ch], "label": int32} of one example."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """Several examples, which reads faster than one by one.

        Raises:
          ValueError: The files of the set cannot be read.
        """
        image_key, label_key = self._keys
        try:
            records = self._records.__getitems__(list(indices))
        except Exception as error:  # whatever damaged files make the readers raise
            raise ValueError(
                f"dataset={self.name!r}, split={self.split!r}: cannot be read "
                f"({_first_line(error)})"
            ) from None
        return [{"image": r[image_key], "label": np.int32(r[label_key])} for r in records]


def base_name(name: str) -> str:
    """The name of a data set without configuration and version, spelt as TFDS spells it.

    Example:
      >>> base_name("cifar10:3.0.2"), base_name("Cifar10"), base_name("cifar10_corrupted/fog_1")
      ('cifar10', 'cifar10', 'cifar10_corrupted')
    """
    name = re.split("[:/]", name, maxsplit=1)[0]
    return re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def load(
    name: str, split: str, data_dir: PathLike | None = None, image_size: int | None = None
) -> Dataset:
    """Reads one split of a data set into memory.

    Args:
      name: "digits", "mnist5k", or any TFDS image-classification set ("cifar10", "svhn_cropped",
        ...).
      split: "train", "test", or another split that the set has.
      data_dir: Where TFDS keeps its data; None for its own default (the environment variable
        TFDS_DATA_DIR, or ~/tensorflow_datasets).
      image_size: S, pixels a side of what images that differ in size are made, their central
        square; sets of one size are left as they are.

    Returns:
      A `Dataset`, images as stored (uint8 for nearly every set), examples in the order of the
      files.

    Raises:
      ValueError: An unknown name or split, a set that is not image classification or is not
        prepared (the message has the command), images of several shapes and no `image_size`, or
        more than 8 GiB of them (`open_source` and `grain_batches` serve both).

    Example:
      >>> load("digit", "train")  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ValueError: dataset must be digits, mnist5k or ..., got 'digit' (did you mean 'digits'?)
    """
    return in_memory(open_source(name, split, data_dir), image_size)


def in_memory(source: ImageSource | ImageFiles, image_size: int | None = None) -> Dataset:
    """Reads every image of a source into memory, in its order.

    Args:
      source: What to read.
      image_size: As in `load`.

    Raises:
      ValueError: Images of several shapes and no `image_size`, images that cannot be decoded, or
        more than 8 GiB of them (batches can be read from the source itself).
    """
    where = f"dataset={source.name!r}"
    if isinstance(source, ImageSource):
        where += f", split={source.split!r}"
    size = len(source)
    shape, fit = source.image_shape, False
    if None in shape:
        fit = image_size is not None
        shape = (image_size, image_size, 3) if fit else source[0]["image"].shape
    if size * np.prod(shape) > _IN_MEMORY_LIMIT:
        raise ValueError(
            f"{where}: {size} images of shape {shape} exceed "
            f"{_IN_MEMORY_LIMIT // 2**30} GiB of memory, use open_source and grain_batches"
        )
    images, labels = None, np.empty(size, np.int32)
    for start in range(0, size, _READ_AT_A_TIME):
        try:
            with _quiet_log():
                examples = source.__getitems__(range(start, min(size, start + _READ_AT_A_TIME)))
        except ValueError:
            if isinstance(source, ImageSource):
                raise
            raise ValueError(damage(source, source.damaged())) from None
        for i, example in enumerate(examples, start):
            try:
                image = fitted(example["image"], image_size) if fit else example["image"]
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            if image.shape != shape:
                raise ValueError(
                    f"{where}: has images of shapes {shape} and {image.shape}, "
                    "give image_size, or use open_source and grain_batches"
                )
            if images is None:
                images = np.empty((size, *shape), image.dtype)
            images[i] = image
            labels[i] = example["label"]
    try:
        return Dataset(source.name, images, labels, source.num_classes, source.class_names)
    except ValueError as error:  # a test split without labels, say, or images of 16 bits
        raise ValueError(f"{where}: {error}") from None


def damage(source: ImageFiles, damaged: Mapping[int, str]) -> str:
    """One line about images that cannot be decoded: how many, and the first ten."""
    listed = "; ".join(list(damaged.values())[:10])
    return f"{source.name}: {len(damaged)} of {len(source)} images are damaged: {listed}"


def open_source(name: str, split: str, data_dir: PathLike | None = None) -> ImageSource:
    """Opens one split of a data set for random access, without reading it: for `grain_batches`.

    Args:
      name: As in `load`.
      split: As in `load`.
      data_dir: As in `load`.

    Raises:
      ValueError: As `load`, except that images may have several shapes and any size.
    """
    builder = _builder(name, data_dir)
    image_key, label_key = _keys(name, builder.info)
    if base_name(name) in EMBEDDED:
        builder = _prepare(name, data_dir)
    elif not _is_prepared(builder):
        argument = "" if data_dir is None else f", data_dir={os.fspath(data_dir)!r}"
        command = f'python -c "from lpa_jax import data; data.prepare({name!r}{argument})"'
        raise ValueError(
            f"dataset={name!r}: not prepared in {builder.data_dir}, run once (it downloads, and "
            f"needs `pip install tensorflow-cpu`): {command}"
        )
    info = builder.info
    checks.choice(f"split of {name}", split, sorted(info.splits))
    try:
        records = builder.as_data_source(split)
    except NotImplementedError:
        raise ValueError(
            f"dataset={name!r}: prepared in {builder.data_dir} as {info.file_format.value}, which "
            "cannot be read without TensorFlow; give another data_dir to lpa_jax.data.prepare"
        ) from None
    except Exception as error:  # as in _builder
        raise ValueError(
            f"dataset={name!r}, split={split!r}: cannot be read ({_first_line(error)})"
        ) from None
    label = info.features[label_key]
    return ImageSource(
        name=name,
        num_classes=label.num_classes,
        class_names=tuple(label.names),
        image_shape=tuple(info.features[image_key].shape),
        split=split,
        _records=records,
        _keys=(image_key, label_key),
    )


def split_names(name: str, data_dir: PathLike | None = None) -> tuple[str, ...]:
    """Splits of a data set; none where it is not prepared and TFDS does not know them beforehand.

    Args:
      name: As in `load`.
      data_dir: As in `load`.

    Raises:
      ValueError: An unknown name.
    """
    return tuple(sorted(_builder(name, data_dir).info.splits))


def has_labels(name: str, split: str, data_dir: PathLike | None = None) -> bool:
    """Whether any of 32 examples of a split has a label of a class; hidden ones are -1.

    Args:
      name: As in `load`.
      split: As in `load`.
      data_dir: As in `load`.

    Raises:
      ValueError: As `load`.
    """
    source = open_source(name, split, data_dir)
    places = np.unique(np.linspace(0, len(source) - 1, 32).astype(int)).tolist()
    return any(
        0 <= example["label"] < source.num_classes for example in source.__getitems__(places)
    )


def prepare(name: str, data_dir: PathLike | None = None) -> str:
    """Prepares a data set once for reading without TensorFlow; one that is prepared is left alone.

    Several processes may prepare the same set at once: each writes a folder of its own, the first
    to finish renames it into place, and the others use that one.

    Args:
      name: As in `load`. Only the embedded sets are prepared without a download and TensorFlow.
      data_dir: As in `load`.

    Returns:
      The folder of the prepared set.

    Raises:
      ValueError: An unknown name, a set that is not image classification, or a data_dir that cannot
        be written.
      RuntimeError: TensorFlow is missing, or TFDS failed (the download, most often).
    """
    _keys(name, _builder(name, data_dir).info)
    return os.fspath(_prepare(name, data_dir).data_dir)


def _builder(name: str, data_dir: PathLike | None) -> "tfds.core.DatasetBuilder":
    if not isinstance(name, str) or not name:
        raise ValueError(_unknown(name, EMBEDDED))
    tfds = optional.package("tensorflow_datasets")  # half a second, which other data does not need

    from lpa_jax.data.builders import BUILDERS

    data_dir = None if data_dir is None else os.fspath(data_dir)
    if data_dir is None and not (
        os.environ.get("TFDS_DATA_DIR") or os.path.isabs(os.path.expanduser("~"))
    ):
        raise ValueError("data_dir must be given: neither HOME nor TFDS_DATA_DIR is set")
    try:
        with _quiet_log(), _quiet_preparation():
            if base_name(name) in BUILDERS:
                config, _, version = name.partition(":")
                if "/" in config:
                    raise ValueError("it has no configurations")
                return BUILDERS[base_name(name)](data_dir=data_dir, version=version or None)
            return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        with _quiet_log():
            known = (*EMBEDDED, *tfds.list_builders(with_community_datasets=False))
        raise ValueError(_unknown(name, known)) from None
    except ImportError as error:
        # TFDS wraps the import error in a sentence of its own
        missing = error.name or str(error).rsplit(": ", 1)[-1]
        raise ValueError(
            f"dataset={name!r}: needs a package that is missing or may not be read ({missing})"
        ) from None
    except OSError as error:
        raise ValueError(f"data_dir={data_dir!r}: cannot be read ({error})") from None
    except Exception as error:  # damaged files of a prepared set raise errors of any type
        raise ValueError(f"dataset={name!r}: refused by TFDS ({_first_line(error)})") from None


def _keys(name: str, info: "tfds.core.DatasetInfo") -> tuple[str, str]:
    """The names of the image and the label feature, from the set's supervised keys."""
    import tensorflow_datasets as tfds

    keys = info.supervised_keys
    if (
        keys is not None
        and len(keys) == 2
        and all(isinstance(key, str) and key in info.features for key in keys)
    ):
        # a few sets name the label first
        for image_key, label_key in (keys, keys[::-1]):
            image, label = info.features[image_key], info.features[label_key]
            is_image = isinstance(image, tfds.features.Image | tfds.features.Tensor)
            is_label = isinstance(label, tfds.features.ClassLabel)
            if is_image and is_label and len(image.shape) == 3 and label.num_classes:
                return image_key, label_key
    raise ValueError(f"dataset={name!r}: not image classification (its supervised_keys are {keys})")


def _prepare(name: str, data_dir: PathLike | None) -> "tfds.core.DatasetBuilder":
    """A builder of the prepared set."""
    builder = _builder(name, data_dir)
    if _is_prepared(builder):
        return builder
    if base_name(name) not in EMBEDDED and importlib.util.find_spec("tensorflow") is None:
        raise RuntimeError(
            f"dataset={name!r}: preparing it needs TensorFlow, run `pip install tensorflow-cpu` "
            "(reading it later does not)"
        )
    failure = None
    try:
        with _quiet_log(), _quiet_preparation():
            builder.download_and_prepare(file_format="array_record")
    # whatever went wrong, TensorFlow's own errors included, the set may exist: another process
    # was first, and the rename of our folder failed
    except Exception as error:
        failure = error
    builder = _builder(name, data_dir)
    if _is_prepared(builder):
        return builder
    if base_name(name) in EMBEDDED and isinstance(failure, OSError):
        folder = builder.data_dir if data_dir is None else os.fspath(data_dir)
        raise ValueError(f"data_dir={folder!r}: cannot be written ({failure})") from failure
    reason = f"{type(failure).__name__}: {_first_line(failure)}"
    raise RuntimeError(f"dataset={name!r}: could not be prepared ({reason})") from failure


def _is_prepared(builder: "tfds.core.DatasetBuilder") -> bool:
    with _quiet_log():
        return builder.is_prepared()


def _unknown(name: Any, known: Sequence[str]) -> str:
    sets = f"{', '.join(EMBEDDED)} or a TFDS image-classification set (cifar10, ...)"
    return f"dataset must be {sets}, got {name!r}{checks.nearest(name, known)}"


def _first_line(error: BaseException | None) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no message"


@contextlib.contextmanager
def _quiet_log() -> Iterator[None]:
    """Drops TFDS's log records below errors: it warns of every folder that does not exist yet."""

    def keep(record: logging.LogRecord) -> bool:
        return "tensorflow_datasets" not in record.pathname or record.levelno >= logging.ERROR

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


@contextlib.contextmanager
def _quiet_preparation() -> Iterator[None]:
    """TFDS without prints, progress bars, and imports of the modules that a features.json names.

    Such a module may lie in the folder itself, where that can be imported from the working
    directory. Only TFDS's own features and modules that are imported already are let in.
    """
    from tensorflow_datasets.core.features.feature import FeatureConnector
    from tensorflow_datasets.core.utils import tqdm_utils

    look_up = vars(FeatureConnector)["cls_from_name"]

    def look_up_known(cls: type, class_name: str) -> type:
        module = class_name.rpartition(".")[0]
        if module not in sys.modules and not module.startswith("tensorflow_datasets."):
            raise ValueError(f"features.json names {class_name!r}, which is no feature of TFDS")
        return look_up.__func__(cls, class_name)

    bars_were_on = getattr(tqdm_utils, "_active", True)
    tqdm_utils.display_progress_bar(enable=False)
    FeatureConnector.cls_from_name = classmethod(look_up_known)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        FeatureConnector.cls_from_name = look_up
        tqdm_utils.display_progress_bar(enable=bars_were_on)
