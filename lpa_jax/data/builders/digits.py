"""Digits: the 1797 handwritten digits of 8x8 pixels that ship in scikit-learn."""

import numpy as np
import tensorflow_datasets as tfds

from lpa_jax.data import optional
from lpa_jax.data.builders import packaged


class Digits(packaged.PackagedBuilder):
    """1797 images 8x8x1, 10 classes: 1297 train, 500 test (50 a class); intensities 0..16.

    Source: the test part of "Optical Recognition of Handwritten Digits", UCI (Alpaydin and Kaynak,
      1998).
    """

    VERSION = tfds.core.Version("1.0.0")
    IMAGE_SHAPE = (8, 8, 1)
    NUM_CLASSES = 10
    TEST_PER_CLASS = 50
    DESCRIPTION = "Handwritten digits, 8x8 pixels with intensities 0..16, shipped in scikit-learn."
    HOMEPAGE = "https://scikit-learn.org/stable/datasets/toy_dataset.html"

    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        # half a second of import that reading back does without
        digits = optional.package("sklearn.datasets").load_digits()
        return digits.images.astype(np.uint8)[..., None], digits.target
