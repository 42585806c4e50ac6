"""Domain generalisation: sets of several domains, and their holdout split.

RotatedMNIST and ColoredMNIST follow DomainBed, on the 5000 MNIST images of `mnist5k`. DomainBed
joins MNIST's training and test images before it deals them to the domains, and so do we: the test
set of the protocol is a domain that training never sees, and as each image is in one domain, no
image is both trained on and tested on.
"""

import dataclasses
import os
from collections.abc import Callable

import numpy as np

from lpa_jax import checks
from lpa_jax.data import domain_folders, optional, random_order, sources
from lpa_jax.data.dataset import Dataset
from lpa_jax.data.image_files import ImageFiles

_ANGLES = (0, 15, 30, 45, 60, 75)
# domain -> probability that the colour differs from the label
_COLOUR_FLIPS = {"+90%": 0.1, "+80%": 0.2, "-90%": 0.9}
_LABEL_NOISE = 0.25


@dataclasses.dataclass(frozen=True, eq=False)
class Domains:
    """A data set of several domains with the same classes.

    Attributes:
      name: what errors and tables call it.
      domain_names: D names.
      datasets: D data sets, in memory or as image files (`in_memory` reads those that fit).
      num_classes: C.

    Raises:
      ValueError: fewer than two domains, or numbers of names, data sets or classes that differ.

    Example:
      >>> toy = Dataset("toy", np.zeros((3, 4, 4, 1), np.uint8), np.arange(3), num_classes=3)
      >>> Domains("pair", ("a", "b"), (toy, toy), num_classes=3).domain_names
      ('a', 'b')
    """

    name: str
    domain_names: tuple[str, ...]
    datasets: tuple[Dataset | ImageFiles, ...] = dataclasses.field(repr=False)
    num_classes: int

    def __post_init__(self):
        if len(self.domain_names) < 2:
            raise ValueError(
                f"dataset={self.name!r}: has {len(self.domain_names)} domain"
                f"{'' if self.domain_names else 's'}, must have at least 2"
            )
        if len(self.datasets) != len(self.domain_names):
            raise ValueError(
                f"dataset={self.name!r}: has {len(self.datasets)} data sets for "
                f"{len(self.domain_names)} domain names"
            )
        for domain, dataset in zip(self.domain_names, self.datasets, strict=True):
            if dataset.num_classes != self.num_classes:
                raise ValueError(
                    f"dataset={self.name!r}: domain {domain!r} has {dataset.num_classes} classes, "
                    f"must have {self.num_classes}"
                )


def rotate(images: np.ndarray, degrees: float) -> np.ndarray:
    """Rotates counter-clockwise about the centre, bilinearly; what moves in from outside is 0.

    Args:
      images: uint8 [N, H, W, 1].
      degrees: the angle.

    Returns:
      uint8 [N, H, W, 1].

    Example:
      >>> rotate(np.array([[[[1], [2]], [[3], [4]]]], np.uint8), 90)[0, :, :, 0]
      array([[2, 4],
             [1, 3]], dtype=uint8)
    """
    pillow = optional.package("PIL.Image")
    rotated = [
        pillow.fromarray(image[..., 0]).rotate(degrees, pillow.Resampling.BILINEAR)
        for image in images
    ]
    return np.stack([np.asarray(image) for image in rotated])[..., None]


def colour(
    images: np.ndarray, digits: np.ndarray, flip: float, seed: int, domain: int
) -> tuple[np.ndarray, np.ndarray]:
    """Colours digits so that the colour predicts a noisy binary label, as far as `flip` lets it.

        label  = [digit < 5] xor Bernoulli(0.25)
        colour = label xor Bernoulli(flip)

    The image stands in the channel of its colour, the other channel is 0.

    Args:
      images: uint8 [N, H, W, 1].
      digits: integers 0..9 [N].
      flip: probability that the colour differs from the label.
      seed: a non-negative integer.
      domain: number of the domain, so that each has coin tosses of its own.

    Returns:
      (uint8 [N, H, W, 2], int32 labels [N]).

    Example:
      >>> coloured, labels = colour(np.ones((1, 1, 1, 1), np.uint8), np.array([7]), 0.0, 0, 0)
      >>> coloured.ravel(), labels
      (array([0, 1], dtype=uint8), array([1], dtype=int32))

    References:
      Arjovsky et al., "Invariant Risk Minimization", 2019, section 5.2.
    """
    size = len(digits)
    noise = random_order.bernoulli(_LABEL_NOISE, size, seed, random_order.LABEL_NOISE, domain)
    labels = (digits < 5) ^ noise
    colours = labels ^ random_order.bernoulli(flip, size, seed, random_order.COLOUR, domain)
    channel = np.stack([~colours, colours], axis=-1)
    return images * channel[:, None, None, :].astype(images.dtype), labels.astype(np.int32)


def _rotated_mnist(data_dir, seed: int, image_size: int | None) -> Domains:
    _check_size("RotatedMNIST", image_size, (28,))
    parts = _deal_mnist(data_dir, len(_ANGLES), seed)
    names = tuple(str(angle) for angle in _ANGLES)
    datasets = tuple(
        Dataset(f"RotatedMNIST/{name}", rotate(part.images, angle), part.labels, 10)
        for name, angle, part in zip(names, _ANGLES, parts, strict=True)
    )
    return Domains("RotatedMNIST", names, datasets, 10)


