"""What defines a run in both protocols: its network, its optimizer, its augmentation."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import numpy as np
import optax

from experiments.runtime import fields
from experiments.runtime.fields import named, setting
from experiments.training.task import Length
from lpa_jax import data, losses, models, optimizers, parallel
from lpa_jax.data import augment
from lpa_jax.injection.accumulation import accumulate
from lpa_jax.models.base import HEADS
from lpa_jax.models.pretrained import Weights, convert, read

# The augmentation that is not done on the device: a random crop of a file before it is resized.
FILE_CROP = "file_crop"

# Settings of JAX that change numbers, with their defaults.
_OF_JAX = {
    "jax_enable_x64": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_default_matmul_precision": None,
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_high_dynamic_range_gumbel": False,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Settings of a run; each protocol adds its data and the length of its runs."""

    GROUP: ClassVar[str] = "training"

    model: str = setting("mlp", "Network architecture.", allowed=models.names, group="model")
    dtype: str = setting(
        "float32", "Type of the computation.", allowed=("float32", "bfloat16"), group="model"
    )
    head: str = setting(
        "linear",
        "Classifier: linear, or normalized for cosines, with which LDAM was published.",
        allowed=HEADS,
        later=True,
        group="model",
    )
    model_dropout: float = setting(
        0.0,
        "Rate of the dropout layers within models that have them: in the blocks of wide ResNets, "
        "MLPs and ViTs, before the head of ResNets. The method dropout is a perturbation instead.",
        low=0,
        below=1,
        later=True,
        group="model",
    )
    damaged_images: str = setting(
        "refuse",
        "Image files that cannot be decoded: refuse ends the run with their number and the first "
        "ten; skip decodes every file once, and leaves out and lists those.",
        allowed=("refuse", "skip"),
        later=True,
    )
    pretrained: Weights | None = setting(  # noqa: RUF009 (immutable)
        None,
        "safetensors file with weights for resnet18, resnet34 or resnet50, under torchvision's "
        "names. A head for another number of classes is ignored.",
        parse=read,
        path=True,
        later=True,
        group="model",
    )
    freeze_batch_norm: bool = setting(
        False,
        "Normalise by the pretrained running statistics in training, too, and keep them as they "
        "are; scales and biases are trained. DomainBed does this.",
        later=True,
        group="model",
    )
    batch_size: int = setting(64, "Examples in a step, over all devices.", low=1, high=2**20)
    accumulate: int = setting(
        1,
        "Parts into which a device splits its share of a batch, to save memory.",
        low=1,
        high=2**20,
        later=True,
    )
    sync_batch_norm: bool = setting(
        False, "Normalise by the statistics of the batch of all devices.", later=True
    )
    optimizer: str = setting("sgd", "Optimizer.", allowed=optimizers.names)
    learning_rate: float = setting(
        0.02,
        "Highest learning rate; unset: the tuned one, the recipe's, or 0.02.",
        instead_of=("lr",),
        flag_default=None,
        low=0,
        high=1000,
    )
    weight_decay: float = setting(
        5e-4, "Unset: tuned, the recipe's, or 5e-4.", flag_default=None, low=0, high=1000
    )
    decay_biases_and_norms: bool = setting(
        False, "Also apply weight decay to biases and to the scales of norms."
    )
    clip_norm: float | None = setting(
        5.0,
        "Bound of the gradient's global norm; 0 does not clip.",
        parse=lambda bound: bound or None,
        above=0,
    )
    schedule: str = setting("cosine", "Learning rate schedule.", allowed=optimizers.SCHEDULES)
    augmentation: str = setting(
        "none",
        f"none, or a sum of {', '.join(augment.NAMES[1:])}, such as crop+flip or "
        "resized_crop+flip+jitter+grayscale. file_crop in place of resized_crop crops image files "
        "at their original size, and decodes them again in every epoch.",
    )
    crop_padding: int = setting(2, "Pixels by which crop may shift the image.", low=0, high=2**14)
    crop_scale: tuple[float, float] = setting(
        (0.08, 1.0),
        "LOW,HIGH: the share of the image's area that resized_crop or file_crop keeps.",
        low=0,
        high=1,
        later=True,
    )
    jitter: tuple[float, float, float, float] = setting(
        (0.4, 0.4, 0.4, 0.0),
        "Strengths of jitter: BRIGHTNESS,CONTRAST,SATURATION,HUE.",
        low=0,
        later=True,
    )
    grayscale_probability: float = setting(
        0.1, "Probability that grayscale makes an image grey.", low=0, high=1, later=True
    )
    evaluate_every: int = setting(5, "Epochs between evaluations for the curves.", low=1)

    @property
    def of_files(self) -> bool:
        """Whether the images are files that are decoded, not a set in memory."""
        raise NotImplementedError

    def check(self) -> Self:
        """Returns itself.

        Raises:
          ValueError: one line naming the first flag that is out of bounds or does not fit.
        """
        fields.check(self)
        if self.model_dropout:
            named("model_dropout", lambda: self.network(2))
        if self.freeze_batch_norm and self.pretrained is None:
            raise ValueError(
                "--freeze_batch_norm needs --pretrained: other norms have no statistics to keep"
            )
        if self.freeze_batch_norm:
            named("freeze_batch_norm", lambda: self.network(2))
        if self.freeze_batch_norm and self.sync_batch_norm:
            raise ValueError("--sync_batch_norm: --freeze_batch_norm leaves nothing to synchronise")
        named("crop_scale", lambda: augment.random_resized_crop(self.crop_scale))
        named("jitter", lambda: augment.color_jitter(*self.jitter))
        named("augmentation", self._augmentation)
        if self.file_crop is not None and not self.of_files:
            raise ValueError(
                f"--augmentation: {FILE_CROP} crops image files before they are resized, and this "
                "data set has none; use resized_crop"
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
            model = named("sync_batch_norm", lambda: self.network(model.num_classes, **options))
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
        return named("pretrained", lambda: _converted(self.pretrained, model, image_shape))

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """These settings with what a method's options replace; by default nothing."""
        return self

    def rate_schedule(self, rate: float | jax.Array, length: Length) -> optax.Schedule:
        """The learning rate by step, whose highest value is `rate`."""
        return optimizers.schedule(self.schedule, rate, total_steps=length.total_steps)

    def default_loss(self, counts: Sequence[int], options: Mapping[str, Any]) -> losses.Loss:
        """The loss of methods without one of their own, whose options are among a method's."""
        return losses.cross_entropy

    @property
    def loss_needs_counts(self) -> bool:
        """Whether `default_loss` depends on its counts."""
        return False

    def transform(self, image_shape: tuple[int, ...]) -> augment.Augmentation:
        """The augmentation.

        Raises:
          ValueError: --augmentation does not fit images of that shape.
        """
        transform = self._augmentation()
        image = jax.ShapeDtypeStruct((1, *image_shape), np.uint8)
        position = jax.ShapeDtypeStruct((1,), np.int32)
        named("augmentation", lambda: jax.eval_shape(transform, jax.random.key(0), image, position))
        return transform

    def as_dict(self) -> dict[str, Any]:
        """Plain values by name, pretrained weights by the SHA-256 of their file.

        Settings of JAX that change numbers are among them where they are not the defaults.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.pretrained is not None:
            values["pretrained"] = self.pretrained.sha256
        for name in fields.left_out(self):
            values.pop(name)
        return values | _jax_settings()

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


def _jax_settings() -> dict[str, Any]:
    """Those of `_OF_JAX` that are not at their defaults."""
    values = {name: getattr(jax.config, name, _OF_JAX[name]) for name in _OF_JAX}
    return {name: value for name, value in values.items() if value != _OF_JAX[name]}


# Programs of several methods share one copy.
_converted = functools.lru_cache(maxsize=1)(convert)
