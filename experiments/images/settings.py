"""What defines a run, apart from its method and seed: data, model, optimiser, loss."""

import dataclasses

import numpy as np

from experiments.images import data as task_data
from experiments.training.settings import ImageSettings
from lpa_jax import data, losses, metrics, models, optimizers
from lpa_jax.data import long_tail

EVALUATION_SPLITS = ("test", "validation")
PROFILES = ("none", *long_tail.PROFILES)


@dataclasses.dataclass(frozen=True)
class Settings(ImageSettings):
    """Settings of a classification run; the flags of the same names explain them."""

    dataset: str = "mnist5k"
    data_dir: str | None = None
    train_list: str | None = None
    eval_list: str | None = None
    image_root: str | None = None
    image_size: int = 224
    evaluate_on: str = "test"
    validation_fraction: float = 0.2
    profile: str = "exponential"
    imbalance: float = 100.0
    per_class: int | None = None
    split_seed: int | None = None
    epochs: int = 60
    batch_size: int = 64
    optimizer: str = "sgd"
    learning_rate: float = 0.02
    weight_decay: float = 5e-4
    decay_biases_and_norms: bool = False
    clip_norm: float | None = 5.0
    schedule: str = "cosine"
    warmup_epochs: float = 0.0
    milestones: tuple[float, ...] = ()
    decay_factor: float = 0.2
    loss: str = "cross_entropy"
    drw_epoch: int | None = None
    evaluate_every: int = 5

    def check(self) -> "Settings":
        """Returns itself.

        Raises:
          ValueError: one line naming the first flag that is out of range.
        """
        for name, allowed in (
            ("evaluate_on", EVALUATION_SPLITS),
            ("profile", PROFILES),
            ("model", models.names()),
            ("dtype", ("float32", "bfloat16")),
            ("optimizer", optimizers.names()),
            ("schedule", optimizers.SCHEDULES),
            ("loss", losses.names()),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"--{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        for name, low in (
            ("epochs", 1),
            ("batch_size", 1),
            ("evaluate_every", 1),
            ("imbalance", 1),
            ("learning_rate", 0),
            ("weight_decay", 0),
            ("warmup_epochs", 0),
            ("crop_padding", 0),
        ):
            value = getattr(self, name)
            if not (np.isfinite(value) and value >= low):
                raise ValueError(f"--{name} must be finite and >= {low}, got {value!r}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"--validation_fraction must lie in (0, 1), got {self.validation_fraction!r}"
            )
        if self.per_class is not None and self.per_class < 1:
            raise ValueError(f"--per_class must be >= 1, got {self.per_class!r}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"--clip_norm must be > 0 or none, got {self.clip_norm!r}")
        if self.drw_epoch is not None and not 0 < self.drw_epoch < self.epochs:
            raise ValueError(
                f"--drw_epoch must lie in 1..{self.epochs - 1} (--epochs - 1), "
                f"got {self.drw_epoch!r}"
            )
        if self.drw_epoch is not None and self.loss != "ldam":
            raise ValueError(f"--drw_epoch needs --loss=ldam, got --loss={self.loss}")
        task_data.check_flags(self)
        return self.check_images(of_files=task_data.are_listed(self))


@dataclasses.dataclass(frozen=True)
class Task:
    """The data of one run.

    Attributes:
      train: training set, long-tailed if the settings say so.
      evaluation: test or validation set.
      normalization: the same for all seeds.
      train_indices: where the training examples stand in the training split.
    """

    train: task_data.Images
    evaluation: task_data.Images
    normalization: data.Normalization
    train_indices: np.ndarray

    @property
    def counts(self) -> tuple[int, ...]:
        """Training examples of each class."""
        return tuple(int(count) for count in self.train.counts)


class TaskSource:
    """Loads a data set once and cuts the task of every seed from it.

    With `evaluate_on="validation"` the test split is never opened: where no validation list is
    published, a validation set is carved from the training split first, and the long-tailed
    training set is cut from what is left.
    """

    def __init__(self, settings: Settings):
        self._settings = settings
        self._pool, self._evaluation = task_data.open_splits(settings)
        self._normalization = task_data.normalization(self._pool, settings)

    @property
    def pool(self) -> task_data.Images:
        """The whole training split."""
        return self._pool

    def task(self, seed: int) -> Task:
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
        return Task(train, evaluation, self._normalization, available)


def shot_groups(counts: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Many/medium/few classes by the usual thresholds, by thirds where one group would be empty.

    Classes of equal size fall into no groups.

    >>> shot_groups((50, 50))
    {}
    """
    if len(set(counts)) == 1:
        return {}
    groups = metrics.shot_groups(counts)
    if all(members.any() for members in groups.values()):
        return groups
    return metrics.shot_groups_by_thirds(counts)
