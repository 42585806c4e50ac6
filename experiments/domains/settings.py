"""What defines a domain generalization run, apart from its method and seed; and its data."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.methods.names import COMPILED_RUN_OPTIONS
from experiments.training.settings import ImageSettings
from lpa_jax import data, models, optimizers
from lpa_jax.data.domain_folders import FOLDER_SETS

# Up to this many bytes of images a set is decoded once and kept, not read anew in every epoch.
IN_MEMORY_LIMIT = 4 * 2**30
# DomainBed divides small images by 255; photographs it normalises as ImageNet's.
UNIT_RANGE = 255.0


@dataclasses.dataclass(frozen=True)
class DomainSettings(ImageSettings):
    """Settings of a domain generalization run; the flags of the same names explain them."""

    dataset: str = "RotatedMNIST"
    data_dir: str | None = None
    deal_seed: int = 0
    image_size: int | None = None
    images_per_domain: int | None = None
    holdout_fraction: float = 0.2
    model: str = dataclasses.field(default="small_cnn", kw_only=True)
    # DomainBed's for photographs.
    crop_scale: tuple[float, float] = dataclasses.field(default=(0.7, 1.0), kw_only=True)
    jitter: tuple[float, float, float, float] = dataclasses.field(
        default=(0.3, 0.3, 0.3, 0.3), kw_only=True
    )
    train_steps: int = 300
    batch_size: int = 16
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    decay_biases_and_norms: bool = False
    clip_norm: float | None = None
    schedule: str = "constant"
    evaluate_every: int = 50

    @property
    def intervals(self) -> int:
        """Stretches of training between evaluations."""
        return self.train_steps // self.evaluate_every

    def check(self) -> "DomainSettings":
        """Returns itself.

        Raises:
          ValueError: one line naming the first flag that is out of range.
        """
        for name, allowed in (
            ("dataset", data.DOMAIN_SETS),
            ("model", models.names()),
            ("dtype", ("float32", "bfloat16")),
            ("optimizer", optimizers.names()),
            # The step schedule of the other experiments has no place in DomainBed.
            ("schedule", ("constant", "cosine")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"--{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        for name, low in (
            ("deal_seed", 0),
            ("train_steps", 1),
            ("batch_size", 1),
            ("evaluate_every", 1),
            ("learning_rate", 0),
            ("weight_decay", 0),
            ("crop_padding", 0),
        ):
            value = getattr(self, name)
            if not (np.isfinite(value) and value >= low):
                raise ValueError(f"--{name} must be finite and >= {low}, got {value!r}")
        if not 0 < self.holdout_fraction < 1:
            raise ValueError(
                f"--holdout_fraction must lie in (0, 1), got {self.holdout_fraction!r}"
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"--clip_norm must be >= 0, got {self.clip_norm!r}")
        if self.train_steps % self.evaluate_every:
            raise ValueError(
                f"--evaluate_every must divide --train_steps={self.train_steps}, "
                f"got {self.evaluate_every}"
            )
        for name in ("image_size", "images_per_domain"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be >= 1, got {value!r}")
        return self.check_images(of_files=self.dataset in FOLDER_SETS)

    def with_options(self, options: Mapping[str, Any]) -> "DomainSettings":
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
        if self._settings.dataset in FOLDER_SETS:
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
