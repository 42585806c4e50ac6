"""What both protocols say about a network that sees images: its weights and its augmentation."""

import dataclasses
import functools
from typing import Any, Self

import jax
import numpy as np

from lpa_jax import data, models, parallel
from lpa_jax.data import augment
from lpa_jax.injection.accumulation import accumulate
from lpa_jax.models.base import HEADS
from lpa_jax.models.pretrained import Weights, convert

# The augmentation that is not done on the device: a random crop of a file before it is resized.
FILE_CROP = "file_crop"
# Earlier runs were made without these settings: at their defaults they are not written.
_LATER = (
    "head",
    "model_dropout",
    "crop_scale",
    "jitter",
    "grayscale_probability",
    "pretrained",
    "freeze_batch_norm",
    "accumulate",
    "sync_batch_norm",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """Settings of the network and of augmentation; the flags of the same names explain them."""

    model: str = "mlp"
    dtype: str = "float32"
    head: str = "linear"
    model_dropout: float = 0.0
    pretrained: Weights | None = None
    freeze_batch_norm: bool = False
    accumulate: int = 1
    sync_batch_norm: bool = False
    augmentation: str = "none"
    crop_padding: int = 2
    crop_scale: tuple[float, float] = (0.08, 1.0)
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.0)
    grayscale_probability: float = 0.1

    def check_images(self, of_files: bool) -> Self:
        """Returns itself.

        Args:
          of_files: whether the images are files.

        Raises:
          ValueError: one line naming the first flag that is out of range.
        """
        if self.head not in HEADS:
            raise ValueError(f"--head must be one of {', '.join(HEADS)}, got {self.head!r}")
        if self.model_dropout:
            _named("model_dropout", lambda: self.network(2))
        if self.freeze_batch_norm and self.pretrained is None:
            raise ValueError(
                "--freeze_batch_norm needs --pretrained: without, norms have no statistics to keep"
            )
        if self.freeze_batch_norm:
            _named("freeze_batch_norm", lambda: self.network(2))
        if self.freeze_batch_norm and self.sync_batch_norm:
            raise ValueError("--sync_batch_norm: --freeze_batch_norm leaves nothing to synchronise")
        if self.accumulate < 1:
            raise ValueError(f"--accumulate must be >= 1, got {self.accumulate}")
        if len(self.jitter) != 4:
            raise ValueError(f"--jitter must be four numbers, got {self.jitter!r}")
        for name, build in (
            ("crop_scale", lambda: augment.random_resized_crop(self.crop_scale)),
            ("jitter", lambda: augment.color_jitter(*self.jitter)),
            ("grayscale_probability", lambda: augment.grayscale(self.grayscale_probability)),
            ("augmentation", self._augmentation),
        ):
            _named(name, build)
        if self.file_crop is not None and not of_files:
            raise ValueError(
                f"--augmentation: {FILE_CROP} crops image files before they are resized, and "
                "these images are none; resized_crop crops any"
            )
        return self

    def network(self, num_classes: int, **options: Any) -> models.StagedModel:
        """The model.

        Raises:
          ValueError: it has no option of that name.
        """
        if self.freeze_batch_norm:
            options["frozen_norm"] = True
        if self.model_dropout:
            options["dropout"] = self.model_dropout
        options |= {"dtype": self.dtype, "head": self.head}
        return models.create(self.model, num_classes, **options)

    def over_devices(self, model: models.StagedModel, examples: int) -> Any:
        """The model as it is trained: its batch norms synchronised, its passes in parts.

        Args:
          model: as `network` makes it.
          examples: of a step, on all devices.

        Raises:
          ValueError: --sync_batch_norm does not fit the model, or --batch_size or --accumulate the
            devices.
        """
        share, rest = divmod(examples, jax.device_count())
        if rest:
            raise ValueError(
                f"--batch_size: the {examples} examples of a step do not split evenly over "
                f"{jax.device_count()} devices"
            )
        if share % self.accumulate:
            raise ValueError(
                f"--accumulate={self.accumulate} must divide the {share} examples that a device "
                "takes in a step"
            )
        if self.sync_batch_norm:
            options = {"axis_name": parallel.batch_axis()}
            model = _named("sync_batch_norm", lambda: self.network(model.num_classes, **options))
        return accumulate(model, self.accumulate)

    def initial_variables(
        self, model: models.StagedModel, image_shape: tuple[int, ...]
    ) -> dict[str, Any] | None:
        """Pretrained variables of the model, or None.

        Raises:
          ValueError: --pretrained does not fit it.
        """
        if self.pretrained is None:
            return None
        return _named("pretrained", lambda: _converted(self.pretrained, model, image_shape))

    def transform(self, image_shape: tuple[int, ...]) -> augment.Augmentation:
        """The augmentation.

        Raises:
          ValueError: --augmentation does not fit images of that shape.
        """
        transform = self._augmentation()
        image = jax.ShapeDtypeStruct((1, *image_shape), np.uint8)
        position = jax.ShapeDtypeStruct((1,), np.int32)
        _named(
            "augmentation",
            lambda: jax.eval_shape(transform, jax.random.key(0), image, position),
        )
        return transform

    def as_dict(self) -> dict[str, Any]:
        """Plain values by name, pretrained weights by the SHA-256 of their file."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.pretrained is not None:
            values["pretrained"] = self.pretrained.sha256
        for name in _LATER:
            if values[name] == getattr(type(self), name):
                values.pop(name)
        return values

    @property
    def file_crop(self) -> data.FileCrop | None:
        """How image files are cropped while they are decoded, or None."""
        return data.FileCrop(self.crop_scale) if self._parts[0] == FILE_CROP else None

    @property
    def _parts(self) -> list[str]:
        return self.augmentation.split("+")

    def _augmentation(self) -> augment.Augmentation:
        """What is done on the device."""
        on_device = self._parts[1:] if self._parts[0] == FILE_CROP else self._parts
        if FILE_CROP in on_device:
            raise ValueError(f"{self.augmentation!r}: {FILE_CROP} must come first, and once")
        return augment.create(
            "+".join(on_device) or "none",
            padding=self.crop_padding,
            scale=self.crop_scale,
            jitter=self.jitter,
            grayscale_probability=self.grayscale_probability,
        )


def _named(flag: str, build):
    """What `build` returns; its ValueError names the flag."""
    try:
        return build()
    except ValueError as error:
        raise ValueError(f"--{flag}: {error}") from None


# Programs of several methods share one copy.
_converted = functools.lru_cache(maxsize=1)(convert)
