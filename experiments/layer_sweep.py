r"""Layer sweep: at which layer does a perturbation help, and what does it resemble there?

    python -m experiments.layer_sweep --methods=lpa --num_seeds=5

trains every method at every injection point from `input` to `logits`, and ERM. Each model is
compared with ERM, with the model perturbed at the input and with the one perturbed at the logits,
on the evaluation images: share of equal predictions, consistency of errors (Cohen's kappa, which
does not grow with accuracy alone) and debiased linear CKA of the last hidden layer. If shallow
layers act like input augmentation and deep ones like logit manipulation, the two curves cross.

Radii are relative to the mean norm of the activation. They are still not comparable between layers:
the loss change of one relative radius differs by orders of magnitude. --radius sets one radius for
all layers, --layer_radii single ones, and a --hparams file may hold an entry for each placed method
(`lpa@hidden1`).

Writes layer_sweep.csv, .md and .png into --workdir, and layer_sweep_geometry.png: norm ratio and
loss change by sign group and layer, and with --class_geometry_batches their correlation.

The MLP has five injection points: with ERM and 5 seeds, a sweep of one method trains 30 models and
compiles six programs.
"""

import pathlib
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

from absl import flags

from experiments.images import flags as image_flags
from experiments.images.settings import Settings
from experiments.measuring import models as trained
from experiments.measuring.similarity import effects, similarity_of
from experiments.methods import flags as method_flags
from experiments.methods import names as methods
from experiments.reporting import class_figures, frame, measured_figures, measured_tables, tables
from experiments.runtime import fields, files
from experiments.runtime import main as entry_point
from experiments.runtime.progress import RunProgress
from experiments.training import flags as run_flags
from lpa_jax import checks, models, perturbations
from lpa_jax.files import hold
from lpa_jax.injection import INPUT, LOGITS, check_layer
from lpa_jax.training.interrupts import Interrupts

FLAGS = flags.FLAGS
ERM = methods.ERM
_LEGEND = (
    "agreement, cka, error consistency: similarity to ERM, and to the method at the input and at "
    "the logits. loss change, norm ratio: effect of the perturbation on classes of a sign.\n\n"
    + measured_tables.LEGEND
)


def define_flags() -> None:
    trained.define_flags("layer_sweep")
    FLAGS.set_default("methods", ["lpa"])
    FLAGS.set_default("num_seeds", 5)
    flags.DEFINE_list(
        "hidden_layers", [], "Hidden layers to sweep between input and logits; unset: all."
    )
    flags.DEFINE_list("layer_radii", [], "Radii of single layers, such as input=0.05.")
    flags.DEFINE_integer(
        "cka_images", 2000, "Random evaluation images for CKA; its cost is their number squared."
    )


def layers_to_sweep(settings: Settings) -> tuple[str, ...]:
    """Injection points in the order of the network.

    Raises:
      ValueError: --layer is given, or the model lacks one of --hidden_layers.
    """
    if FLAGS.layer is not None:
        raise ValueError(f"--layer must not be given ({FLAGS.layer}): use --hidden_layers")
    every = models.create(settings.model, 2).layers
    if FLAGS.hidden_layers:
        fields.among("hidden_layers", FLAGS.hidden_layers, every[1:-1])
    chosen = (INPUT, *(FLAGS.hidden_layers or every[1:-1]), LOGITS)
    return tuple(layer for layer in every if layer in chosen)


def place(method: str, layer: str) -> str:
    """Places the perturbations of a method that name no layer at a layer.

    LPL, which perturbs the logits, and parts that are no perturbations stay as they are.

    Raises:
      ValueError: there is nothing to place.

    Example:
      >>> place("lpa+lpl", "hidden2"), place("logit_adjusted+dropout", "input")
      ('lpa@hidden2+lpl', 'logit_adjusted+dropout@input')
    """
    parts = []
    for part in methods.parse(method):
        at = part.layer or (layer if part.name in _movable() else None)
        parts.append(part.name if at is None else f"{part.name}@{at}")
    placed = "+".join(parts)
    if placed in (method, ""):
        raise ValueError(f"--methods must have a perturbation without a layer, got {method!r}")
    return placed


def _movable() -> set[str]:
    return set(perturbations.names()) - {"lpl"}


def layer_radii(layers: tuple[str, ...]) -> dict[str, float]:
    """Radii of --layer_radii by layer.

    Raises:
      ValueError: an entry is not LAYER=RADIUS, or its layer or radius is not allowed.
    """
    found = {}
    for text in FLAGS.layer_radii:
        layer, _, number = text.partition("=")
        try:
            radius = float(number)
        except ValueError:
            raise ValueError(f"--layer_radii must be LAYER=RADIUS, got {text!r}") from None
        fields.named("layer_radii", partial(check_layer, layers, layer))
        found[layer] = checks.number(f"--layer_radii: {layer}", radius)
    return found


