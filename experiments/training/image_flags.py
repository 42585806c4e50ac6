"""Flags of augmentation, the network and its passes, which all training experiments have."""

from typing import Any

from absl import flags

from experiments.training.settings import ImageSettings
from lpa_jax.data import augment
from lpa_jax.models import pretrained
from lpa_jax.models.base import HEADS

FLAGS = flags.FLAGS


def define_flags(defaults: type[ImageSettings]) -> None:
    """Flags with the defaults of a protocol's settings."""
    flags.DEFINE_string(
        "augmentation",
        defaults.augmentation,
        f"none, or a sum of {', '.join(augment.NAMES[1:])}, such as crop+flip or "
        "resized_crop+flip+jitter+grayscale. file_crop in the place of resized_crop crops image "
        "files at their own size, and decodes them anew in every epoch.",
    )
    flags.DEFINE_integer(
        "crop_padding", defaults.crop_padding, "Pixels by which crop may shift the image."
    )
    flags.DEFINE_list(
        "crop_scale",
        _texts(defaults.crop_scale),
        "LOW,HIGH: the share of the image's area that resized_crop or file_crop keeps.",
    )
    flags.DEFINE_list(
        "jitter",
        _texts(defaults.jitter),
        "Strengths of jitter: BRIGHTNESS,CONTRAST,SATURATION,HUE.",
    )
    flags.DEFINE_float(
        "grayscale_probability",
        defaults.grayscale_probability,
        "How often grayscale makes an image grey.",
    )
    flags.DEFINE_enum(
        "head",
        "linear",
        HEADS,
        "Classifier: linear, or normalized for cosines, which LDAM was published with.",
    )
    flags.DEFINE_float(
        "model_dropout",
        0.0,
        "Rate of the dropout layers within models that have them (in blocks of wide ResNets, MLPs "
        "and ViTs, before the head of ResNets); as a method to compare, dropout is a perturbation.",
    )
    flags.DEFINE_string(
        "pretrained",
        None,
        "safetensors file with the weights that resnet18, resnet34 or resnet50 starts from, under "
        "torchvision's names; a head for other classes is not taken.",
    )
    flags.DEFINE_bool(
        "freeze_batch_norm",
        False,
        "Normalise by the pretrained running statistics in training, too, and keep them as they "
        "are; scales and biases are trained. As in DomainBed.",
    )
    flags.DEFINE_integer(
        "accumulate", 1, "Parts of a device's share of a batch, one in memory at a time."
    )
    flags.DEFINE_bool(
        "sync_batch_norm", False, "Normalise by the statistics of the batch of all devices."
    )


def values() -> dict[str, Any]:
    """Settings by name, from the parsed flags.

    Raises:
      ValueError: naming the flag that is no list of numbers or no file of weights.
    """
    return {
        "augmentation": FLAGS.augmentation,
        "crop_padding": FLAGS.crop_padding,
        "crop_scale": _numbers("crop_scale", FLAGS.crop_scale),
        "jitter": _numbers("jitter", FLAGS.jitter),
        "grayscale_probability": FLAGS.grayscale_probability,
        "head": FLAGS.head,
        "model_dropout": FLAGS.model_dropout,
        "pretrained": _weights(FLAGS.pretrained),
        "freeze_batch_norm": FLAGS.freeze_batch_norm,
        "accumulate": FLAGS.accumulate,
        "sync_batch_norm": FLAGS.sync_batch_norm,
    }


def _texts(numbers: tuple[float, ...]) -> list[str]:
    return [f"{number:g}" for number in numbers]


def _numbers(flag: str, texts: list[str]) -> tuple[float, ...]:
    try:
        return tuple(float(text) for text in texts)
    except ValueError:
        raise ValueError(f"--{flag} must be numbers, got {','.join(texts)!r}") from None


def _weights(path: str | None) -> pretrained.Weights | None:
    if path is None:
        return None
    try:
        return pretrained.read(path)
    except ValueError as error:
        raise ValueError(f"--pretrained: {error}") from None
