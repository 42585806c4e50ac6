"""Labelled image files on disk: checked when opened, decoded when asked for.

Nothing is skipped: a file that is missing, leads out of its root or cannot be decoded is a
`ValueError` that names it.
"""

import concurrent.futures
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike

from lpa_jax import checks
from lpa_jax.data import file_paths, optional
from lpa_jax.data.file_crops import FileCrop

if TYPE_CHECKING:
    import PIL.Image

# Extensions of torchvision's ImageFolder, which DomainBed reads with.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# What Pillow may take a file for, whatever its extension: no EPS, which starts Ghostscript.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "GIF", "TIFF", "WEBP")
# Of more than 8 bits a channel, which Pillow would clip rather than scale.
_DEEP_MODES = ("I", "F")
# Below the size at which Pillow itself warns; ImageNet's largest image has 2^24.
_MAX_PIXELS = 2**26
# A JPEG file may be larger, as it can be decoded at 1/2, 1/4 or 1/8 of its size. Photographs have
# up to 200 million pixels; a progressive file takes 6 bytes for each while it is decoded.
_MAX_JPEG_PIXELS = 2**28

FITS = ("crop", "stretch")
Placing = Callable[[int, int], tuple[float, float, float, float]]


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFiles(Sequence):
    """Random access to labelled image files; made by `open_image_files`.

    Attributes:
      name: What errors and tables call it.
      root: The folder that holds all images.
      paths: Paths of the files within root.
      labels: int32 [N], values in 0..C-1.
      num_classes: C.
      class_names: C names, or None.
      image_size: S; every image becomes [S, S, 3].
      fit: How it becomes that, see `decode`.
      list_file: The list that names the files, or None.
      lines: int64 [N], where in the list, or None.
      random_crop: How training batches crop each file, or None; see `cropped`.
    """

    name: str
    root: str
    paths: tuple[str, ...] = dataclasses.field(repr=False)
    labels: np.ndarray = dataclasses.field(repr=False)
    num_classes: int
    class_names: tuple[str, ...] | None = dataclasses.field(default=None, repr=False)
    image_size: int = 224
    fit: str = "crop"
    list_file: str | None = None
    lines: np.ndarray | None = dataclasses.field(default=None, repr=False)
    random_crop: FileCrop | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(S, S, 3)."""
        return (self.image_size, self.image_size, 3)

    @property
    def nbytes(self) -> int:
        """Bytes of all images once decoded."""
        return len(self) * math.prod(self.image_shape)

    @property
    def counts(self) -> np.ndarray:
        """Examples of each class, N_c, int64 [C]."""
        return np.bincount(self.labels, minlength=self.num_classes)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """{"image": uint8 [S, S, 3], "label": int32} of one example.

        Raises:
          ValueError: The file cannot be decoded.
        """
        return self._example(index, None)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """Several examples, decoded in threads."""
        return self.read(indices, [None] * len(indices))

    def read(self, indices: Sequence[int], draws: Sequence[Any]) -> list[dict[str, np.ndarray]]:
        """Several examples, decoded in threads, each with a random crop of its own.

        Args:
          indices: Indices of the examples, M.
          draws: Numbers from [0, 1) for each, [M, DRAWS]; None for no crop.

        Raises:
          ValueError: A file cannot be decoded.
        """
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(self._example, indices, draws))

    def cropped(self, crop: FileCrop) -> "ImageFiles":
        """These files, of which training batches show a random crop, anew in every epoch.

        Evaluation batches and single examples show them whole (`fit`).
        """
        return dataclasses.replace(self, random_crop=crop)

    def _example(self, index: int, draws: np.ndarray | None) -> dict[str, np.ndarray]:
        path = os.path.join(self.root, self.paths[index])
        place = self.fit
        if draws is not None:
            place = functools.partial(self.random_crop.box, draws=draws)
        try:
            image = decode(path, self.image_size, place)
        except ValueError as error:
            if self.lines is None:
                raise
            raise ValueError(f"{self.list_file}, line {self.lines[index]}: {error}") from None
        return {"image": image, "label": self.labels[index]}

    def damaged(self) -> dict[int, str]:
        """Decodes every file once: index -> why it cannot be decoded."""

        def reason(index: int) -> str | None:
            try:
                self[index]
            except ValueError as error:
                return str(error)
            return None

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            reasons = enumerate(pool.map(reason, range(len(self))))
            return {index: found for index, found in reasons if found is not None}

    def subset(self, indices: ArrayLike) -> "ImageFiles":
        """The examples at `indices`, in that order.

        Args:
          indices: Integers [M] in 0..N-1.

        Raises:
          ValueError: Not a non-empty vector of integers in 0..N-1.
        """
        indices = checks.index_array(indices, len(self))
        return dataclasses.replace(
            self,
            paths=tuple(self.paths[index] for index in indices.tolist()),
            labels=self.labels[indices],
            lines=None if self.lines is None else self.lines[indices],
        )


def decode(path: str, image_size: int, fit: str | Placing = "crop") -> np.ndarray:
    """Reads an image file as 8-bit RGB of one size.

    crop: the central square of 7/8 of the shorter side, that is 224 of 256 pixels.
    stretch: the whole image, whatever its proportions, as in DomainBed.
    a function: of width and height, the box (left, top, right, bottom), in pixels.

    Interpolation is bilinear with antialiasing. Grey, palette and CMYK images are converted,
    transparency and the EXIF orientation ignored, as torchvision's ImageFolder does. A JPEG file
    of more than 2^26 pixels is decoded at 1/2, 1/4 or 1/8 of its size.

    Args:
      path: Path of the file; its content, not its name, decides on the format.
      image_size: S, pixels.
      fit: "crop", "stretch" or a function.

    Returns:
      uint8 [S, S, 3].

    Raises:
      ValueError: Naming the file: it is missing, broken or cut short, has more than 2^26 pixels
        (JPEG: 2^28), or more than 8 bits a channel.

    Example:
      >>> import tempfile, PIL.Image
      >>> with tempfile.NamedTemporaryFile(suffix=".png") as file:
      ...     PIL.Image.new("L", (10, 20), 7).save(file.name)
      ...     decode(file.name, image_size=2).tolist()
      [[[7, 7, 7], [7, 7, 7]], [[7, 7, 7], [7, 7, 7]]]
    """
    optional.package("PIL.Image")  # A missing package is no broken file.
    try:
        with open(path, "rb") as file, _opened(file) as image:
            return np.asarray(_fitted(_rgb(image), image_size, fit))
    except MemoryError:
        raise
    # Pillow's readers meet broken files with nearly any exception.
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise ValueError(
            f"image {path!r}: cannot be decoded ({reason or type(error).__name__})"
        ) from None


def _opened(file: BinaryIO) -> "PIL.Image.Image":
    start = file.read(3)
    file.seek(0)
    if start != b"\xff\xd8\xff":
        return optional.package("PIL.Image").open(file, formats=_FORMATS)
    # Not PIL.Image.open, which refuses large files before their size can be reduced.
    image = optional.package("PIL.JpegImagePlugin").JpegImageFile(file)
    width, height = image.size
    if _MAX_PIXELS < width * height <= _MAX_JPEG_PIXELS:
        factor = next(f for f in (2, 4, 8) if -(-width // f) * -(-height // f) <= _MAX_PIXELS)
        image.draft(None, (width // factor, height // factor))  # Pillow rounds the factor down
    return image


def fitted(pixels: np.ndarray, image_size: int) -> np.ndarray:
    """Decoded pixels as `decode` makes them of a file: RGB of one size, the central square.

    Args:
      pixels: uint8 [H, W, 1 or 3].
      image_size: S, pixels.

    Returns:
      uint8 [S, S, 3].

    Raises:
      ValueError: Other pixels.

    Example:
      >>> fitted(np.full((10, 20, 1), 7, np.uint8), image_size=2).tolist()
      [[[7, 7, 7], [7, 7, 7]], [[7, 7, 7], [7, 7, 7]]]
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] not in (1, 3):
        raise ValueError(
            f"images must be uint8 [H, W, 1 or 3], got {pixels.dtype} {list(pixels.shape)}"
        )
    image = optional.package("PIL.Image").fromarray(
        pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    )
    return np.asarray(_fitted(_rgb(image), image_size, "crop"))


