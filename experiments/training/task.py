"""What one network is trained and evaluated on: the data of a run, for any protocol."""

import abc
import concurrent.futures
import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lpa_jax import data, multihost
from lpa_jax.training.loop import TrainBatches

Images = data.Dataset | data.ImageFiles
# Activations of larger batches do not fit into the cache of a CPU.
LARGEST_EVALUATION_BATCH = 500
# Threads that ask for the sizes of files, which takes long on a network disk.
_THREADS = 32


class Length(NamedTuple):
    """The length of a run.

    Attributes:
      epochs: stretches of training, each with a line in the log.
      steps_per_epoch: training steps of a stretch.
      evaluate_every: stretches between two evaluations.
    """

    epochs: int
    steps_per_epoch: int
    evaluate_every: int = 1

    @property
    def total_steps(self) -> int:
        """Training steps of the run."""
        return self.epochs * self.steps_per_epoch


class Task(abc.ABC):
    """The data of a run.

    Attributes:
      num_classes: C.
      image_shape: (H, W, channels).
      normalization: of the images, the same for all seeds.
      counts: training examples of each class, [C].
      num_domains: number of training domains; None if the data have none.
    """

    num_classes: int
    image_shape: tuple[int, int, int]
    normalization: data.Normalization
    counts: tuple[int, ...]
    num_domains: int | None = None

    @abc.abstractmethod
    def length(self, settings: Any) -> Length:
        """The length of a run with these settings."""

    @abc.abstractmethod
    def train_batches(self, settings: Any, seed: int) -> TrainBatches:
        """This host's training batches by step."""

    @abc.abstractmethod
    def evaluation_batches(self) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """This host's evaluation batches, by the name of the evaluation set."""


def intact(files: Images, settings: Any) -> Images:
    """The files without those that cannot be decoded, if --damaged_images=skip; says which."""
    if settings.damaged_images != "skip" or not isinstance(files, data.ImageFiles):
        return files
    damaged = files.damaged()
    if not damaged:
        return files
    if multihost.is_first_host():  # with --quiet, too: the run is on fewer images
        print(f"skipped: {data.damage(files, damaged)}", file=sys.stderr)
    return files.subset([index for index in range(len(files)) if index not in damaged])


def read_ahead(batches: Any, *, files: bool) -> Any:
    """The batches, read by threads while the device computes if the images are files."""
    return data.read_ahead(batches) if files else batches


def evaluation_batches(dataset: Images, batch_size: int) -> Any:
    """This host's batches of an evaluation set by number, read ahead if the images are files."""
    batches = data.evaluation_batches(dataset, batch_size, host_slice=multihost.host_slice())
    return read_ahead(batches, files=isinstance(dataset, data.ImageFiles))


def digests(part: str, dataset: Images) -> dict[str, str]:
    """What tells a data set from a changed one: digests of its images and of its labels.

    Of image files that are not in memory, paths and sizes stand for the images: no file is read.

    Args:
      part: what the names of the digests begin with.
      dataset: the data set.

    >>> two = data.Dataset("two", np.zeros((2, 1, 1, 1), np.uint8), np.array([0, 1]), 2)
    >>> digests("train", two)
    {'train images': '2 of f53990fd6c17a504', 'train labels': '2 of 01acecb507abfe1a'}
    """
    images = hashlib.sha256()
    if isinstance(dataset, data.ImageFiles):
        for path, size in zip(dataset.paths, _sizes(dataset), strict=True):
            images.update(f"{path}\0{size}\n".encode())
    else:
        images.update(f"{dataset.images.dtype} {dataset.images.shape}".encode())
        images.update(np.ascontiguousarray(dataset.images))
    labels = hashlib.sha256(dataset.labels.astype("<i4").tobytes())
    return {
        f"{part} {name}": f"{len(dataset)} of {digest.hexdigest()[:16]}"
        for name, digest in (("images", images), ("labels", labels))
    }


def _sizes(files: data.ImageFiles) -> list[int]:
    def of(paths):
        return [os.stat(os.path.join(files.root, path)).st_size for path in paths]

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        parts = [files.paths[start::_THREADS] for start in range(_THREADS)]
        found = list(pool.map(of, parts))
    return [found[index % _THREADS][index // _THREADS] for index in range(len(files.paths))]


def rounded_up(size: int, devices: int | None = None) -> int:
    """The smallest multiple of the number of devices (None: all) that is not below `size`.

    >>> rounded_up(5, devices=4)
    8
    """
    devices = jax.device_count() if devices is None else devices
    return -(-size // devices) * devices
