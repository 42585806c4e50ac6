"""Staged models and their registry.

`create("resnet32", num_classes=100)` and `ResNet32(num_classes=100)` make the same model; its
`layers` are the points at which a perturbation can act. See `base.StagedModel` for the interface.
"""

from typing import Any

from lpa_jax.models import pretrained
from lpa_jax.models.base import StagedModel
from lpa_jax.models.cnn import SmallCNN
from lpa_jax.models.mlp import MLP
from lpa_jax.models.resnet import (
    ResNet,
    ResNet8,
    ResNet8Slim,
    ResNet18,
    ResNet20,
    ResNet32,
    ResNet34,
    ResNet50,
    ResNet56,
    ResNet110,
)
from lpa_jax.models.vit import ViT, ViT_L16, ViT_S16, ViT_Ti16
from lpa_jax.models.wide_resnet import WRN_16_8, WRN_28_10, WideResNet
from lpa_jax.registry import Registry

_REGISTRY: Registry[StagedModel] = Registry(
    "model",
    {
        "mlp": MLP,
        "small_cnn": SmallCNN,
        "resnet8": ResNet8,
        "resnet8_slim": ResNet8Slim,
        "resnet18": ResNet18,
        "resnet20": ResNet20,
        "resnet32": ResNet32,
        "resnet34": ResNet34,
        "resnet50": ResNet50,
        "resnet56": ResNet56,
        "resnet110": ResNet110,
        "wide_resnet": WideResNet,
        "wrn_16_8": WRN_16_8,
        "wrn_28_10": WRN_28_10,
        "vit": ViT,
        "vit_ti16": ViT_Ti16,
        "vit_s16": ViT_S16,
        "vit_l16": ViT_L16,
    },
    hidden=("parent", "name"),
)
names = _REGISTRY.names


def create(name: str, num_classes: int, **options: Any) -> StagedModel:
    """The model called `name`.

    Args:
      name: One of `names()`.
      num_classes: Number of classes `C`.
      **options: Attributes of the model's class, such as `dropout` or `dtype`; those left out keep
        the defaults of the named architecture.

    Raises:
      ValueError: `name` or an option's name is unknown, or an option's value is not allowed.

    Example:
      >>> create("wrn_28_10", num_classes=100, dropout=0.3).width
      10
      >>> create("mlp", num_classes=10, deep=3)
      Traceback (most recent call last):
      ...
      ValueError: option of model 'mlp' must be one of hidden, dropout, dtype, head, got 'deep'
    """
    return _REGISTRY.create(name, num_classes, **options)


__all__ = [
    "MLP", "WRN_16_8", "WRN_28_10", "ResNet", "ResNet8", "ResNet8Slim", "ResNet18", "ResNet20",
    "ResNet32", "ResNet34", "ResNet50", "ResNet56", "ResNet110", "SmallCNN", "StagedModel", "ViT",
    "ViT_L16", "ViT_S16", "ViT_Ti16", "WideResNet", "create", "names", "pretrained",
]  # fmt: skip
