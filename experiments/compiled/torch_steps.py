"""The training steps of `benchmark --against=torch`, as a user of PyTorch would write them."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping, Sequence

import numpy as np

try:
    import torch
    from torch import nn
    from torch.nn import functional
except ImportError:  # users install it; without it this module can be imported, but not used
    torch, functional, nn = None, None, types.SimpleNamespace(Module=object)

from experiments.compiled import step_cost
from lpa_jax import models

STEP_SIZE = 1.5  # radii in all steps together, the default of `lpa_jax.lpa`


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm; a shortcut that subsamples and pads with zeros."""

    def __init__(self, features_in: int, features: int, stride: int):
        super().__init__()
        self.stride, self.pad = stride, features - features_in
        self.conv1 = nn.Conv2d(features_in, features, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(features)

    def forward(self, x):
        """`[B, F, H, W]` to `[B, features, H/stride, W/stride]`."""
        y = functional.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.stride > 1 or self.pad:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.pad))
        return functional.relu(x + y)


class PreactivationBlock(nn.Module):
    """Norm, relu, 3x3 convolution, twice; a 1x1 convolution as shortcut where shapes differ."""

    def __init__(self, features_in: int, features: int, stride: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(features_in)
        self.conv1 = nn.Conv2d(features_in, features, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.shortcut_conv = None
        if stride > 1 or features_in != features:
            self.shortcut_conv = nn.Conv2d(features_in, features, 1, stride, bias=False)

    def forward(self, x):
        """`[B, F, H, W]` to `[B, features, H/stride, W/stride]`."""
        y = functional.relu(self.norm1(x))
        if self.shortcut_conv is not None:
            x = self.shortcut_conv(y)
        return x + self.conv2(functional.relu(self.norm2(self.conv1(y))))


class ConvNormRelu(nn.Module):
    """A 3x3 convolution with norm and relu, or alone."""

    def __init__(self, channels: int, features: int, stride: int, norm: nn.Module | None):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, features, 3, stride, 1, bias=False), norm

    def forward(self, x):
        """`[B, channels, H, W]` to `[B, features, H/stride, W/stride]`."""
        x = self.conv(x)
        return x if self.norm is None else functional.relu(self.norm(x))


class Pool(nn.Module):
    """Mean over space, behind norm and relu in pre-activation networks."""

    def __init__(self, norm: nn.Module | None):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        """`[B, F, H, W]` to `[B, F]`."""
        return (x if self.norm is None else functional.relu(self.norm(x))).mean((2, 3))


class Hidden(nn.Module):
    """relu(W x + b), which flattens its input."""

    def __init__(self, features_in: int, features: int):
        super().__init__()
        self.dense = nn.Linear(features_in, features)

    def forward(self, x):
        """`[B, ...]` to `[B, features]`."""
        return functional.relu(self.dense(x.flatten(1)))


class Logits(nn.Module):
    """The classifier."""

    def __init__(self, features: int, num_classes: int):
        super().__init__()
        self.dense = nn.Linear(features, num_classes)

    def forward(self, x):
        """`[B, F]` to `[B, C]`."""
        return self.dense(x)


def network(model: models.StagedModel, image_shape: Sequence[int]) -> nn.ModuleDict:
    """The same network, by stage.

    Args:
      model: an MLP, a SmallCNN with group norm, a ResNet of the CIFAR form with batch norm, or a
        WideResNet with batch norm and without dropout.
      image_shape: height, width and channels.

    Raises:
      ValueError: another network.
    """
    match model:
        case models.MLP(dropout=0.0):
            stages, width = _mlp(model, image_shape)
        case models.SmallCNN(norm="group"):
            stages, width = _small_cnn(model, image_shape[-1])
        case models.ResNet(block="basic", shortcut="pad", stem="cifar", norm="batch"):
            stem = ConvNormRelu(
                image_shape[-1], model.widths[0], 1, nn.BatchNorm2d(model.widths[0])
            )
            stages, width = _residual(model.stage_sizes, model.widths, model.widths[0], Block)
            stages = {"stem": stem, **stages, "pool": Pool(None)}
        case models.WideResNet(norm="batch", dropout=0.0):
            counts, widths = [(model.depth - 4) // 6] * 3, [n * model.width for n in (16, 32, 64)]
            stages, width = _residual(counts, widths, 16, PreactivationBlock)
            stem = ConvNormRelu(image_shape[-1], 16, 1, None)
            stages = {"stem": stem, **stages, "pool": Pool(nn.BatchNorm2d(width))}
        case _:
            raise ValueError(
                "--model must be mlp, small_cnn, a WideResNet or a ResNet of the CIFAR form with "
                f"--against=torch, got {type(model).__name__}"
            )
    return nn.ModuleDict(stages | {"logits": Logits(width, model.num_classes)})


def _mlp(model, image_shape):
    """Stages below the classifier, and the features of the last; so do the next two."""
    sizes = (int(np.prod(image_shape)), *model.hidden)
    stages = {
        name: Hidden(*sizes[index : index + 2]) for index, name in enumerate(model.stage_names[:-1])
    }
    return stages, sizes[-1]


def _small_cnn(model, channels):
    stages, width = {}, channels
    for index, features in enumerate(model.widths):
        norm = nn.GroupNorm(math.gcd(model.groups, features), features)
        stages[f"stage{index + 1}"], width = ConvNormRelu(width, features, 2, norm), features
    return stages | {"pool": Pool(None)}, width


def _residual(counts, widths, width, block):
    stages = {}
    for index, (count, features) in enumerate(zip(counts, widths, strict=True)):
        blocks = nn.Sequential()
        for number in range(count):
            stride = 2 if index > 0 and number == 0 else 1
            blocks.add_module(f"block{number + 1}", block(width, features, stride))
            width = features
        stages[f"stage{index + 1}"] = blocks
    return stages, width


def flat(tree: Mapping, prefix: str = "") -> dict[str, np.ndarray]:
    """The arrays of a Flax tree by the names of PyTorch's parameters, in PyTorch's layouts."""
    found = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
            continue
        value = np.asarray(value)
        if name == "kernel":
            value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        found[prefix + {"kernel": "weight", "scale": "weight"}.get(name, name)] = value
    return found


@dataclasses.dataclass
class Steps:
    """Training steps of ERM or of LPA at one layer, with momentum SGD.

    Attributes:
      net: from `network`.
      images: `[B, F, H, W]`, or `[B, H, W, F]` for an MLP.
      labels: `[B]`.
      layer: where LPA acts, or "-" for ERM.
      steps: PGD steps K.
      sign: s_c, `[C]`.
      radius: eps_c without the scale of the activation, `[C]`.
      compiled: whether `torch.compile` compiles the stages.
    """

    net: nn.ModuleDict
    images: torch.Tensor
    labels: torch.Tensor
    layer: str
    steps: int
    sign: torch.Tensor
    radius: torch.Tensor
    compiled: bool = False

    def __post_init__(self):
        self.optimizer = torch.optim.SGD(
            self.net.parameters(), step_cost.LEARNING_RATE, step_cost.MOMENTUM
        )
        names = list(self.net)
        cut = 0 if self.layer in ("-", "input") else names.index(self.layer) + 1
        self.encode = nn.Sequential(*(self.net[name] for name in names[:cut]))
        self.decode = nn.Sequential(*(self.net[name] for name in names[cut:]))
        self.norms = [m for m in self.decode.modules() if isinstance(m, nn.BatchNorm2d)]
        self.parameters_above = list(self.decode.parameters())
        if self.compiled:
            self.encode, self.decode = torch.compile(self.encode), torch.compile(self.decode)

    def __call__(self) -> float:
        """One step; returns the loss."""
        activation = self.encode(self.images)
        perturbed = activation
        if self.layer != "-":
            perturbed = activation + self.perturbation(activation.detach())[self.labels]
        loss = functional.cross_entropy(self.decode(perturbed), self.labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def perturbation(self, activation: torch.Tensor) -> torch.Tensor:
        """delta_c, `[C, *S]`, by signed projected gradient ascent without weight gradients."""
        self.set_passes(of_pgd=True)
        rows = activation.flatten(1)
        counts = torch.bincount(self.labels, minlength=len(self.sign)).clamp(min=1)[:, None]
        radius = (self.radius * rows.norm(dim=1).mean())[:, None]
        sign = self.sign[:, None]
        cone = sign * functional.normalize(self.class_sums(rows) / counts, dim=1)
        delta = torch.zeros_like(cone)
        for _ in range(self.steps):
            moved = (rows + delta[self.labels]).view_as(activation)
            if moved.ndim == 4 and activation.is_contiguous(memory_format=torch.channels_last):
                moved = moved.contiguous(memory_format=torch.channels_last)
            moved.requires_grad_()
            loss = functional.cross_entropy(self.decode(moved), self.labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, moved)
            direction = functional.normalize(self.class_sums(gradient.flatten(1)), dim=1)
            delta = delta + sign * radius * (STEP_SIZE / self.steps) * direction
            delta = delta - (delta * cone).sum(1, keepdim=True).clamp(max=0) * cone
            delta = delta * (radius / delta.norm(dim=1, keepdim=True).clamp(min=1e-30)).clamp(max=1)
        self.set_passes(of_pgd=False)
        return delta.view(-1, *activation.shape[1:])

    def class_sums(self, rows: torch.Tensor) -> torch.Tensor:
        """Sums over the examples of each class, `[B, F]` to `[C, F]`."""
        sums = rows.new_zeros(len(self.sign), rows.shape[1])
        return sums.index_add_(0, self.labels, rows)

    def set_passes(self, *, of_pgd: bool) -> None:
        """PGD's passes form no weight gradients and leave the running statistics alone."""
        for parameter in self.parameters_above:
            parameter.requires_grad_(not of_pgd)
        for norm in self.norms:
            norm.track_running_stats = not of_pgd
