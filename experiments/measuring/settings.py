"""What `landscape` measures with."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax

from experiments.measuring import models as trained
from experiments.measuring.models import Model
from experiments.runtime import fields
from experiments.runtime.fields import named, setting
from lpa_jax import models, pgd
from lpa_jax.diagnostics import corruptions
from lpa_jax.injection import check_layer

Batches = Sequence[Mapping[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Measuring:
    """How to measure."""

    GROUP: ClassVar[str] = "measuring"

    measure_on: str = setting(
        "train",
        "Images of all parts but calibration, which takes the evaluation images.",
        allowed=("train", "evaluation"),
    )
    measure_batches: int = setting(
        4, "Number of batches of them, drawn at random.", low=1, high=10**6
    )
    measure_batch_size: int = setting(256, "Images in each batch.", low=2, high=2**20)
    measure_layers: tuple[str, ...] = setting(
        (), "Layers of activation and geometry; unset: all hidden layers."
    )
    eigenvalues: int = setting(3, "Number of largest Hessian eigenvalues.", low=1, high=1000)
    lanczos_steps: int = setting(
        25,
        "Hessian products for the eigenvalues, and for each probe of the spectrum.",
        low=1,
        high=10**4,
    )
    probes: int = setting(32, "Random vectors for the trace.", low=2, high=10**5)
    spectrum_probes: int = setting(4, "Random vectors for the spectral density.", low=2, high=10**5)
    sharpness_radius: float = setting(
        0.05,
        "Radius of the worst case, in units of the weights or (normalised) of the filters' norms.",
        above=0,
    )
    average_radius: float = setting(
        1.0, "Radius of the sphere of the average sharpness, in the same units.", above=0
    )
    activation_radius: float = setting(
        0.1, "Radius at activations, relative to mean ||h||.", above=0
    )
    directions: int = setting(3, "Random lines through the weights.", low=1, high=10**4)
    resolution: int = setting(
        15, "Points on a side of the plane; a line has twice as many and 1.", low=3, high=1000
    )
    span: float = setting(1.0, "Length of lines and plane to each side, in filter norms.", above=0)
    probe_radius: float = setting(
        0.1,
        "Radius of the perturbations of amplification and geometry, relative to mean ||h||.",
        above=0,
    )
    probe_geometries: tuple[str, ...] = setting(
        ("signed", "free"),
        f"Forms of LPA that geometry measures, among {', '.join(pgd.GEOMETRIES)}.",
        allowed=pgd.GEOMETRIES,
        nonempty=True,
    )
    # The rule of the training, where a flag names one; not a flag of its own.
    probe_assignment: str = "frequency"
    power_iterations: int = setting(
        30, "Most power iterations for a local bound.", low=1, high=10**6
    )
    corruptions: tuple[str, ...] = setting(
        corruptions.names(),
        f"Among {', '.join(corruptions.names())}.",
        allowed=corruptions.names,
        nonempty=True,
    )
    severities: tuple[int, ...] = setting(
        (1, 3, 5), "From 1 (weak) to 5.", low=1, high=5, nonempty=True
    )

    def check(self, model: str) -> "Measuring":
        """Returns itself, with all hidden layers of the model where none is named.

        Raises:
          ValueError: one line naming the first flag that is out of bounds.
        """
        fields.check(self)
        if self.lanczos_steps < self.eigenvalues:
            raise ValueError(
                f"--lanczos_steps must be >= {self.eigenvalues} (--eigenvalues), "
                f"got {self.lanczos_steps}"
            )
        layers = models.create(model, 2).layers
        for layer in self.measure_layers:
            named("measure_layers", lambda layer=layer: check_layer(layers, layer))
        return dataclasses.replace(self, measure_layers=self.measure_layers or layers[1:-1])

    def batches(self, model: Model) -> Batches:
        """The images that are measured on."""
        dataset = model.task.train if self.measure_on == "train" else model.task.evaluation
        return trained.batches(model.task, dataset, self.measure_batch_size, self.measure_batches)
