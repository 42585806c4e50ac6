"""Times reading a folder of images in turn with torchvision's `ImageFolder` and `DataLoader`."""

import os
import warnings

import numpy as np

from experiments.compiled import against_torch, timing
from lpa_jax import data

WORKERS = 2  # those of the DataLoader; `read_ahead` has two threads


def measure(folder: str, image_size: int, batch_size: int, rounds: int) -> against_torch.Row:
    """One row: the time of an epoch, after one of warm-up; `steps` is its number of batches.

    Both stretch images to squares of 8-bit pixels, in a random order. The device would convert them
    to floating point.

    Args:
      folder: has one folder of images for each class.
      image_size: height and width of the squares.
      batch_size: B; an incomplete last batch is left out.
      rounds: number of rounds.

    Raises:
      ValueError: torchvision is not installed, the folder has no class folders or fewer than B
        images, or the two do not read the same pixels.
    """
    try:
        from torch.utils.data import DataLoader
        from torchvision import datasets, transforms
    except ImportError as error:
        raise ValueError(
            "needs torchvision, which is not installed: pip install torchvision"
        ) from error
    resize = transforms.Resize((image_size, image_size))
    try:
        theirs = datasets.ImageFolder(
            folder, transforms.Compose([resize, transforms.PILToTensor()])
        )
    except FileNotFoundError as error:
        raise ValueError("must hold class folders, each with at least one image") from error
    paths = [os.path.relpath(path, folder) for path, _ in theirs.samples]
    ours = data.open_image_files(
        "folder", folder, paths, theirs.targets, len(theirs.classes),
        image_size=image_size, fit="stretch",
    )  # fmt: skip
    _check_same(ours, theirs, range(0, len(paths), max(1, len(paths) // 16)))
    with warnings.catch_warnings():  # of more workers than cores, as under taskset
        warnings.simplefilter("ignore")
        loader = DataLoader(theirs, batch_size, shuffle=True, drop_last=True, num_workers=WORKERS)
    if not len(loader):
        raise ValueError(f"--batch_size must be at most the {len(paths)} images, got {batch_size}")
    batches = data.batches(ours, seed=0, batch_size=batch_size)

    def read_ours():
        with data.read_ahead(batches) as ahead:
            for step in range(len(loader)):
                ahead[step]

    def read_theirs():
        for _ in loader:
            pass

    with warnings.catch_warnings():  # of forks: the workers do not call JAX
        warnings.simplefilter("ignore")
        pair = timing.milliseconds(read_ours), timing.milliseconds(read_theirs)
        times = timing.in_turn(*pair, rounds, warm_up=1)
    return against_torch.row("read", folder, len(loader), f"{WORKERS} workers", times)


def _check_same(ours, theirs, indices) -> None:
    for index in indices:
        expected = theirs[index][0].numpy().transpose(1, 2, 0)
        if not np.array_equal(ours[index]["image"], expected):
            raise ValueError(f"both must read the same pixels, but do not from {ours.paths[index]}")