def _colored_mnist(data_dir, seed: int, image_size: int | None) -> Domains:
    stride = 28 // _check_size("ColoredMNIST", image_size, (28, 14))
    parts = _deal_mnist(data_dir, len(_COLOUR_FLIPS), seed)
    datasets = []
    for domain, (name, flip) in enumerate(_COLOUR_FLIPS.items()):
        part = parts[domain]
        images, labels = colour(part.images[:, ::stride, ::stride], part.labels, flip, seed, domain)
        datasets.append(Dataset(f"ColoredMNIST/{name}", images, labels, 2))
    return Domains("ColoredMNIST", tuple(_COLOUR_FLIPS), tuple(datasets), 2)


def _check_size(name: str, image_size: int | None, allowed: tuple[int, ...]) -> int:
    if image_size is None:
        return allowed[0]
    if image_size not in allowed:
        raise ValueError(
            f"image_size must be {' or '.join(map(str, allowed))} for {name}, got {image_size!r}"
        )
    return image_size


def _deal_mnist(data_dir, num_domains: int, seed: int) -> list[Dataset]:
    """The training and test images of mnist5k together, shuffled, dealt like cards."""
    train, test = (sources.load("mnist5k", split, data_dir) for split in ("train", "test"))
    images = np.concatenate([train.images, test.images])
    labels = np.concatenate([train.labels, test.labels])
    order = random_order.permutation(len(labels), seed, random_order.DOMAIN_DEAL)
    hands = [order[domain::num_domains] for domain in range(num_domains)]
    return [Dataset("mnist5k", images[hand], labels[hand], 10) for hand in hands]


_EMBEDDED: dict[str, Callable[..., Domains]] = {
    "RotatedMNIST": _rotated_mnist,
    "ColoredMNIST": _colored_mnist,
}
DOMAIN_SETS = (*_EMBEDDED, *domain_folders.FOLDER_SETS)


def load_domains(
    name: str,
    data_dir: str | os.PathLike | None = None,
    *,
    seed: int = 0,
    image_size: int | None = None,
) -> Domains:
    """Opens a domain generalisation data set.

    RotatedMNIST: domains 0, 15, 30, 45, 60 and 75 degrees, 10 classes, 28x28x1.
    ColoredMNIST: domains +90%, +80% and -90% (how colour and label agree), 2 classes with 25% label
      noise, 28x28x2 as in DomainBed; image_size=14 keeps every other pixel as in the IRM paper.
    VLCS, PACS, OfficeHome, TerraIncognita, DomainNet, SVIRO: image files in DomainBed's layout
      `data_dir/SET/DOMAIN/CLASS/IMAGE`, stretched to 224x224x3 unless image_size says otherwise.

    Args:
      name: of the data set, as DomainBed spells it.
      data_dir: the folder that holds the set's folder; for the MNIST sets as in `load`.
      seed: which image falls to which domain, and the noise of ColoredMNIST.
      image_size: pixels a side; None for DomainBed's.

    Raises:
      ValueError: an unknown name, a size that the set does not have, or folders that are not as
        they should be, naming the folder.

    Example:
      >>> load_domains("RotatedMnist")  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ValueError: dataset must be one of RotatedMNIST, ColoredMNIST...

    References:
      Gulrajani and Lopez-Paz, "In Search of Lost Domain Generalization", ICLR 2021 (DomainBed).
    """
    checks.choice("dataset", name, DOMAIN_SETS)
    if name in _EMBEDDED:
        return _EMBEDDED[name](data_dir, seed, image_size)
    files = domain_folders.open_folder_set(
        name, data_dir, 224 if image_size is None else image_size
    )
    layout = domain_folders.FOLDER_SETS[name]
    return Domains(name, layout.domains, files, layout.num_classes)


def holdout_split(
    num_examples: int, fraction: float, seed: int, domain: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Splits a domain at random, whatever the classes, into a part to train on and a held-out part.

    The held-out part has floor(fraction * N) examples.

    Args:
      num_examples: N.
      fraction: share held out, in (0, 1) (DomainBed: 0.2).
      seed: a non-negative integer.
      domain: number of the domain, so that the domains of a seed are split independently.

    Returns:
      ("in" indices, "out" indices), both ascending int64; together 0..N-1, each once.

    Raises:
      ValueError: a value out of range, or too few examples for both parts.

    Example:
      >>> holdout_split(5, 0.2, seed=0)
      (array([1, 2, 3, 4]), array([0]))

    References:
      DomainBed, as `load_domains`.
    """
    num_examples = checks.integer("num_examples", num_examples, minimum=1)
    checks.number("fraction", fraction, 0.0, 1.0, open_low=True, open_high=True)
    held_out = int(fraction * num_examples)
    if held_out < 1:
        raise ValueError(
            f"fraction must hold out one of {num_examples} examples at least, got {fraction}"
        )
    domain = checks.integer("domain", domain, minimum=0)
    order = random_order.permutation(num_examples, seed, random_order.DOMAIN_HOLDOUT, domain)
    return np.sort(order[held_out:]), np.sort(order[:held_out])
