"""Staged models and their registry.

`create("resnet32", num_classes=100)` and `ResNet32(num_classes=100)` make the same model; its
`layers` are the points at which a perturbation can act. See `base.StagedModel` for the interface.
"""

import dataclasses
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
from lpa_jax.models.vit import ViT, ViT_S16, ViT_Ti16
from lpa_jax.models.wide_resnet import WRN_16_8, WRN_28_10, WideResNet

_CONSTRUCTORS = {
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
}


def names() -> tuple[str, ...]:
    """Returns the names that `create` knows.

    Example:
        >>> names()[:3]
        ('mlp', 'small_cnn', 'resnet8')
    """
    return tuple(_CONSTRUCTORS)


def create(name: str, num_classes: int, **options: Any) -> StagedModel:
    """Makes the model called `name`.

    Args:
        name: One of `names()`.
        num_classes: Number of classes `C`.
        **options: Attributes of the model's class, such as `dropout` or `dtype`; those left out
            keep the defaults of the named architecture.

    Returns:
        An unbound staged model.

    Raises:
        ValueError: `name` or an option's name is unknown, or an option's value is not allowed.

    Example:
        >>> create("wrn_28_10", num_classes=100, dropout=0.3).width
        10
        >>> create("mlp", num_classes=10, deep=3)
        Traceback (most recent call last):
        ...
        ValueError: option 'deep' is unknown to the model 'mlp'; it has dtype, head, hidden, dropout
    """
    if name not in _CONSTRUCTORS:
        raise ValueError(f"model {name!r} is unknown; there are {', '.join(_CONSTRUCTORS)}")
    constructor = _CONSTRUCTORS[name]
    model_class = getattr(constructor, "func", constructor)
    known = [field.name for field in dataclasses.fields(model_class)]
    known = [field for field in known if field not in ("num_classes", "parent", "name")]
    for option in options:
        if option not in known:
            raise ValueError(
                f"option {option!r} is unknown to the model {name!r}; it has {', '.join(known)}"
            )
    return constructor(num_classes, **options)


__all__ = [
    "MLP",
    "WRN_16_8",
    "WRN_28_10",
    "ResNet",
    "ResNet8",
    "ResNet8Slim",
    "ResNet18",
    "ResNet20",
    "ResNet32",
    "ResNet34",
    "ResNet50",
    "ResNet56",
    "ResNet110",
    "SmallCNN",
    "StagedModel",
    "ViT",
    "ViT_S16",
    "ViT_Ti16",
    "WideResNet",
    "create",
    "names",
    "pretrained",
]
