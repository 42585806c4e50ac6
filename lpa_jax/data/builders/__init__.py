"""TFDS builders of the sets that ship inside packages: no download, no TensorFlow.

Importing this package registers them, so that `tfds.builder("mnist5k")` finds them too.
"""

from lpa_jax.data.builders.digits import Digits
from lpa_jax.data.builders.mnist5k import Mnist5k

BUILDERS = {"digits": Digits, "mnist5k": Mnist5k}

__all__ = ["BUILDERS", "Digits", "Mnist5k"]
