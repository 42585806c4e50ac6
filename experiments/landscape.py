r"""Why it generalizes: flatness, loss landscape, amplification and calibration of trained models.

    python -m experiments.landscape --methods=erm,lpl,lpa,lpa+lpl --seeds=5

trains (or finds in --workdir) every method with every seed and measures, part by part (--parts):

- flatness: top Hessian eigenvalues, trace, worst-case and average sharpness of the training loss in
  weight space, as they are and filter-normalised, where networks of other scales compare;
- spectrum: the density of all Hessian eigenvalues in weight space, by Lanczos quadrature;
- activation: flatness in the space of the activations at --measure_layers, per example;
- landscape: the loss along random filter-normalised lines, and over a plane for the first seed;
- amplification: how LPA's perturbation, AFP's and random ones of LPA's length grow from every layer
  to every later one, with the local bound beside them: a heat map, layer x layer;
- geometry: what LPA's perturbation does to norm and loss of every class at every layer, with and
  without its half-space: is expansive positive? geometry_classes.csv has a line a class; and,
  if runs logged it (--class_geometry_batches), the same over the epochs of training;
- calibration: ECE and likelihood on the evaluation images, accuracy on corrupted ones.

For each part it writes PART.csv and PART.md (mean +- standard error over seeds, paired differences
to ERM) and figures; estimator_error in the CSV is the mean standard error of the estimator within a
model, of an eigenvalue its Lanczos residual. Finished measurements are kept beside each run and
repeated only when a flag that decides them changes.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

from absl import app, flags

from experiments.images import compare as comparison
from experiments.measuring import models as trained
from experiments.measuring.measurements import MEASUREMENTS
from experiments.measuring.settings import Measuring
from experiments.methods import names as methods
from experiments.reporting import (
    geometry_plots,
    measure_plots,
    measure_tables,
    spectrum_plots,
    summary,
)
from experiments.runtime import files
from experiments.runtime import main as entry_point
from experiments.training import flags as run_flags
from lpa_jax import pgd, workdir_lock
from lpa_jax.diagnostics import corruptions
from lpa_jax.interrupts import Interrupts

FLAGS = flags.FLAGS
# Lines of a table that is printed whole; the geometry of every layer has more.
_SCREEN = 60
# --parts, and what each measures; the plane is measured for the first seed alone.
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
# method -> seed -> what a function of `measurements` returned
Found = Mapping[str, Mapping[int, Mapping[str, Any]]]


def define_flags() -> None:
    """Flags of this module; the defaults of what to measure are those of `Measuring`."""
    trained.define_flags("landscape")
    how = Measuring()
    flags.DEFINE_list("parts", list(PARTS), f"What to measure: {', '.join(PARTS)}.")
    flags.DEFINE_enum(
        "measure_on",
        how.measure_on,
        ["train", "evaluation"],
        "Images of all parts but calibration, which takes the evaluation images.",
    )
    flags.DEFINE_integer("measure_batches", how.measure_batches, "Batches of them, at random.")
    flags.DEFINE_integer("measure_batch_size", how.measure_batch_size, "Images in each.")
    flags.DEFINE_list(
        "measure_layers", [], "Layers of activation and geometry; unset: all hidden ones."
    )
    flags.DEFINE_integer("eigenvalues", how.eigenvalues, "Largest Hessian eigenvalues to find.")
    flags.DEFINE_integer(
        "lanczos_steps",
        how.lanczos_steps,
        "Hessian products to find them by, and those of each probe of the spectrum.",
    )
    flags.DEFINE_integer("probes", how.probes, "Random vectors for the trace.")
    flags.DEFINE_integer(
        "spectrum_probes", how.spectrum_probes, "Random vectors for the spectral density."
    )
    flags.DEFINE_float(
        "sharpness_radius",
        how.sharpness_radius,
        "Ball of the worst case, in units of the weights or (normalised) of the filters' norms.",
    )
    flags.DEFINE_float(
        "average_radius", how.average_radius, "Sphere of the average sharpness, same units."
    )
    flags.DEFINE_float(
        "activation_radius", how.activation_radius, "Ball at activations, relative to mean ||h||."
    )
    flags.DEFINE_integer("directions", how.directions, "Random lines through the weights.")
    flags.DEFINE_integer(
        "resolution", how.resolution, "Points a side of the plane; twice as many and 1 on a line."
    )
    flags.DEFINE_float("span", how.span, "Reach of lines and plane, in filter norms.")
    flags.DEFINE_float(
        "probe_radius",
        how.probe_radius,
        "Radius of the perturbations of amplification and geometry, relative to mean ||h||.",
    )
    flags.DEFINE_list(
        "probe_geometries",
        list(how.probe_geometries),
        f"Forms of LPA that geometry measures, among {', '.join(pgd.GEOMETRIES)}.",
    )
    flags.DEFINE_integer(
        "power_iterations", how.power_iterations, "Most power iterations for a local bound."
    )
    flags.DEFINE_list(
        "corruptions", list(how.corruptions), f"Among {', '.join(corruptions.names())}."
    )
    flags.DEFINE_list("severities", [str(s) for s in how.severities], "From 1 (weak) to 5.")
    flags.adopt_module_key_flags(comparison)
    flags.adopt_module_key_flags(run_flags)


def measuring(model: str) -> Measuring:
    """How to measure, from the parsed flags.

    Raises:
      ValueError: naming the first flag that is out of range.
    """
    for part in FLAGS.parts:
        if part not in PARTS:
            raise ValueError(f"--parts must be among {', '.join(PARTS)}, got {part!r}")
    if not FLAGS.parts:
        raise ValueError("--parts must name at least one")
    try:
        severities = tuple(int(text) for text in FLAGS.severities)
    except ValueError:
        given = ",".join(FLAGS.severities)
        raise ValueError(f"--severities must be whole numbers, got {given!r}") from None
    # The probes go by the rule of the training, where the flags name one.
    given = {"severities": severities, "probe_assignment": FLAGS.assignment or "frequency"}
    names = [field.name for field in dataclasses.fields(Measuring)]
    values = {name: FLAGS[name].value for name in names if name not in given} | given
    values |= {
        name: tuple(values[name]) for name in ("measure_layers", "probe_geometries", "corruptions")
    }
    return Measuring(**values).check(model)


def measure(
    models: trained.Models, how: Measuring, interrupts: Interrupts
) -> dict[str, dict[str, dict[int, Any]]]:
    """Measurement -> method -> seed -> what was found."""
    names = [name for part in PARTS if part in FLAGS.parts for name in PARTS[part]]
    found: dict[str, dict[str, dict[int, Any]]] = {
        name: {method: {} for method in models.options} for name in names
    }
    # Seeds outermost: an interrupted job leaves complete pairs.
    for number, seed in enumerate(models.tasks):
        for method in models.options:
            # Loaded once, and only if something is left to measure.
            load = cache(partial(models.load, method, seed))
            for name in names:
                if name == _FIRST_SEED_ONLY and number:
                    continue
                trained.go_on(interrupts)
                fields = {field: getattr(how, field) for field in MEASUREMENTS[name][1]}
                try:
                    found[name][method][seed] = models.measured(
                        method, seed, name, fields, partial(_measure, name, load, how)
                    )
                except ValueError as error:
                    raise ValueError(f"{method} seed {seed}, {name}: {error}") from error
            if not FLAGS.quiet:
                print(f"measured {method} seed {seed}", file=sys.stderr, flush=True)
    return found


def _measure(name: str, load: Callable[[], trained.Model], how: Measuring) -> dict[str, Any]:
    return MEASUREMENTS[name][0](load(), how)


def report(found: Mapping[str, Found], title: str, workdir: pathlib.Path) -> None:
    """Prints the tables and writes them with the figures."""
    figures = {
        "flatness": measure_plots.bars,
        "spectrum": spectrum_plots.spectra,
        "activation": measure_plots.bars,
        "line": measure_plots.lines,
        "plane": measure_plots.planes,
        "amplification": measure_plots.amplification,
        "geometry": geometry_plots.every_form,
        "calibration": measure_plots.corrupted,
    }
    for name, measured in found.items():
        figures[name](measured, workdir / f"{name}.png")
        values = {
            method: {seed: one["values"] for seed, one in seeds.items()}
            for method, seeds in measured.items()
        }
        shown = measure_tables.measures_of(values)
        if not shown:
            continue
        table = measure_tables.frame(values, methods.ERM)
        errors = {
            method: {seed: one["errors"] for seed, one in seeds.items()}
            for method, seeds in measured.items()
        }
        table["estimator_error"] = [
            measure_tables.estimate(errors, row.method, row.measure).mean
            for row in table.itertuples()
        ]
        files.write_text(workdir / f"{name}.csv", summary.csv_text(table))
        text = measure_tables.markdown(values, shown, methods.ERM, f"{name}: {title}")
        files.write_text(workdir / f"{name}.md", text + "\n" + measure_tables.LEGEND)
        if name == "geometry":
            classes = measure_tables.class_frame(measured)
            files.write_text(workdir / "geometry_classes.csv", summary.csv_text(classes))
        long = text.count("\n") > _SCREEN
        print(f"{name}: a long table, in {workdir}/{name}.md\n" if long else text)


def run(interrupts: Interrupts) -> None:
    """Does what the flags say."""
    settings = run_flags.settings()
    how = measuring(settings.model)
    run_flags.apply_runtime_flags()
    options = comparison.resolve_options(trained.tuned_hparams(settings))
    run_flags.prepare_data()
    workdir = pathlib.Path(FLAGS.workdir)
    models = trained.train_or_load(settings, options, workdir, interrupts)
    with workdir_lock.hold(workdir), interrupts:
        found = measure(models, how, interrupts)
    # Without what is evaluated: each part has images and measures of its own.
    title = summary.title_of(settings.as_dict()).rpartition(", ")[0]
    report(found, title, workdir)
    if "geometry" in found:
        geometry_plots.over_epochs(models.results, workdir / "geometry_epochs.png")
    if not FLAGS.quiet:
        print(f"Written to {workdir}/", file=sys.stderr)


def main(argv: list[str]) -> None:
    """Entry point."""
    entry_point.run(argv, run)


if __name__ == "__main__":
    define_flags()
    app.run(main)
