"""What defines a classification run, apart from its method and seed: data, training, loss."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import optax

from experiments.methods.build import option_named
from experiments.methods.names import own_options
from experiments.runtime.fields import setting
from experiments.training.settings import RunSettings
from experiments.training.task import Length
from lpa_jax import data, losses, optimizers
from lpa_jax.data import long_tail

EVALUATION_SPLITS = ("test", "validation")
PROFILES = ("none", *long_tail.PROFILES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(RunSettings):
    """Settings of a classification run."""

    dataset: str = setting(
        "mnist5k",
        f"Data set: {', '.join(data.EMBEDDED)} (embedded), or any TFDS image classification set "
        "of up to 8 GiB that is prepared in --data_dir, such as cifar10, cifar100, svhn_cropped; "
        f"{', '.join(data.PUBLISHED)} from the published list files in --data_dir; with "
        "--train_list any name.",
        group="data",
    )
    data_dir: str | None = setting(
        None,
        "Folder of prepared TFDS sets, TFDS's default if unset; or of the published list files.",
        path=True,
        group="data",
    )
    train_list: str | None = setting(
        None,
        "File of training images, one a line: path within --image_root, label.",
        path=True,
        group="data",
    )
    eval_list: str | None = setting(
        None, "With --train_list: the same for the test images.", path=True, group="data"
    )
    image_root: str | None = setting(
        None,
        "Folder of the images that lists name; for published lists --data_dir.",
        path=True,
        group="data",
    )
    image_size: int = setting(
        224,
        "Height and width in pixels of images from lists, and of TFDS images that differ in size.",
        low=1,
        high=2**14,
        group="data",
    )
    evaluate_on: str = setting(
        "test",
        "test, or validation: a part held out from the training split; test images stay unread.",
        allowed=EVALUATION_SPLITS,
        group="data",
    )
    validation_fraction: float = setting(
        0.2, "Share of the training split that validation takes.", above=0, below=1, group="data"
    )
    profile: str = setting(
        "exponential",
        "How the number of images falls from class to class; none keeps the whole set.",
        allowed=PROFILES,
        group="data",
    )
    imbalance: float = setting(
        100.0, "Size of the largest class over the smallest.", low=1, group="data"
    )
    per_class: int | None = setting(
        None,
        "Training images of each class to keep, before any long tail; unset: all.",
        low=1,
        group="data",
    )
    split_seed: int | None = setting(
        None, "Seed of the training subset; unset: the run's own seed.", low=0, group="data"
    )
    epochs: int = setting(
        60, "Passes over the training set.", low=1, high=10**6, instead_of=("train_steps",)
    )
    warmup_epochs: float = setting(0.0, "Epochs of linear warm-up.", low=0, high=10**6)
    milestones: tuple[float, ...] = setting(
        (),
        "Where the step schedule decays, as fractions of the run: 0.3,0.6,0.8.",
        above=0,
        below=1,
    )
    decay_factor: float = setting(
        0.2, "What each milestone multiplies the learning rate by.", above=0, high=1
    )
    loss: str = setting("cross_entropy", "Training loss.", allowed=losses.names)

    @property
    def published(self) -> bool:
        """Whether the data set has published list files."""
        return self.dataset in data.PUBLISHED and self.train_list is None

    @property
    def of_files(self) -> bool:
        """Whether the images are files that a list names."""
        return self.train_list is not None or self.published

    def check(self) -> Self:
        """Returns itself.

        Raises:
          ValueError: one line naming the first flag that is out of bounds or does not fit.
        """
        super().check()
        if self.eval_list is not None and self.train_list is None:
            raise ValueError(f"--eval_list={self.eval_list} needs --train_list")
        if self.image_root is not None and not self.of_files:
            raise ValueError(
                f"--image_root={self.image_root} needs --train_list or --dataset="
                f"{'|'.join(data.PUBLISHED)}"
            )
        if not self.of_files:
            return self
        if self.published and self.data_dir is None:
            first = data.PUBLISHED[self.dataset].lists["train"]
            raise ValueError(f"--data_dir must be the folder that holds {first}, got none")
        if not self.published and self.image_root is None:
            raise ValueError("--image_root must be the folder of --train_list's images, got none")
        if not self.published and self.evaluate_on == "test" and self.eval_list is None:
            raise ValueError("--eval_list must be set with --train_list and --evaluate_on=test")
        if self.profile != "none":
            raise ValueError(
                f"--profile must be none with list files, which fix the number of images of each "
                f"class, got {self.profile!r}"
            )
        return self

    def rate_schedule(self, rate: float | jax.Array, length: Length) -> optax.Schedule:
        """The learning rate by step, whose highest value is `rate`."""
        return optimizers.schedule(
            self.schedule,
            rate,
            total_steps=length.total_steps,
            warmup_steps=round(self.warmup_epochs * length.steps_per_epoch),
            milestones=self.milestones,
            factor=self.decay_factor,
        )

    def default_loss(self, counts: Sequence[int], options: Mapping[str, Any]) -> losses.Loss:
        """The loss of methods without one of their own, whose options are among a method's."""
        with option_named(self.loss):
            return losses.create(self.loss, counts, **own_options(self.loss, options))

    @property
    def loss_needs_counts(self) -> bool:
        """Whether `default_loss` depends on its counts."""
        return self.loss != "cross_entropy"

    def as_dict(self) -> dict[str, Any]:
        """Plain values by name, as `RunSettings.as_dict` gives them."""
        # Runs made while there was a setting of this name can be resumed.
        return super().as_dict() | {"drw_epoch": None}