def _rgb(image: "PIL.Image.Image") -> "PIL.Image.Image":
    width, height = image.size
    if width * height > _MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels, must be at most {_MAX_PIXELS}")
    if image.mode.startswith(_DEEP_MODES):
        raise ValueError(f"mode {image.mode}, must have 8 bits a channel")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _fitted(image: "PIL.Image.Image", image_size: int, fit: str | Placing) -> "PIL.Image.Image":
    width, height = image.size
    if callable(fit):
        # Not resize(box=...), whose antialiasing looks at pixels outside the box.
        image, box = image.crop(fit(width, height)), None
    elif fit == "stretch":
        box = None
    else:
        side = min(width, height) * 7 / 8
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    bilinear = optional.package("PIL.Image").Resampling.BILINEAR
    return image.resize((image_size, image_size), bilinear, box=box)


def open_image_files(
    name: str,
    root: str | os.PathLike,
    paths: Sequence[str],
    labels: ArrayLike,
    num_classes: int,
    *,
    class_names: Sequence[str] | None = None,
    image_size: int = 224,
    fit: str = "crop",
    list_file: str | os.PathLike | None = None,
    lines: ArrayLike | None = None,
) -> ImageFiles:
    """Opens labelled image files for random access: all are looked up, none is decoded.

    Args:
      name: What errors and tables call the set.
      root: The folder that holds all images.
      paths: Paths of the files within root [N], with / between folders.
      labels: Integers in 0..C-1 [N].
      num_classes: C.
      class_names: C names.
      image_size: S, pixels; every image becomes [S, S, 3].
      fit: How it becomes that, see `decode`.
      list_file: For errors, the list that names the files.
      lines: For errors, the line of each file in the list [N].

    Raises:
      ValueError: No file, a root that is no folder, a path that leads out of it (absolute, with
        "..", or through a link), files that are missing (the first one and how many), labels that
        do not fit, or a size or fit out of range.
    """
    root = os.fspath(root)
    checks.choice("fit", fit, FITS)
    image_size = checks.integer("image_size", image_size, minimum=1)
    num_classes = checks.integer("num_classes", num_classes, minimum=1)
    labels = checks.label_array(labels, num_classes)
    if len(labels) != len(paths):
        raise ValueError(f"labels must be one for each of {len(paths)} paths, got {len(labels)}")
    files = ImageFiles(
        name=name,
        root=root,
        paths=tuple(paths),
        labels=labels,
        num_classes=num_classes,
        class_names=None if class_names is None else tuple(class_names),
        image_size=image_size,
        fit=fit,
        list_file=None if list_file is None else os.fspath(list_file),
        lines=None if lines is None else np.asarray(lines, np.int64),
    )
    found = file_paths.resolve(files.paths, root, functools.partial(_named, files))
    return dataclasses.replace(files, paths=found)


def _named(files: ImageFiles, index: int) -> str:
    """The file as an error names it."""
    prefix = "" if files.lines is None else f"{files.list_file}, line {files.lines[index]}: "
    return f"{prefix}image {files.paths[index]!r}"
