"""The training steps of `benchmark --against=torch`, as a user of PyTorch would write them."""

from __future__ import annotations

import collections
import dataclasses
import itertools
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
        self.conv1 = _conv(features_in, features, stride)
        self.norm1 = nn.BatchNorm2d(features)
        self.conv2 = _conv(features, features)
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
        self.conv1 = _conv(features_in, features, stride)
        self.norm2 = nn.BatchNorm2d(features)
        self.conv2 = _conv(features, features)
        self.shortcut_conv = None
        if stride > 1 or features_in != features:
            self.shortcut_conv = nn.Conv2d(features_in, features, 1, stride, bias=False)

    def forward(self, x):
        """`[B, F, H, W]` to `[B, features, H/stride, W/stride]`."""
        y = functional.relu(self.norm1(x))
        if self.shortcut_conv is not None:
            x = self.shortcut_conv(y)
        return x + self.conv2(functional.relu(self.norm2(self.conv1(y))))


def network(model: models.StagedModel, image_shape: Sequence[int]) -> nn.ModuleDict:
    """The same network, by stage.

    Args:
      model: an MLP or a WideResNet without dropout, a SmallCNN, or a ResNet of the CIFAR form; with
        their default norms.
      image_shape: height, width and channels.

    Raises:
      ValueError: another network.
    """
    channels = image_shape[-1]
    match model:
        case models.MLP(dropout=0.0):
            widths = int(np.prod(image_shape)), *model.hidden
            dense = [nn.Linear(*pair) for pair in itertools.pairwise(widths)]
            hidden = [_stage(flat=nn.Flatten(), dense=layer, relu=nn.ReLU()) for layer in dense]
            stages = dict(zip(model.stage_names, hidden, strict=False))
        case models.SmallCNN(norm="group"):
            widths, stages = model.widths, {}
            for index, pair in enumerate(itertools.pairwise((channels, *widths))):
                norm = nn.GroupNorm(math.gcd(model.groups, pair[1]), pair[1])
                stage = _stage(conv=_conv(*pair, 2), norm=norm, relu=nn.ReLU())
                stages[model.stage_names[index]] = stage
            stages["pool"] = _pool()
        case models.ResNet(block="basic", shortcut="pad", stem="cifar", norm="batch"):
            widths, wide = model.widths, model.widths[0]
            norm = nn.BatchNorm2d(wide)
            stages = {"stem": _stage(conv=_conv(channels, wide), norm=norm, relu=nn.ReLU())}
            stages |= _blocks(Block, model.stage_sizes, (wide, *widths)) | {"pool": _pool()}
        case models.WideResNet(norm="batch", dropout=0.0):
            widths = 16, *(features * model.width for features in (16, 32, 64))
            stages = {"stem": _stage(conv=_conv(channels, 16))}
            stages |= _blocks(PreactivationBlock, 3 * [(model.depth - 4) // 6], widths)
            stages["pool"] = _pool(norm=nn.BatchNorm2d(widths[-1]), relu=nn.ReLU())
        case _:
            raise ValueError(
                "--model must be mlp, small_cnn, a WideResNet or a ResNet of the CIFAR form with "
                f"--against=torch, got {type(model).__name__}"
            )
    logits = _stage(dense=nn.Linear(widths[-1], model.num_classes))
    return nn.ModuleDict(stages | {"logits": logits})


def _stage(**modules):
    return nn.Sequential(collections.OrderedDict(modules))


def _pool(**modules):
    return _stage(**modules, mean=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten())


def _conv(features_in, features, stride=1):
    return nn.Conv2d(features_in, features, 3, stride, 1, bias=False)


def _blocks(block, counts, widths):
    """The stages of a residual network, of `counts` blocks; widths are those in and out."""
    stages = {}
    for index, (count, pair) in enumerate(zip(counts, itertools.pairwise(widths), strict=True)):
        first = block(*pair, 2 if index > 0 else 1)
        others = (block(pair[1], pair[1], 1) for _ in range(1, count))
        named = {f"block{number + 1}": each for number, each in enumerate((first, *others))}
        stages[f"stage{index + 1}"] = _stage(**named)
    return stages


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
