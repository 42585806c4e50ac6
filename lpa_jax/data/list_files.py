"""Image sets given by list files, as the long-tail literature publishes them: `path label` lines.

ImageNet-LT and Places-LT (Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR
2019) and iNaturalist 2018 (Van Horn et al., "The iNaturalist Species Classification and Detection
Dataset", CVPR 2018).
"""

import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from lpa_jax import checks
from lpa_jax.data.image_files import ImageFiles, open_image_files
from lpa_jax.files import read_bytes

# A typing error must not allocate a table of counts larger than the memory.
_MOST_CLASSES = 2**24


class PublishedLists(NamedTuple):
    """A published set.

    Attributes:
      num_classes: C.
      lists: Split -> name of its list file.
    """

    num_classes: int
    lists: Mapping[str, str]


def _lists(name: str, **splits: str) -> dict[str, str]:
    return {split: f"{name}_{suffix}.txt" for split, suffix in splits.items()}


# iNaturalist 2018 has no public test labels: results are reported on its validation list.
PUBLISHED = {
    "ImageNet_LT": PublishedLists(
        1000, _lists("ImageNet_LT", train="train", validation="val", test="test")
    ),
    "Places_LT": PublishedLists(
        365, _lists("Places_LT", train="train", validation="val", test="test")
    ),
    "iNaturalist18": PublishedLists(8142, _lists("iNaturalist18", train="train", test="val")),
}


def read_list(
    list_file: str | os.PathLike,
    image_root: str | os.PathLike,
    *,
    num_classes: int | None = None,
    all_classes: bool = False,
    name: str | None = None,
    image_size: int = 224,
    fit: str = "crop",
) -> ImageFiles:
    """Opens the images that a list file names.

    Each line is `path label`: a path within image_root, which may hold spaces, and the number of
    the class. Blank lines are skipped. A byte order mark, `./`, `//`, absolute paths below
    image_root, Windows separators and names in another Unicode form than the file's are understood.

    Args:
      list_file: A text file in UTF-8.
      image_root: The folder that the paths start from.
      num_classes: C; None for the largest label of the list plus 1.
      all_classes: Whether every class must have an image, as in a training list.
      name: What errors and tables call the set; None for the name of the list file.
      image_size: S, pixels; every image becomes [S, S, 3].
      fit: How it becomes that, see `decode`.

    Returns:
      `ImageFiles` in the order of the list.

    Raises:
      ValueError: Naming the list file, and the line where it is one: a list that cannot be read or
        is empty, a line that is not `path label`, a label outside 0..C-1 (without num_classes: of
        2^24 or more or, with all_classes, no smaller than the number of images), a file named
        twice, a path that leads out of image_root, images that are missing, or a class without an
        image.

    Example:
      >>> import pathlib, tempfile, PIL.Image
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     PIL.Image.new("RGB", (8, 8)).save(folder + "/a cat.png")
      ...     _ = pathlib.Path(folder, "train.txt").write_text("a cat.png 1")
      ...     train = read_list(folder + "/train.txt", folder, image_size=8)
      ...     train[0]["image"].shape, train.counts
      ((8, 8, 3), array([0, 1]))
    """
    list_file = os.fspath(list_file)
    if num_classes is not None:
        num_classes = checks.integer("num_classes", num_classes, minimum=1)
    paths, labels, lines = _parse(list_file, num_classes, all_classes)
    num_classes = max(labels) + 1 if num_classes is None else num_classes
    counts = np.bincount(labels, minlength=num_classes)
    if all_classes and counts.min() == 0:
        empty = np.flatnonzero(counts == 0)
        raise ValueError(
            f"{list_file}: class {empty[0]} has no image ({len(empty)} of {num_classes} classes "
            "have none)"
        )
    files = open_image_files(
        name or os.path.splitext(os.path.basename(list_file))[0],
        image_root,
        paths,
        labels,
        num_classes,
        image_size=image_size,
        fit=fit,
        list_file=list_file,
        lines=lines,
    )
    line_of: dict[str, int] = {}
    for path, line in zip(files.paths, lines, strict=True):
        if line_of.setdefault(path, line) != line:
            raise ValueError(
                f"{list_file}, line {line}: image {path!r} is in line {line_of[path]} already"
            )
    return files


def _parse(
    list_file: str, num_classes: int | None, all_classes: bool
) -> tuple[list[str], list[int], list[int]]:
    """Paths, labels and line numbers."""
    try:
        # utf-8-sig, because editors of Windows begin a file with a byte order mark
        text = read_bytes(list_file).decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"list file {list_file!r}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"list file {list_file!r}: must be text in UTF-8") from None
    rows = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    limit, reason = _MOST_CLASSES if num_classes is None else num_classes, ""
    if num_classes is None and all_classes:
        limit = min(limit, sum(bool(row.strip()) for row in rows))
        reason = f", as every class must have one of the {limit} images"
    paths, labels, lines = [], [], []
    for line, row in enumerate(rows, start=1):
        if not row.strip():
            continue
        place = f"{list_file}, line {line}"
        parts = row.strip().rsplit(maxsplit=1)
        if len(parts) < 2:
            raise ValueError(f"{place}: must be `path label`, got {row[:80]!r}")
        path, label = parts
        # isdecimal alone would let other scripts' digits through
        if not (label.isascii() and label.isdecimal()):
            raise ValueError(f"{place}: label must be a whole number, got {label[:20]!r}")
        if int(label[:10]) >= limit:
            raise ValueError(f"{place}: label {label[:20]!r} must be in 0..{limit - 1}{reason}")
        paths.append(path)
        labels.append(int(label))
        lines.append(line)
    if not labels:
        raise ValueError(f"{list_file}: names no image")
    return paths, labels, lines


def open_published(
    name: str,
    split: str,
    data_dir: str | os.PathLike | None,
    *,
    image_root: str | os.PathLike | None = None,
    image_size: int = 224,
) -> ImageFiles:
    """Opens a split of ImageNet-LT, Places-LT or iNaturalist 2018.

    Args:
      name: "ImageNet_LT", "Places_LT" or "iNaturalist18".
      split: "train", "validation" (not of iNaturalist18) or "test" (its validation list).
      data_dir: The folder of the list files, which keep their published names.
      image_root: The folder that the lists' paths start from; None for data_dir.
      image_size: S, pixels.

    Raises:
      ValueError: An unknown name or split, no data_dir, or as `read_list`.

    Example:
      >>> open_published("iNaturalist18", "validation", "lists")
      Traceback (most recent call last):
      ValueError: split of iNaturalist18 must be one of train, test, got 'validation'
    """
    checks.choice("dataset", name, PUBLISHED)
    published = PUBLISHED[name]
    checks.choice(f"split of {name}", split, published.lists)
    if data_dir is None:
        raise ValueError(
            f"data_dir must be the folder that holds {published.lists['train']}, got None"
        )
    return read_list(
        os.path.join(data_dir, published.lists[split]),
        data_dir if image_root is None else image_root,
        num_classes=published.num_classes,
        all_classes=split == "train",
        name=name,
        image_size=image_size,
    )
