"""Random resized crops of image files at their own size, drawn while they are decoded."""

import dataclasses
import math

import numpy as np

from lpa_jax.data.augment import resized_crop


@dataclasses.dataclass(frozen=True)
class FileCrop:
    """The random resized crop of `augment.random_resized_crop`, of images of any size.

    On the device all images have one size already; here a box is cut out of the photograph as it
    was taken, in its own proportions, before anything is lost to resizing.

    Attributes:
      scale: Lowest and highest share of the area, 0 < low <= high <= 1.
      ratio: Lowest and highest ratio of width to height, 0 < low <= high.

    Raises:
      ValueError: Not such a range.

    Example:
      >>> FileCrop(scale=(0.25, 0.25), ratio=(1, 1)).box(40, 20, np.full(resized_crop.DRAWS, 0.5))
      (13, 3, 27, 17)

    References:
      Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, section 6, as in torchvision's
      RandomResizedCrop.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        """Checks the ranges."""
        for name, highest in (("scale", 1.0), ("ratio", math.inf)):
            checked = resized_crop.checked_range(name, getattr(self, name), highest)
            object.__setattr__(self, name, checked)

    def box(self, width: int, height: int, draws: np.ndarray) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the box that numbers from [0, 1) draw.

        Args:
          width: Width of the image, pixels.
          height: Height of the image, pixels.
          draws: [`resized_crop.DRAWS`].
        """
        areas, ratios, corner = np.split(draws, (resized_crop.ATTEMPTS, 2 * resized_crop.ATTEMPTS))
        areas = width * height * (self.scale[0] + (self.scale[1] - self.scale[0]) * areas)
        low, high = np.log(self.ratio)
        ratios = np.exp(low + (high - low) * ratios)
        sizes = np.rint(np.sqrt([areas * ratios, areas / ratios])).astype(int).T
        room = (width, height) - sizes
        fitting = np.flatnonzero(np.all((sizes > 0) & (room >= 0), axis=1))
        if fitting.size:
            size, room = sizes[fitting[0]], room[fitting[0]]
            left, top = (corner[::-1] * (room + 1)).astype(int).tolist()
        else:
            size = np.array(resized_crop.central_box(height, width, self.ratio)[::-1])
            left, top = (((width, height) - size) // 2).tolist()
        return left, top, left + int(size[0]), top + int(size[1])
