"""What defines a domain generalization run, apart from its method and seed; and its data."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from experiments.methods.names import COMPILED_RUN_OPTIONS
from experiments.runtime.fields import changed, setting
from experiments.training.settings import RunSettings
from lpa_jax import data
from lpa_jax.data.domain_folders import FOLDER_SETS

# Up to this many bytes of images a set is decoded once and kept, not read anew in every epoch.
IN_MEMORY_LIMIT = 4 * 2**30
# DomainBed divides small images by 255; photographs it normalises as ImageNet's.
UNIT_RANGE = 255.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DomainSettings(RunSettings):
    """Settings of a domain generalization run."""

    dataset: str = setting(
        "RotatedMNIST",
        "RotatedMNIST and ColoredMNIST are embedded, with 5000 images; the others are read from "
        "--data_dir, in DomainBed's folders.",
        allowed=data.DOMAIN_SETS,
    )
    data_dir: str | None = setting(None, "Folder that holds the data set's folder.")
    deal_seed: int = setting(
        0, "Seed that assigns MNIST's images to domains; the same for all runs.", low=0
    )
    image_size: int | None = setting(
        None,
        "Height and width in pixels; unset: DomainBed's, 28 or 224.",
        low=1,
        high=2**14,
    )
    images_per_domain: int | None = setting(
        None, "Images of every domain to use; unset: all. For quick trials.", low=1
    )
    holdout_fraction: float = setting(
        0.2, "Share of every domain that validation takes.", above=0, below=1
    )
    model: str = changed(RunSettings, "model", "small_cnn")
    # DomainBed's for photographs.
    crop_scale: tuple[float, float] = changed(RunSettings, "crop_scale", (0.7, 1.0))
    jitter: tuple[float, float, float, float] = changed(RunSettings, "jitter", (0.3, 0.3, 0.3, 0.3))
    train_steps: int = setting(300, "Steps of training; DomainBed: 5000.", low=1, high=10**9)
    batch_size: int = changed(
        RunSettings,
        "batch_size",
        16,
        help="Examples of EACH training domain in a step; DomainBed: 32, MNIST 64.",
    )
    optimizer: str = changed(
        RunSettings, "optimizer", "adamw", help="Optimizer; adamw without weight decay is Adam."
    )
    learning_rate: float = changed(
        RunSettings,
        "learning_rate",
        1e-3,
        help="Unset: tuned or drawn, else DomainBed's 1e-3 (MNIST) or 5e-5.",
    )
    weight_decay: float = changed(
        RunSettings, "weight_decay", 0.0, help="Unset: tuned or drawn, else 0."
    )
    clip_norm: float | None = changed(RunSettings, "clip_norm", None, flag_default=0.0)
    schedule: str = changed(
        RunSettings,
        "schedule",
        "constant",
        help="Learning rate schedule; DomainBed has none.",
        # The step schedule goes by epochs, which DomainBed's protocol does not count.
        allowed=("constant", "cosine"),
    )
    evaluate_every: int = changed(
        RunSettings,
        "evaluate_every",
        50,
        help="Steps between checkpoints; must divide --train_steps.",
    )

    @property
    def of_files(self) -> bool:
        """Whether the images are files, in DomainBed's folders."""
        return self.dataset in FOLDER_SETS

    @property
    def intervals(self) -> int:
        """Stretches of training between evaluations."""
        return self.train_steps // self.evaluate_every

    def check(self) -> Self:
        """Returns itself.

        Raises:
          ValueError: one line naming the first flag that is out of bounds or does not fit.
        """
        super().check()
        if self.train_steps % self.evaluate_every:
            raise ValueError(
                f"--evaluate_every must divide --train_steps={self.train_steps}, "
                f"got {self.evaluate_every}"
            )
        return self

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """These settings, batch size and dropout being a method's own if it has them.

        Raises:
          ValueError: one line naming the first that is out of range.
        """
        own = {name: options[name] for name in COMPILED_RUN_OPTIONS if name in options}
        return dataclasses.replace(self, **own).check() if own else self

    def as_dict(self) -> dict[str, Any]:
        """Plain values by name, without where the data lie."""
        return super().as_dict() | {"data_dir": None}


class Split(NamedTuple):
    """The two parts of a domain.

    Attributes:
      inside: trained on, or tested on where the domain is held out (DomainBed's "in").
      outside: the holdout, for validation (DomainBed's "out").
    """

    inside: data.Dataset | data.ImageFiles
    outside: data.Dataset | data.ImageFiles


class DomainSource:
    """Loads the domains once and splits each for every seed."""

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
        datasets = [self._reduced(dataset) for dataset in domains.datasets]
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

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, channels)."""
        return self._datasets[0].image_shape

    @property
    def on_disk(self) -> bool:
        """Whether images are decoded whenever they are asked for."""
        return any(isinstance(dataset, data.ImageFiles) for dataset in self._datasets)

    @property
    def normalization(self) -> data.Normalization:
        """The same for all domains, whichever is held out: nothing is fitted to the data."""
        if self._settings.of_files:
            return data.IMAGENET_NORMALIZATION
        channels = self.image_shape[-1]
        return data.Normalization((0.0,) * channels, (UNIT_RANGE,) * channels)

    def splits(self, seed: int) -> dict[str, Split]:
        """Every domain's two parts, by its name; a pure function of the seed."""
        return {
            name: Split(*(dataset.subset(indices) for indices in self._indices(seed, number)))
            for number, (name, dataset) in enumerate(zip(self.names, self._datasets, strict=True))
        }

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

    def _reduced(self, dataset: data.Dataset | data.ImageFiles) -> data.Dataset | data.ImageFiles:
        """Evenly spaced images: of sets sorted by class, all classes."""
        wanted = self._settings.images_per_domain
        if wanted is None:
            return dataset
        if wanted > len(dataset):
            raise ValueError(
                f"--images_per_domain={wanted}: {dataset.name} has {len(dataset)} images"
            )
        return dataset.subset(np.arange(wanted) * len(dataset) // wanted)


def _in_memory(datasets: Sequence[data.Dataset | data.ImageFiles]) -> list[Any]:
    files = [dataset for dataset in datasets if isinstance(dataset, data.ImageFiles)]
    if not files or sum(file.nbytes for file in files) > IN_MEMORY_LIMIT:
        return list(datasets)
    return [data.in_memory(dataset) for dataset in datasets]
