"""Small experiments of both protocols: their commands, and their runs without a command line."""

import dataclasses
from typing import NamedTuple

from experiments.domains.data import DomainSource
from experiments.domains.networks import Training, Trainings
from experiments.domains.settings import DomainSettings
from experiments.images.data import TaskSource
from experiments.images.job import ImageJob
from experiments.images.settings import Settings
from experiments.training.program import Programs

DOMAINS = ("+90%", "+80%", "-90%")


class Protocol(NamedTuple):
    """Names of the two experiments of a protocol, and flags that make them small."""

    compare: str
    tune: str
    tiny: tuple[str, ...]


IMAGES = Protocol(
    "long_tail", "tune", ("--dataset=digits", "--imbalance=10", "--epochs=2", "--evaluate_every=1")
)
DOMAIN = Protocol(
    "domain_generalization",
    "domain_tune",
    ("--dataset=ColoredMNIST", "--image_size=14", "--images_per_domain=40", "--model=mlp",
     "--train_steps=4", "--evaluate_every=2", "--batch_size=4"),
)  # fmt: skip
PROTOCOLS = (IMAGES, DOMAIN)


class ImageRuns:
    """Jobs of classification that differ in method, options, seed and settings."""

    penalty = "isda"

    def __init__(self, data_dir):
        self.settings = Settings(dataset="digits", data_dir=str(data_dir), imbalance=10, epochs=2,
                                 evaluate_every=1, batch_size=32).check()  # fmt: skip
        self.source = TaskSource(self.settings)
        self.programs = Programs(self.settings)

    def job(self, method, options, seed=0, **changes):
        """A job; `changes` are of the settings and have a program of their own."""
        programs = self.programs
        if changes:
            programs = Programs(dataclasses.replace(self.settings, **changes).check())
        task = self.source.task(seed)
        return ImageJob(programs.program(method, options, task), task, seed)


class DomainRuns:
    """Jobs of domain generalization, likewise."""

    penalty = "coral"

    def __init__(self, data_dir):
        self.settings = DomainSettings(dataset="ColoredMNIST", data_dir=str(data_dir),
                                       image_size=14, images_per_domain=40, model="mlp",
                                       train_steps=4, evaluate_every=2,
                                       batch_size=4).check()  # fmt: skip
        self.source = DomainSource(self.settings)
        self.trainings = Trainings(self.settings, self.source, None)

    def job(self, method, options, seed=0, held_out=("+90%",), **changes):
        """A job; `changes` are of the settings and have a program of their own."""
        trainings = self.trainings
        if changes:
            settings = dataclasses.replace(self.settings, **changes).check()
            trainings = Trainings(settings, self.source, None)
        return trainings.job(Training(method, options, held_out, seed))
