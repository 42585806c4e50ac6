r"""Balanced classification: does perturbing hidden layers class by class help with few images?

    python -m experiments.balanced --per_class=50

trains ERM, LPL, LPA and LPA+LPL on MNIST-5k with 50 training images a class and 3 paired seeds:
about a minute on 2 CPU cores. Which classes are augmented positively is decided by the network's
confidence in them (`--assignment=confidence`, the default here). CIFAR-10 on an accelerator, with
LPL's recipe:

    python -m experiments.balanced --dataset=cifar10 --prepare --model=wrn_28_10 --layer=stage3 \
        --augmentation=crop+flip --crop_padding=4 --epochs=240 --batch_size=128 \
        --learning_rate=0.1 --clip_norm=0 --schedule=step --milestones=0.25,0.5,0.667,0.833
"""

from absl import app, flags

from experiments import comparison, run_flags


def define_flags() -> None:
    """Flags of this module."""
    comparison.define_flags("balanced", profile="none")
    flags.FLAGS.set_default("assignment", "confidence")
    flags.adopt_module_key_flags(comparison)
    flags.adopt_module_key_flags(run_flags)


def main(argv: list[str]) -> None:
    """Entry point."""
    comparison.run("balanced", argv)


if __name__ == "__main__":
    define_flags()
    app.run(main)