def resolve_options(
    layers: tuple[str, ...], tuned: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Options of ERM and of every method at every layer: tuned or of the recipe, then flags.

    Raises:
      ValueError: naming the flag that does not fit.
    """
    methods.check_different(FLAGS.methods)
    method_flags.check_reach(FLAGS.methods)
    checks.integer("--cka_images", FLAGS.cka_images, 4, 20_000)
    radii = layer_radii(layers)
    options = {ERM: method_flags.options_for(ERM, tuned.get(ERM, {}))}
    for method in FLAGS.methods:
        for layer in layers:
            placed = place(method, layer)
            given = {"radius": radii[layer]} if layer in radii else {}
            chosen = tuned.get(placed) or tuned.get(method) or image_flags.recipe_options(method)
            found = dict(chosen)
            for name in _movable():
                found.pop(f"{name}.layer", None)  # the layer at which it was tuned
            options[placed] = method_flags.options_for(placed, found, **given)
    return options


def compared(
    placed: str, references: Mapping[str, str], outputs: Callable[[str], trained.Outputs]
) -> dict[str, float]:
    """Similarity of a placed method to every reference but itself."""
    return {
        f"{name} {reference}": value
        for reference, other in references.items()
        if other != placed
        for name, value in similarity_of(outputs(placed), outputs(other), FLAGS.cka_images).items()
    }


def measure(
    found: trained.Models, layers: tuple[str, ...], interrupts: Interrupts
) -> dict[str, dict[int, dict[str, float | None]]]:
    """Accuracy of every model and its similarity to the references of the same seed."""
    values: dict[str, dict[int, dict[str, float | None]]] = {name: {} for name in found.options}
    places = [(seed, method) for seed in found.tasks for method in FLAGS.methods]
    with RunProgress(len(places), len(layers), FLAGS.quiet, unit="layer") as progress:
        for seed, method in places:
            progress.start(f"{method} seed {seed}")
            outputs = cache(partial(_outputs, found, seed))  # each model is loaded at most once
            references = {INPUT: place(method, INPUT), LOGITS: place(method, LOGITS), ERM: ERM}
            settings = {"cka_images": FLAGS.cka_images, "references": references}
            for number, layer in enumerate(layers):
                progress.part(number, f"similarity at {layer}")
                trained.stop_if_asked(interrupts)
                placed = place(method, layer)
                values[placed][seed] = found.measured(
                    placed, seed, "layer_sweep", settings,
                    partial(compared, placed, references, outputs),
                )  # fmt: skip
            progress.finish(f"compared at {', '.join(layers)}")
    at = {place(method, layer): layer for method in FLAGS.methods for layer in layers}
    for method, results in found.results.items():
        for result in results:
            accuracy = {"accuracy": result["accuracy"]}
            groups = {f"accuracy {k}": v for k, v in result["group_accuracy"].items()}
            seed = result["seed"]
            own = effects(result, at[method]) if method in at else {}
            values[method][seed] = accuracy | groups | values[method].get(seed, {}) | own
    return values


def _outputs(found: trained.Models, seed: int, method: str) -> trained.Outputs:
    return trained.outputs(found.load(method, seed))


def _in_order(compared) -> list[str]:
    """Accuracies first, then the similarities by measure and reference."""
    found = list(compared["measure"].unique())
    accuracies = [measure for measure in found if measure.startswith("accuracy")]
    return accuracies + sorted(measure for measure in found if measure not in accuracies)


def sweep(interrupts: Interrupts) -> None:
    """Trains or loads the models, measures them and reports."""
    settings = image_flags.settings()
    layers = layers_to_sweep(settings)
    options = resolve_options(layers, trained.tuned_hparams(settings))
    image_flags.prepare_data()
    workdir = pathlib.Path(FLAGS.workdir)
    found = trained.train_or_load(settings, options, workdir, interrupts)
    with hold(workdir), interrupts:
        values = measure(found, layers, interrupts)
    title = f"Layer sweep: {frame.title_of(settings.as_dict())}"
    measured = {m: {s: {"values": own} for s, own in seeds.items()} for m, seeds in values.items()}
    table = measured_tables.compare(measured, ERM)
    files.write_text(workdir / "layer_sweep.csv", tables.csv_text(table))
    text = measured_tables.markdown(table, title, _in_order(table))
    files.write_text(workdir / "layer_sweep.md", text + "\n" + _LEGEND)
    placed = {method: {layer: place(method, layer) for layer in layers} for method in FLAGS.methods}
    measured_figures.layer_sweep(table, placed, workdir / "layer_sweep.png")
    class_figures.swept(table, placed, workdir / "layer_sweep_geometry.png")
    measured_tables.show(table, title, _in_order(table), "" if FLAGS.quiet else _LEGEND)
    run_flags.say(f"Written to {workdir}/layer_sweep.{{csv,md,png}}")


def main(argv: list[str]) -> None:
    entry_point.run(argv, sweep)


if __name__ == "__main__":
    entry_point.start(define_flags, main)
