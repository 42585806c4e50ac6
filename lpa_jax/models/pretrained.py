"""Weights that others trained: safetensors files with torchvision's names into our ResNets.

| file | here |
|---|---|
| `conv1.weight`, `bn1.*` | `stem/conv`, `stem/norm` |
| `layer<s>.<b>.conv<k>.weight`, `.bn<k>.*` | `stage<s>/block<b+1>/conv<k>`, `/norm<k>` |
| `layer<s>.<b>.downsample.0.weight`, `.1.*` | `.../shortcut_conv`, `/shortcut_norm` |
| `fc.weight`, `fc.bias` | `logits/dense` |

timm's ResNets (`resnet18`, `resnet34`, `resnet50`) use the same names. Kernels are turned from
[F_out, F_in, h, w] to [h, w, F_in, F_out]. The format holds numbers and names and no code.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lpa_jax.data import optional
from lpa_jax.files import read_bytes
from lpa_jax.models.base import StagedModel
from lpa_jax.models.resnet import ResNet

_HEAD = ("fc.weight", "fc.bias")
_COUNTER = ".num_batches_tracked"
# Names of a norm's tensors, and their collection and leaf.
_NORM = {
    "weight": ("params", "scale"),
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
}
Place = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Weights:
    """The tensors of a file; equal to another's where the files are the same.

    Attributes:
      tensors: By name, read-only.
      sha256: Sha256 of the whole file, in hexadecimal digits.
    """

    tensors: Mapping[str, np.ndarray] = dataclasses.field(repr=False, compare=False)
    sha256: str


def read(path: str | os.PathLike) -> Weights:
    """Reads a safetensors file; nothing in it is executed.

    Raises:
      ValueError: It cannot be read, is cut short, or is not such a file.

    Example:
      >>> import tempfile, safetensors.numpy
      >>> with tempfile.NamedTemporaryFile() as file:
      ...     _ = file.write(safetensors.numpy.save({"fc.bias": np.zeros(2, np.float32)}))
      ...     file.flush()
      ...     read(file.name).tensors["fc.bias"]
      array([0., 0.], dtype=float32)
    """
    safetensors = optional.package("safetensors")
    optional.package("safetensors.numpy")
    try:
        content = read_bytes(path)
    except OSError as error:
        raise ValueError(f"{os.fspath(path)!r} cannot be read ({error.strerror})") from None
    try:
        tensors = safetensors.numpy.load(content)
    except KeyError as error:
        raise ValueError(
            f"{os.fspath(path)!r} holds numbers of type {error}, which NumPy does not have; save "
            "them as float32"
        ) from None
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(
            f"{os.fspath(path)!r} is no whole safetensors file ({error}); convert other formats "
            "first, see docs/datasets.md"
        ) from None
    for tensor in tensors.values():
        tensor.flags.writeable = False
    return Weights(tensors, hashlib.sha256(content).hexdigest())


def convert(weights: Weights, model: StagedModel, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """The weights as variables of a ResNet, to take the place of its initial ones.

    The head is left out where the file has it for another number of classes. Counters of batches
    are not needed.

    Args:
      weights: From `read`.
      model: A `ResNet` of the ImageNet form with batch norms.
      image_shape: (H, W, channels) of its input.

    Returns:
      `{"params": ..., "batch_stats": ...}`, float32, a part of the tree that `model.init` makes.

    Raises:
      ValueError: Another kind of model; a tensor is missing, unexpected, of another shape or not
        of floating numbers; a number in it is not finite, or a variance negative. One line that
        names the tensor.

    Example:
      >>> from lpa_jax import models
      >>> convert(Weights({}, ""), models.ResNet18(10), (32, 32, 3))
      Traceback (most recent call last):
      ...
      ValueError: tensor 'bn1.bias' is missing (and 101 others of 102)
    """
    if not _has_names(model):
        raise ValueError(
            "names are known for resnet18, resnet34 and resnet50 with batch norms alone, not for "
            f"this {type(model).__name__}"
        )
    places = dict(_places(model))
    tensors = {
        name: tensor for name, tensor in weights.tensors.items() if not name.endswith(_COUNTER)
    }
    missing, unexpected = sorted(places.keys() - tensors), sorted(tensors.keys() - places)
    if missing:
        others = f" (and {len(missing) - 1} others of {len(places)})" if len(missing) > 1 else ""
        raise ValueError(f"tensor {missing[0]!r} is missing{others}")
    if unexpected:
        raise ValueError(f"tensor {unexpected[0]!r} is unexpected: the model has no place for it")
    image = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    shapes = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), image))
    has_head = tensors["fc.bias"].shape == (model.num_classes,)
    variables = {}
    for name, place in places.items():
        expected = shapes[place].shape
        if name in _HEAD and not has_head:
            expected = (*expected[:-1], *tensors["fc.bias"].shape)
        array = _checked(name, tensors[name], expected)
        if name not in _HEAD or has_head:
            variables[place] = array
    return unflatten_dict(variables)


def _has_names(model: StagedModel) -> bool:
    return (
        isinstance(model, ResNet)
        and (model.stem, model.shortcut, model.norm) == ("imagenet", "projection", "batch")
        and len(model.stage_sizes) == 4
    )


def _places(model: ResNet) -> Iterator[tuple[str, Place]]:
    """Every tensor's name in the file, and its place among the variables."""

    def conv(name, *at):
        yield f"{name}.weight", ("params", *at, "kernel")

    def norm(name, *at):
        for tensor, (collection, leaf) in _NORM.items():
            yield f"{name}.{tensor}", (collection, *at, leaf)

    yield from conv("conv1", "stem", "conv")
    yield from norm("bn1", "stem", "norm")
    convolutions = 2 if model.block == "basic" else 3
    for stage, blocks in enumerate(model.stage_sizes, start=1):
        for block in range(blocks):
            name, at = f"layer{stage}.{block}", (f"stage{stage}", f"block{block + 1}")
            for number in range(1, convolutions + 1):
                yield from conv(f"{name}.conv{number}", *at, f"conv{number}")
                yield from norm(f"{name}.bn{number}", *at, f"norm{number}")
            # A basic block keeps the shape in the first stage; a bottleneck widens it fourfold.
            if block == 0 and (stage > 1 or model.block == "bottleneck"):
                yield from conv(f"{name}.downsample.0", *at, "shortcut_conv")
                yield from norm(f"{name}.downsample.1", *at, "shortcut_norm")
    yield "fc.weight", ("params", "logits", "dense", "kernel")
    yield "fc.bias", ("params", "logits", "dense", "bias")


def _checked(name: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor in float32 and our order of axes."""
    theirs = _their_shape(shape)
    if tensor.shape != theirs:
        raise ValueError(f"tensor {name!r} has shape {tensor.shape}, must have {theirs}")
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise ValueError(f"tensor {name!r} has type {tensor.dtype}, must be floating")
    array = tensor.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"tensor {name!r} has a number that is not finite")
    if name.endswith("running_var") and array.min() < 0:
        raise ValueError(f"tensor {name!r} has a negative variance")
    if array.ndim == 4:
        return np.ascontiguousarray(array.transpose(2, 3, 1, 0))
    return np.ascontiguousarray(array.T)


def _their_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the file of what has `shape` here.

    Example:
      >>> _their_shape((3, 3, 64, 128)), _their_shape((512, 10)), _their_shape((64,))
      ((128, 64, 3, 3), (10, 512), (64,))
    """
    if len(shape) == 4:
        height, width, below, above = shape
        return (above, below, height, width)
    return shape[::-1]
