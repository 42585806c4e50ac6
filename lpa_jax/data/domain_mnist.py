"""RotatedMNIST and ColoredMNIST as in DomainBed, made of the 5000 MNIST images of `mnist5k`.

DomainBed joins MNIST's training and test images before it assigns them to domains, and so does
this module: the test set of the protocol is a domain that training never sees. Each image is in one
domain, so no image is both trained on and tested on.
"""

import os
from collections.abc import Callable

import numpy as np

from lpa_jax.data import optional, random_order, sources
from lpa_jax.data.dataset import Dataset

_ANGLES = (0, 15, 30, 45, 60, 75)
# domain -> probability that the colour differs from the label
_COLOUR_FLIPS = {"+90%": 0.1, "+80%": 0.2, "-90%": 0.9}
_LABEL_NOISE = 0.25

PathLike = str | os.PathLike


def rotate(images: np.ndarray, degrees: float) -> np.ndarray:
    """Rotates counter-clockwise about the centre, bilinearly; what moves in from outside is 0.

    Args:
      images: uint8 [N, H, W, 1].
      degrees: The angle.

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

    The image is in the channel of its colour, the other channel is 0.

    Args:
      images: uint8 [N, H, W, 1].
      digits: Integers 0..9 [N].
      flip: Probability that the colour differs from the label.
      seed: A non-negative integer.
      domain: Number of the domain, so that each has coin tosses of its own.

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


def rotated_mnist(
    data_dir: PathLike | None, seed: int, image_size: int | None
) -> dict[str, Dataset]:
    """The domains of RotatedMNIST by name; see `domains.load_domains`."""
    _check_size("RotatedMNIST", image_size, (28,))
    parts = _assigned_mnist(data_dir, len(_ANGLES), seed)
    return {
        str(angle): Dataset(f"RotatedMNIST/{angle}", rotate(part.images, angle), part.labels, 10)
        for angle, part in zip(_ANGLES, parts, strict=True)
    }


def colored_mnist(
    data_dir: PathLike | None, seed: int, image_size: int | None
) -> dict[str, Dataset]:
    """The domains of ColoredMNIST by name; see `domains.load_domains`."""
    stride = 28 // _check_size("ColoredMNIST", image_size, (28, 14))
    parts = _assigned_mnist(data_dir, len(_COLOUR_FLIPS), seed)
    datasets = {}
    for domain, (name, flip) in enumerate(_COLOUR_FLIPS.items()):
        images = parts[domain].images[:, ::stride, ::stride]
        images, labels = colour(images, parts[domain].labels, flip, seed, domain)
        datasets[name] = Dataset(f"ColoredMNIST/{name}", images, labels, 2)
    return datasets


EMBEDDED: dict[str, Callable[..., dict[str, Dataset]]] = {
    "RotatedMNIST": rotated_mnist,
    "ColoredMNIST": colored_mnist,
}


def _check_size(name: str, image_size: int | None, allowed: tuple[int, ...]) -> int:
    if image_size is None:
        return allowed[0]
    if image_size not in allowed:
        raise ValueError(
            f"image_size must be {' or '.join(map(str, allowed))} for {name}, got {image_size!r}"
        )
    return image_size


def _assigned_mnist(data_dir: PathLike | None, num_domains: int, seed: int) -> list[Dataset]:
    """The training and test images of mnist5k, shuffled together and shared out among domains."""
    train, test = (sources.load("mnist5k", split, data_dir) for split in ("train", "test"))
    images = np.concatenate([train.images, test.images])
    labels = np.concatenate([train.labels, test.labels])
    order = random_order.permutation(len(labels), seed, random_order.DOMAIN_ASSIGNMENT)
    parts = [order[domain::num_domains] for domain in range(num_domains)]
    return [Dataset("mnist5k", images[part], labels[part], 10) for part in parts]
