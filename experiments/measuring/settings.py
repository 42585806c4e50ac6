"""What `landscape` measures with: the settings behind its flags."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax

from experiments.measuring import models as trained
from experiments.measuring.models import Model
from lpa_jax import models, pgd
from lpa_jax.diagnostics import corruptions
from lpa_jax.injection import check_layer

Batches = Sequence[Mapping[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Measuring:
    """How to measure; the flags of the same names explain the fields."""

    measure_on: str = "train"
    measure_batches: int = 4
    measure_batch_size: int = 256
    measure_layers: tuple[str, ...] = ()
    eigenvalues: int = 3
    lanczos_steps: int = 25
    probes: int = 32
    spectrum_probes: int = 4
    sharpness_radius: float = 0.05
    average_radius: float = 1.0
    activation_radius: float = 0.1
    directions: int = 3
    resolution: int = 15
    span: float = 1.0
    probe_radius: float = 0.1
    probe_geometries: tuple[str, ...] = ("signed", "free")
    probe_assignment: str = "frequency"
    power_iterations: int = 30
    corruptions: tuple[str, ...] = corruptions.names()
    severities: tuple[int, ...] = (1, 3, 5)

    def check(self, model: str) -> "Measuring":
        """Returns itself, with all hidden layers of the model where none is named.

        Raises:
          ValueError: one line naming the first flag that is out of range.
        """
        for name, low in (
            ("measure_batches", 1),
            ("measure_batch_size", 2),
            ("eigenvalues", 1),
            ("lanczos_steps", self.eigenvalues),
            ("probes", 2),
            ("spectrum_probes", 2),
            ("directions", 1),
            ("resolution", 3),
            ("power_iterations", 1),
        ):
            if getattr(self, name) < low:
                raise ValueError(f"--{name} must be >= {low}, got {getattr(self, name)}")
        for name in (
            "sharpness_radius", "average_radius", "activation_radius", "span", "probe_radius"
        ):  # fmt: skip
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"--{name} must be finite and > 0, got {value!r}")
        for name in self.probe_geometries:
            if name not in pgd.GEOMETRIES:
                known = ", ".join(pgd.GEOMETRIES)
                raise ValueError(f"--probe_geometries must be among {known}, got {name!r}")
        if not self.probe_geometries:
            raise ValueError("--probe_geometries must name at least one")
        for name in self.corruptions:
            if name not in corruptions.names():
                known = ", ".join(corruptions.names())
                raise ValueError(f"--corruptions must be among {known}, got {name!r}")
        for severity in self.severities:
            if severity not in range(1, 6):
                raise ValueError(f"--severities must be from 1 to 5, got {severity}")
        if not (self.corruptions and self.severities):
            empty = "severities" if self.corruptions else "corruptions"
            raise ValueError(f"--{empty} must name at least one")
        layers = models.create(model, 2).layers
        for layer in self.measure_layers:
            try:
                check_layer(layers, layer)
            except ValueError as error:
                raise ValueError(f"--measure_layers: {error}") from None
        return dataclasses.replace(self, measure_layers=self.measure_layers or layers[1:-1])

    def batches(self, model: Model) -> Batches:
        """The images that are measured on."""
        dataset = model.task.train if self.measure_on == "train" else model.task.evaluation
        return trained.batches(model.task, dataset, self.measure_batch_size, self.measure_batches)
