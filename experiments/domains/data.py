"""The data of domain generalization: domains, their holdouts, and tasks without some domains."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.domains.settings import DomainSettings
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

# A set whose images take up to this many bytes is decoded once and kept in memory.
IN_MEMORY_LIMIT = 4 * 2**30
# DomainBed divides small images by 255; it normalises photographs as ImageNet's.
UNIT_RANGE = 255.0
# DomainBed's names of the two parts of a domain; evaluation sets are named PART/DOMAIN.
IN, OUT = "in", "out"


class Split(NamedTuple):
    """The two parts of a domain.

    Attributes:
      inside: for training, or for testing if the domain is held out (DomainBed's "in").
      outside: the holdout, for validation (DomainBed's "out").
    """

    inside: Images
    outside: Images


class DomainSource:
    """Loads the domains once and splits each of them for every seed.

    Attributes:
      names: of the domains.
      num_classes: C.
      digests: of the data, see `digests`.
    """

    def __init__(self, settings: DomainSettings):
        self._settings = settings
        domains = data.load_domains(
            settings.dataset,
            settings.data_dir,
            seed=settings.deal_seed,
            image_size=settings.image_size,
        )
        self.names = domains.domain_names
        self.num_classes = domains.num_classes
        datasets = [self._reduced(intact(dataset, settings)) for dataset in domains.datasets]
        crop = settings.file_crop
        self._datasets = (
            _in_memory(datasets) if crop is None else [files.cropped(crop) for files in datasets]
        )
        for name, dataset in zip(self.names, self._datasets, strict=True):
            if int(settings.holdout_fraction * len(dataset)) < 1:
                raise ValueError(
                    f"--holdout_fraction={settings.holdout_fraction} leaves no held-out image of "
                    f"the {len(dataset)} of domain {name!r}"
                )
        self.digests: dict[str, str] = {}
        for name, dataset in zip(self.names, self._datasets, strict=True):
            self.digests |= digests(name, dataset)
        # Only the data of one seed are in use at a time.
        self.splits = functools.lru_cache(maxsize=1)(self._splits)
        self.evaluation_batches = functools.lru_cache(maxsize=1)(self._evaluation_batches)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, channels)."""
        return self._datasets[0].image_shape

    @property
    def training_sizes(self) -> list[int]:
        """Images to train on of each domain."""
        share = 1 - self._settings.holdout_fraction
        return [round(share * len(dataset)) for dataset in self._datasets]

    @property
    def on_disk(self) -> bool:
        """Whether images are decoded each time that they are used."""
        return any(isinstance(dataset, data.ImageFiles) for dataset in self._datasets)

    @property
    def normalization(self) -> data.Normalization:
        """The same whichever domain is held out: nothing is fitted to the data."""
        if self._settings.of_files:
            return data.IMAGENET_NORMALIZATION
        channels = self.image_shape[-1]
        return data.Normalization((0.0,) * channels, (UNIT_RANGE,) * channels)

    def task(
        self, seed: int, held_out: Sequence[str], look_at_held_out: bool = True
    ) -> "DomainTask":
        """The task of training without some domains.

        Args:
          seed: of the holdouts.
          held_out: names of the domains that are not trained on.
          look_at_held_out: whether to evaluate on held-out domains and on training images, too.
        """
        return DomainTask(self, seed, tuple(held_out), look_at_held_out)

    def _splits(self, seed: int) -> dict[str, Split]:
        """Every domain's two parts, by its name; a pure function of the seed."""
        return {
            name: Split(*(dataset.subset(indices) for indices in self._indices(seed, number)))
            for number, (name, dataset) in enumerate(zip(self.names, self._datasets, strict=True))
        }

    def _evaluation_batches(self, seed: int) -> dict[str, Sequence[Mapping[str, Any]]]:
        """This host's batches of every part of every domain, by PART/DOMAIN."""
        parts = {
            f"{part}/{name}": dataset
            for name, split in self.splits(seed).items()
            for part, dataset in ((IN, split.inside), (OUT, split.outside))
        }
        size = evaluation_batch_size([len(dataset) for dataset in parts.values()])
        return {name: evaluation_batches(dataset, size) for name, dataset in parts.items()}

    def counts(self, seed: int, held_out: Sequence[str]) -> tuple[int, ...]:
        """Training images of each class, in all domains that are not held out."""
        total = np.zeros(self.num_classes, np.int64)
        for number, (name, dataset) in enumerate(zip(self.names, self._datasets, strict=True)):
            if name not in held_out:
                labels = dataset.labels[self._indices(seed, number)[0]]
                total += np.bincount(labels, minlength=self.num_classes)
        return tuple(total.tolist())

    def _indices(self, seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        size = len(self._datasets[number])
        return data.holdout_split(size, self._settings.holdout_fraction, seed, number)

    def _reduced(self, dataset: Images) -> Images:
        """Evenly spaced images, so that a set sorted by class keeps all classes."""
        wanted = self._settings.images_per_domain
        if wanted is None:
            return dataset
        if wanted > len(dataset):
            raise ValueError(
                f"--images_per_domain={wanted}: {dataset.name} has {len(dataset)} images"
            )
        return dataset.subset(np.arange(wanted) * len(dataset) // wanted)


@dataclasses.dataclass(frozen=True)
class DomainTask(Task):
    """Training on all domains but some, evaluated on all; see `DomainSource.task`."""

    source: DomainSource
    seed: int
    held_out: tuple[str, ...]
    look_at_held_out: bool

    @property
    def num_classes(self) -> int:
        """C."""
        return self.source.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, channels)."""
        return self.source.image_shape

    @property
    def normalization(self) -> data.Normalization:
        """Of the images, the same for all seeds."""
        return self.source.normalization

    @property
    def num_domains(self) -> int:
        """D, the number of training domains."""
        return len(self.source.names) - len(self.held_out)

    @property
    def counts(self) -> tuple[int, ...]:
        """Training examples of each class, [C]."""
        return self.source.counts(self.seed, self.held_out)

    def length(self, settings: DomainSettings) -> Length:
        """Epochs are the stretches between two evaluations."""
        return Length(settings.intervals, settings.evaluate_every)

    def train_batches(self, settings: DomainSettings, seed: int) -> "_Intervals":
        """This host's training batches by step, each with equally many images of every domain."""
        splits = self.source.splits(self.seed)
        inside = [split.inside for name, split in splits.items() if name not in self.held_out]
        batches = data.domain_batches(
            inside, seed, settings.batch_size, host_slice=multihost.host_slice()
        )
        batches = read_ahead(batches, files=self.source.on_disk)
        return _Intervals(batches, settings.evaluate_every)

    def evaluation_batches(self) -> dict[str, Sequence[Mapping[str, Any]]]:
        """This host's batches by PART/DOMAIN."""
        unseen = {f"{OUT}/{name}" for name in self.source.names if name not in self.held_out}
        return {
            name: batches
            for name, batches in self.source.evaluation_batches(self.seed).items()
            if self.look_at_held_out or name in unseen
        }


@dataclasses.dataclass(frozen=True)
class _Intervals:
    """Training batches whose epoch is the stretch between two evaluations."""

    batches: data.DomainBatches | data.Prefetched
    steps_per_epoch: int

    def __getitem__(self, step: int) -> Mapping[str, np.ndarray]:
        return self.batches[step]


def evaluation_batch_size(sizes: Sequence[int], devices: int | None = None) -> int:
    """The batch size of at most 500 that evaluates the least padding.

    Args:
      sizes: sizes of the evaluation sets.
      devices: the batch size is a multiple of it; None: the number of all devices.

    >>> evaluation_batch_size([667, 166], devices=1)
    167
    """
    step = rounded_up(1, devices)
    largest = rounded_up(min(max(sizes), LARGEST_EVALUATION_BATCH), devices)
    candidates = range(largest, max(largest // 4, step - 1), -step)
    return min(candidates, key=lambda batch: sum(-(-size // batch) * batch for size in sizes))


def _in_memory(datasets: Sequence[Images]) -> list[Images]:
    files = [dataset for dataset in datasets if isinstance(dataset, data.ImageFiles)]
    if not files or sum(file.nbytes for file in files) > IN_MEMORY_LIMIT:
        return list(datasets)
    return [data.in_memory(dataset) for dataset in datasets]
