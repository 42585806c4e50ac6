"""Domain generalisation: sets of several domains, and their holdout split."""

import dataclasses
import os

import numpy as np

from lpa_jax import checks
from lpa_jax.data import domain_folders, domain_mnist, random_order
from lpa_jax.data.dataset import Dataset
from lpa_jax.data.image_files import ImageFiles


@dataclasses.dataclass(frozen=True, eq=False)
class Domains:
    """A data set of several domains with the same classes.

    Attributes:
      name: What errors and tables call it.
      domain_names: D names.
      datasets: D data sets, in memory or as image files (`in_memory` reads those that fit).
      num_classes: C.

    Raises:
      ValueError: Fewer than two domains, or numbers of names, data sets or classes that differ.

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
                f"data set {self.name!r} must have at least 2 domains, got {len(self.domain_names)}"
            )
        if len(self.datasets) != len(self.domain_names):
            raise ValueError(
                f"datasets of {self.name!r} must be one for each of {len(self.domain_names)} "
                f"domain names, got {len(self.datasets)}"
            )
        for domain, dataset in zip(self.domain_names, self.datasets, strict=True):
            if dataset.num_classes != self.num_classes:
                raise ValueError(
                    f"domain {domain!r} of {self.name!r} must have {self.num_classes} classes, "
                    f"got {dataset.num_classes}"
                )


DOMAIN_SETS = (*domain_mnist.EMBEDDED, *domain_folders.FOLDER_SETS)


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
      name: Name of the data set, as DomainBed spells it.
      data_dir: The folder that holds the set's folder; for the MNIST sets as in `load`.
      seed: Of the assignment of images to domains and of the noise of ColoredMNIST.
      image_size: Pixels a side; None for DomainBed's.

    Raises:
      ValueError: An unknown name, a size that the set does not have, or folders that are not as
        they should be, naming the folder.

    Example:
      >>> load_domains("RotatedMnist")  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ValueError: dataset must be one of RotatedMNIST, ColoredMNIST...

    References:
      Gulrajani and Lopez-Paz, "In Search of Lost Domain Generalization", ICLR 2021 (DomainBed).
    """
    checks.choice("dataset", name, DOMAIN_SETS)
    if name in domain_mnist.EMBEDDED:
        datasets = domain_mnist.EMBEDDED[name](data_dir, seed, image_size)
        num_classes = next(iter(datasets.values())).num_classes
        return Domains(name, tuple(datasets), tuple(datasets.values()), num_classes)
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
      fraction: Share held out, in (0, 1) (DomainBed: 0.2).
      seed: A non-negative integer.
      domain: Number of the domain, so that the domains of a seed are split independently.

    Returns:
      ("in" indices, "out" indices), both ascending int64; together 0..N-1, each once.

    Raises:
      ValueError: A value out of range, or too few examples for both parts.

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
