r"""Balanced classification: does perturbing hidden layers class by class help with few images?

    python -m experiments.balanced --per_class=50

trains ERM, LPL, LPA and LPA+LPL on MNIST-5k with 50 training images a class and 3 paired seeds:
about a minute on 2 CPU cores. The network's confidence in a class decides the sign of its
augmentation (`--assignment=confidence`, the default here). CIFAR-10 on an accelerator, with LPL's
recipe:

    python -m experiments.balanced --dataset=cifar10 --prepare --layer=stage3

takes WRN-28-10, 240 epochs and the rest of the recipe from `experiments.methods.data_set_defaults`.
Flags override single values of it, --recipe=none all of them.
"""

from absl import flags

from experiments.images import compare
from experiments.runtime import main as entry_point


def define_flags() -> None:
    compare.define_flags("balanced", profile="none")
    flags.FLAGS.set_default("assignment", "confidence")


def main(argv: list[str]) -> None:
    compare.main("balanced", argv)


if __name__ == "__main__":
    entry_point.start(define_flags, main)
