r"""Why it generalizes: flatness, loss landscape, amplification and calibration of trained models.

    python -m experiments.landscape --methods=erm,lpl,lpa,lpa+lpl --num_seeds=5

trains every method with every seed, or finds them in --workdir, and measures, by --parts:

- flatness: top Hessian eigenvalues, trace, worst-case and average sharpness of the training loss in
  weight space, plain and filter-normalised, which compares networks of different scales;
- spectrum: the density of all Hessian eigenvalues in weight space, by Lanczos quadrature;
- activation: flatness in the space of the activations at --measure_layers, per example;
- landscape: the loss along random filter-normalised lines, and over a plane for the first seed;
- amplification: growth of perturbations of LPA and AFP, and of random ones of the length of LPA's,
  from every layer to every later one, with the local bound: a heat map, layer x layer;
- geometry: effect of LPA's perturbation on norm, loss and logits of every class at every layer,
  with and without its half-space: is expansive positive, and does it move the logits as LPL does?
  geometry_classes.csv has a line a class; if runs logged it (--class_geometry_batches), also over
  the epochs of training;
- calibration: ECE and likelihood on the evaluation images, accuracy on corrupted ones.

Every part writes PART.csv and PART.md (mean ± standard error over seeds, paired differences to
ERM) and figures. estimator_error in the CSV is the mean standard error of the estimator within a
model, for an eigenvalue its Lanczos residual. Measurements are kept beside each run and repeated
only if a flag that decides them changes.
"""

import pathlib
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

from absl import flags

from experiments.images import compare
from experiments.images import flags as image_flags
from experiments.measuring import models as trained
from experiments.measuring.measurements import MEASUREMENTS
from experiments.measuring.settings import Measuring
from experiments.methods import names as methods
from experiments.reporting import (
    class_figures,
    frame,
    measured_figures,
    measured_tables,
    screen,
    tables,
)
from experiments.runtime import fields, files
from experiments.runtime import main as entry_point
from experiments.runtime.progress import RunProgress
from experiments.training import flags as run_flags
from lpa_jax.files import hold
from lpa_jax.training.interrupts import Interrupts

FLAGS = flags.FLAGS
# Longer tables are not printed, such as the geometry of every layer.
_SCREEN = 60
# Part -> measurements. The plane is measured for the first seed alone.
PARTS = {
    "flatness": ("flatness",),
    "spectrum": ("spectrum",),
    "activation": ("activation",),
    "landscape": ("line", "plane"),
    "amplification": ("amplification",),
    "geometry": ("geometry",),
    "calibration": ("calibration",),
}
_FIRST_SEED_ONLY = "plane"


def define_flags() -> None:
    trained.define_flags("landscape")
    flags.DEFINE_list("parts", list(PARTS), f"What to measure: {', '.join(PARTS)}.")
    fields.define(Measuring)


def measuring(model: str) -> Measuring:
    """Settings of the measurements from the parsed flags.

    Raises:
      ValueError: naming the first flag that is out of bounds.
    """
    fields.among("parts", FLAGS.parts, PARTS)
    # The probes follow the rule of the training, where the flags name one.
    rule = FLAGS.assignment or "frequency"
    return fields.read(Measuring, probe_assignment=rule).check(model)


def measure(
    models: trained.Models, how: Measuring, interrupts: Interrupts
) -> dict[str, dict[str, dict[int, Any]]]:
    """Measures every model; measurement -> method -> seed -> result."""
    names = [name for part in PARTS if part in FLAGS.parts for name in PARTS[part]]
    found: dict[str, dict[str, dict[int, Any]]] = {
        name: {method: {} for method in models.options} for name in names
    }
    # Seeds vary slowest: an interrupted job has complete pairs.
    places = [(seed, method) for seed in models.tasks for method in models.options]
    with RunProgress(len(places), len(names), FLAGS.quiet, unit="measurement") as progress:
        for seed, method in places:
            progress.start(f"{method} seed {seed}")
            # A model is loaded once, if anything is left to measure.
            load = cache(partial(models.load, method, seed))
            for number, name in enumerate(names):
                if name == _FIRST_SEED_ONLY and seed != places[0][0]:
                    continue
                progress.part(number, name)
                trained.stop_if_asked(interrupts)
                deciding = {field: getattr(how, field) for field in MEASUREMENTS[name][1]}
                try:
                    found[name][method][seed] = models.measured(
                        method, seed, name, deciding, partial(_measure, name, load, how)
                    )
                except ValueError as error:
                    raise ValueError(f"{method} seed {seed}, {name}: {error}") from error
            progress.finish(f"measured {', '.join(names)}")
    return found


def _measure(name: str, load: Callable[[], trained.Model], how: Measuring) -> dict[str, Any]:
    return MEASUREMENTS[name][0](load(), how)


def report(found: Mapping[str, measured_tables.Found], title: str, workdir: pathlib.Path) -> None:
    """Prints the tables, and writes them and the figures."""
    figures = {
        "flatness": measured_figures.flatness,
        "spectrum": measured_figures.spectra,
        "activation": measured_figures.flatness,
        "line": measured_figures.lines,
        "plane": measured_figures.planes,
        "amplification": measured_figures.amplification,
        "geometry": class_figures.every_form,
        "calibration": measured_figures.corrupted,
    }
    for name, measured in found.items():
        figures[name](measured, workdir / f"{name}.png")
        table = measured_tables.compare(measured, methods.ERM)
        if table.empty:
            continue
        files.write_text(workdir / f"{name}.csv", tables.csv_text(table))
        heading = f"{name}: {title}"
        text = measured_tables.markdown(table, heading)
        files.write_text(workdir / f"{name}.md", text + "\n" + measured_tables.LEGEND)
        if name == "geometry":
            classes = measured_tables.class_frame(measured)
            files.write_text(workdir / "geometry_classes.csv", tables.csv_text(classes))
        if text.count("\n") > _SCREEN:
            screen.show(f"{name}: a long table, in {workdir}/{name}.md\n")
        else:
            measured_tables.show(table, heading)
    if not FLAGS.quiet:
        screen.show(measured_tables.LEGEND)


def run(interrupts: Interrupts) -> None:
    """Trains or loads the models, measures them and reports."""
    settings = image_flags.settings()
    how = measuring(settings.model)
    options = compare.resolve_options(
        trained.tuned_hparams(settings),
        own=("--assignment",),  # of the probes
    )
    image_flags.prepare_data()
    workdir = pathlib.Path(FLAGS.workdir)
    models = trained.train_or_load(settings, options, workdir, interrupts)
    with hold(workdir), interrupts:
        found = measure(models, how, interrupts)
    # Without the measure: each part has images and measures of its own.
    title = frame.title_of(settings.as_dict()).rpartition(", ")[0]
    report(found, title, workdir)
    if "geometry" in found:
        class_figures.over_epochs(models.results, workdir / "geometry_epochs.png")
    run_flags.say(f"Written to {workdir}/")


def main(argv: list[str]) -> None:
    entry_point.run(argv, run)


if __name__ == "__main__":
    entry_point.start(define_flags, main)
