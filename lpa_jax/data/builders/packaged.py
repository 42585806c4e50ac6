"""What the packaged builders share: arrays in, a balanced test split out."""

import abc
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from lpa_jax.data import splits


class PackagedBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS builder over arrays that a package ships.

    The images are `Tensor` features (`tfds.features.Image` would need TensorFlow to prepare). The
    test split holds TEST_PER_CLASS examples of every class, drawn with seed 0: a fixed part of the
    data set, to be changed only together with VERSION.
    """

    IMAGE_SHAPE: tuple[int, int, int]
    NUM_CLASSES: int
    TEST_PER_CLASS: int
    DESCRIPTION: str
    HOMEPAGE: str

    @abc.abstractmethod
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns images uint8 [N, H, W, ch] and integer labels [N]."""

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
        # the key, the place in the package's arrays, fixes the order in which TFDS stores the
        # examples
        for index in indices.tolist():
            yield index, {"image": images[index], "label": int(labels[index])}
