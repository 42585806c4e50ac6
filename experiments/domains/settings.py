"""What defines a domain generalization run, apart from its method and seed."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from experiments.methods.names import COMPILED_RUN_OPTIONS
from experiments.runtime.fields import changed, setting
from experiments.training.settings import RunSettings
from lpa_jax import data
from lpa_jax.data.domain_folders import FOLDER_SETS


@dataclasses.dataclass(frozen=True, kw_only=True)
class DomainSettings(RunSettings):
    """Settings of a domain generalization run."""

    dataset: str = setting(
        "RotatedMNIST",
        "RotatedMNIST and ColoredMNIST are embedded, with 5000 images; the others are read from "
        "--data_dir, in DomainBed's folders.",
        allowed=data.DOMAIN_SETS,
        group="data",
    )
    data_dir: str | None = setting(
        None, "Folder that holds the data set's folder.", path=True, group="data"
    )
    deal_seed: int = setting(
        0,
        "Seed that assigns MNIST's images to domains; the same for all runs.",
        low=0,
        group="data",
    )
    image_size: int | None = setting(
        None,
        "Height and width in pixels; unset: DomainBed's, 28 or 224.",
        low=1,
        high=2**14,
        group="data",
    )
    images_per_domain: int | None = setting(
        None, "Images of every domain to use; unset: all. For quick trials.", low=1, group="data"
    )
    holdout_fraction: float = setting(
        0.2, "Share of every domain that validation takes.", above=0, below=1, group="data"
    )
    model: str = changed(RunSettings, "model", "small_cnn")
    # DomainBed's for photographs.
    crop_scale: tuple[float, float] = changed(RunSettings, "crop_scale", (0.7, 1.0))
    jitter: tuple[float, float, float, float] = changed(RunSettings, "jitter", (0.3, 0.3, 0.3, 0.3))
    train_steps: int = setting(
        300, "Steps of training; DomainBed: 5000.", low=1, high=10**9, instead_of=("epochs",)
    )
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
