"""A data set in memory: images, labels and what they mean, checked once where they enter."""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

from lpa_jax import checks


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images in memory, read-only.

    Attributes:
      name: What errors and tables call it.
      images: uint8 or float32 [N, H, W, ch], in the units of the source (uint8: raw intensities).
      labels: int32 [N], values in 0..C-1 (any integer type is accepted and converted).
      num_classes: C.
      class_names: C names, or None.

    Raises:
      ValueError: Wrong type or rank, no example, lengths that differ, a label outside 0..C-1, an
        image value that is not finite, or a wrong number of class names.

    Example:
      >>> images = np.zeros((3, 4, 4, 1), np.uint8)
      >>> data = Dataset("toy", images, np.array([0, 1, 1]), num_classes=2)
      >>> len(data), data.counts, data.subset([2]).labels
      (3, array([1, 2]), array([1], dtype=int32))
    """

    name: str
    images: np.ndarray = dataclasses.field(repr=False)
    labels: np.ndarray = dataclasses.field(repr=False)
    num_classes: int
    class_names: tuple[str, ...] | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self):
        images = self.images
        if not isinstance(images, np.ndarray) or images.dtype not in (np.uint8, np.float32):
            kind = getattr(images, "dtype", type(images).__name__)
            raise ValueError(f"images must be a NumPy array of uint8 or float32, got {kind}")
        if images.ndim != 4 or images.size == 0:
            raise ValueError(f"images must be a non-empty [N, H, W, ch], got shape {images.shape}")
        num_classes = checks.integer("num_classes", self.num_classes, minimum=1)
        labels = checks.label_array(self.labels, num_classes)
        if len(labels) != len(images):
            raise ValueError(
                f"labels must be one for each of {len(images)} images, got {len(labels)}"
            )
        if images.dtype == np.float32 and not np.isfinite(images).all():
            raise ValueError("images must be finite, got nan or infinity")
        if self.class_names is not None:
            object.__setattr__(self, "class_names", tuple(self.class_names))
            if len(self.class_names) != num_classes:
                raise ValueError(
                    f"class_names must be {num_classes} names, got {len(self.class_names)}"
                )
        # views, so that the caller's own arrays stay writable
        for field, array in (("images", images.view()), ("labels", labels)):
            array.flags.writeable = False
            object.__setattr__(self, field, array)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, ch)."""
        return self.images.shape[1:]

    @property
    def counts(self) -> np.ndarray:
        """Examples of each class, N_c, int64 [C]."""
        return np.bincount(self.labels, minlength=self.num_classes)

    def subset(self, indices: ArrayLike) -> "Dataset":
        """The examples at `indices`, in that order, as a data set of its own (a copy).

        Args:
          indices: Integers [M] in 0..N-1.

        Raises:
          ValueError: Not a non-empty vector of integers in 0..N-1.
        """
        indices = checks.index_array(indices, len(self))
        return dataclasses.replace(self, images=self.images[indices], labels=self.labels[indices])
