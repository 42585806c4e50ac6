"""Per-channel normalisation from the training split."""

import dataclasses
import math

import jax
import numpy as np

from lpa_jax import checks

# images read into float64 at a time, so that a large set does not need eight times its memory
_CHUNK = 4096


@dataclasses.dataclass(frozen=True)
class Normalization:
    """Subtracts a mean and divides by a standard deviation, channel by channel.

    Both are in the units of the images (raw intensities for uint8), so there is no 1/255 to forget:
    (x/255 - m/255) / (s/255) = (x - m) / s. Hashable, so it may be closed over or static in jit.

    Attributes:
      mean: One number a channel.
      std: One positive number a channel.

    Raises:
      ValueError: Lengths that differ, no channel, a value that is not finite, or a std that is not
        positive.

    Example:
      >>> images = np.array([[[[0]], [[4]]]], np.uint8)  # [1, 2, 1, 1]
      >>> scale = Normalization.fit(images)
      >>> scale
      Normalization(mean=(2.0,), std=(2.0,))
      >>> scale.apply(images).ravel()
      array([-1.,  1.], dtype=float32)
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self):
        for field in ("mean", "std"):
            object.__setattr__(self, field, tuple(float(value) for value in getattr(self, field)))
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(
                "mean and std must be equally many channels, at least 1, "
                f"got {len(self.mean)} and {len(self.std)}"
            )
        checks.vector("mean", self.mean, -math.inf)
        checks.vector("std", self.std, open_low=True)

    @classmethod
    def fit(cls, images: np.ndarray) -> "Normalization":
        """The mean and (population) standard deviation of each channel over N, H and W.

        A channel that is constant gets std 1, so that it becomes zero rather than infinite. Pass
        the training images only: the test split must not influence training.

        Args:
          images: uint8 or float32 [N, H, W, ch].

        Raises:
          ValueError: Images that are not a non-empty [N, H, W, ch].
        """
        if images.ndim != 4 or images.size == 0:
            raise ValueError(f"images must be a non-empty [N, H, W, ch], got shape {images.shape}")
        chunks = range(0, len(images), _CHUNK)
        per_channel = images.size // images.shape[-1]

        def total(function):
            parts = (function(images[i : i + _CHUNK].astype(np.float64)) for i in chunks)
            return sum(part.sum((0, 1, 2)) for part in parts)

        mean = total(lambda x: x) / per_channel
        # a second pass: E[x^2] - E[x]^2 loses all digits when the mean is large
        std = np.sqrt(total(lambda x: (x - mean.reshape(1, 1, 1, -1)) ** 2) / per_channel)
        return cls(tuple(mean), tuple(np.where(std > 0, std, 1.0)))

    def apply(self, images: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
        """Float32 images of the same shape: NumPy for NumPy, JAX for JAX (under jit too).

        Args:
          images: [..., ch] of any real type.

        Raises:
          ValueError: Another number of channels.
        """
        if images.shape[-1] != len(self.mean):
            raise ValueError(
                f"images must have {len(self.mean)} channels, got shape {images.shape}"
            )
        channels = (1,) * (images.ndim - 1) + (-1,)
        mean, std = (
            np.asarray(value, np.float32).reshape(channels) for value in (self.mean, self.std)
        )
        return (images.astype(np.float32) - mean) / std


# Of ImageNet's training images at 224 pixels, in units of uint8: what pretrained networks and
# DomainBed take for every photographic set.
IMAGENET_NORMALIZATION = Normalization(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
