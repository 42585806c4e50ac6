r"""Times training steps: what a perturbation costs above plain training (ERM), layer by layer.

    python -m experiments.benchmark --layers=stage1,stage2,stage3 --methods=lpa,lpa:carry,lpa:free

A timing benchmark, nothing is learned: the images are random normal numbers, the labels random
classes. In every round one ERM step and one step of the method run, in alternating order, each
waited for, so that a machine whose speed drifts slows both; the ratio is the median of the rounds'
ratios. The method `erm` times ERM against itself: how far its ratio is from 1 is the noise.

Next to the time stands the floor of the arithmetic, from XLA's cost analysis,

    floor = ( flops(ERM step) + K flops(decode forward + decode backward to the activation) )
            / flops(ERM step),

for K gradient passes above the layer (`free` and random methods: 0), every term compiled on its
own. `flops` is what the compiled step really does, over ERM: above the floor, work is wasted. The
time can stay below the floor, since weight gradients, which PGD does not need, cost more time per
FLOP than the rest.

The defaults (ResNet-20, batch 128, all layers, 36 rows of 11 rounds) should take about 15 minutes
on two idle CPU cores, a quarter of it compilation; on busy ones 7 rounds took 27.
"""

import csv
import dataclasses
import functools
import io
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import app, flags

import lpa_jax
from experiments.compiled import step_cost
from experiments.methods import build as assembly
from experiments.methods import names as methods
from experiments.runtime import files
from lpa_jax import injection, models, perturbations
from lpa_jax.perturbations import Perturbation
from lpa_jax.perturbations.lpa import MODES

FLAGS = flags.FLAGS
ERM = methods.ERM


def define_flags() -> None:
    """Flags of this module."""
    flags.DEFINE_enum("model", "resnet20", models.names(), "Network.")
    flags.DEFINE_list("layers", [], "Injection points, such as stem,stage2; all if empty.")
    flags.DEFINE_list(
        "methods",
        [ERM, "lpa", "lpa:carry", "lpa:free"],
        f"Methods to compare with ERM: {ERM} (shows the noise), "
        f"{', '.join(perturbations.names())}; lpa:MODE is lpa in mode {', '.join(MODES)}.",
    )
    flags.DEFINE_list("steps", ["1", "3", "5"], "PGD steps, of methods that leave them free.")
    flags.DEFINE_enum(
        "assignment",
        "frequency",
        methods.ASSIGNMENTS,
        "Which classes get which sign, for lpa and lpl; confidence costs lpa:carry a forward pass.",
    )
    flags.DEFINE_integer("batch_size", 128, "Examples in a step.", lower_bound=1)
    flags.DEFINE_integer("image_size", 32, "Height and width of the random images.", lower_bound=1)
    flags.DEFINE_integer("channels", 3, "Channels of the random images.", lower_bound=1)
    flags.DEFINE_integer("num_classes", 10, "Number of classes.", lower_bound=2)
    flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "Type of the computation.")
    flags.DEFINE_integer("rounds", 11, "Rounds of one ERM and one method step.", lower_bound=1)
    flags.DEFINE_string("csv", None, "File for the table, beside printing it.")


class Case(NamedTuple):
    """One row to measure.

    Attributes:
      method: as given on the command line.
      layer: injection point, "-" for ERM.
      passes: K, gradient passes above the layer before the training pass.
      perturbations: what `lpa_step` takes.
    """

    method: str
    layer: str
    passes: int
    perturbations: Mapping[str, Perturbation]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: milliseconds a step, ratios to ERM, compilation, memory.

    Attributes:
      method, layer, steps: what was measured; `steps` is K.
      erm_ms, erm_min, erm_max: ERM step, median and range over the rounds.
      step_ms, step_min, step_max: the method's step in the same rounds.
      ratio: median over the rounds of method time / ERM time.
      floor: the FLOP floor of that ratio.
      ratio_to_floor: ratio / floor.
      flops: FLOPs of the compiled method step / FLOPs of the compiled ERM step.
      compile_s: tracing and compiling the method's step.
      memory_mb: arguments, results and temporaries of the method's step, shared ones once.
    """

    method: str
    layer: str
    steps: int
    erm_ms: float
    erm_min: float
    erm_max: float
    step_ms: float
    step_min: float
    step_max: float
    ratio: float
    floor: float
    ratio_to_floor: float
    flops: float
    compile_s: float
    memory_mb: float


def make_cases(
    method_names: Sequence[str],
    layers: Sequence[str],
    steps: Sequence[int],
    assignment: lpa_jax.Assignment,
) -> list[Case]:
    """The rows to measure: every method at every layer with every number of steps it leaves free.

    Raises:
      ValueError: unknown method or mode.
    """
    cases = []
    for method in method_names:
        if method == ERM:
            cases.append(Case(ERM, "-", 0, {}))
            continue
        for layer in layers:
            cases += [
                Case(method, layer, passes, {layer: perturbation})
                for passes, perturbation in _variants(method, steps, assignment)
            ]
    return cases


def _variants(
    method: str, steps: Sequence[int], assignment: lpa_jax.Assignment
) -> list[tuple[int, Perturbation]]:
    """(K, perturbation) for every number of steps that `method` is to be measured with."""
    name, _, mode = method.partition(":")
    if name not in perturbations.names():
        known = ", ".join((ERM, *perturbations.names()))
        raise ValueError(f"--methods: unknown method {method!r}; known: {known} and lpa:MODE")
    takes = perturbations.options(name)
    if ":" in method and ("mode" not in takes or mode not in MODES):
        raise ValueError(
            f"--methods: unknown mode in {method!r}; only lpa has modes: {', '.join(MODES)}"
        )
    fixed: dict[str, Any] = {"mode": mode} if mode else {}
    fixed |= {"radius": step_cost.RADIUS} if "radius" in takes else {}
    fixed |= {"assignment": assignment} if "assignment" in takes else {}
    create = functools.partial(perturbations.create, name, **fixed)
    if "steps" not in takes:
        return [(0, create())]
    if mode in ("carry", "free"):
        return [(1 if mode == "carry" else 0, create(steps=1))]
    return [(count, create(steps=count)) for count in steps]


def measure(state: lpa_jax.TrainState, batch: step_cost.Batch, cases: Sequence[Case], rounds: int):
    """Yields one `Row` a case; ERM and each layer's gradient pass are compiled once."""
    erm, erm_seconds = step_cost.compile_step(state, batch, {})

    @functools.cache
    def pass_flops(layer):
        if layer == "-":
            return 0.0
        return step_cost.flops(step_cost.lower_gradient_pass(state, batch, layer).compile())

    for case in cases:
        own_state = step_cost.with_perturbations(state, batch, case.perturbations)
        step, seconds = erm, erm_seconds
        if case.perturbations:
            step, seconds = step_cost.compile_step(own_state, batch, case.perturbations)
        rounds_ms = step_cost.alternate((erm, state), (step, own_state), batch, rounds)
        erm_ms, step_ms = zip(*rounds_ms, strict=True)
        ratio = statistics.median(own / plain for plain, own in rounds_ms)
        erm_flops, step_flops = step_cost.flops(erm), step_cost.flops(step)
        floor = step_cost.floor_ratio(erm_flops, pass_flops(case.layer), case.passes)
        yield Row(
            case.method, case.layer, case.passes,
            statistics.median(erm_ms), min(erm_ms), max(erm_ms),
            statistics.median(step_ms), min(step_ms), max(step_ms),
            ratio, floor, ratio / floor, step_flops / erm_flops, seconds, step_cost.memory_mb(step),
        )  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text; a range stands behind its median as [min..max]."""
    header = (
        "method", "layer", "steps", "ERM_ms", "[min..max]", "step_ms", "[min..max]", "ratio",
        "floor", "ratio/floor", "flops", "compile_s", "memory_MB",
    )  # fmt: skip
    cells = [header]
    cells += [
        (
            row.method, row.layer, str(row.steps),
            f"{row.erm_ms:.2f}", f"[{row.erm_min:.2f}..{row.erm_max:.2f}]",
            f"{row.step_ms:.2f}", f"[{row.step_min:.2f}..{row.step_max:.2f}]",
            f"{row.ratio:.3f}", f"{row.floor:.3f}", f"{row.ratio_to_floor:.3f}",
            f"{row.flops:.3f}", f"{row.compile_s:.1f}", f"{row.memory_mb:.1f}",
        )
        for row in rows
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def as_csv(rows: Sequence[Row]) -> str:
    """The rows with all digits, under the names of `Row`'s fields."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Row)])
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in rows)
    return text.getvalue()


def set_up() -> tuple[lpa_jax.TrainState, step_cost.Batch, list[Case]]:
    """What the flags ask for.

    Raises:
      ValueError: naming the flag or option that is out of range.
    """
    if not all(text.strip().isdecimal() and int(text) > 0 for text in FLAGS.steps):
        raise ValueError(f"--steps must be whole numbers >= 1, got {','.join(FLAGS.steps)!r}")
    if not FLAGS.methods:
        raise ValueError("--methods must name at least one method, got none")
    if FLAGS.csv is not None:
        files.check_writable("csv", FLAGS.csv)
    model = models.create(FLAGS.model, FLAGS.num_classes, dtype=FLAGS.dtype)
    layers = FLAGS.layers or model.layers
    for layer in layers:
        injection.check_layer(model.layers, layer)
    # Equal class counts: there is no training set, and the rule's cost does not depend on them.
    rule = assembly.assignment(
        assignment=FLAGS.assignment, counts=[FLAGS.batch_size] * FLAGS.num_classes
    )
    steps = [int(text) for text in FLAGS.steps]
    cases = make_cases(FLAGS.methods, layers, steps, rule)
    return *step_cost.make_state(model, FLAGS.batch_size, FLAGS.image_size, FLAGS.channels), cases


def main(argv: list[str]) -> None:
    """Measures every case, prints the table, writes it where asked."""
    if len(argv) > 1:
        raise app.UsageError(
            f"unexpected argument {argv[1]!r}; options are flags, --help lists them"
        )
    try:
        state, batch, cases = set_up()
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(
        f"{FLAGS.model}, synthetic batch {batch['image'].shape}, {FLAGS.num_classes} classes, "
        f"{FLAGS.dtype}, {jax.device_count()} x {jax.devices()[0].device_kind}, jax "
        f"{jax.__version__}, {FLAGS.rounds} rounds",
        flush=True,
    )
    if jax.config.jax_compilation_cache_dir:
        print("note: a compilation cache is on; compile_s may be the time of reading it")
    rows, failure = [], None
    try:
        for row in measure(state, batch, cases, FLAGS.rounds):
            rows.append(row)
            print(
                f"[{len(rows)}/{len(cases)}] {row.method} {row.layer} {row.steps}: "
                f"ratio {row.ratio:.3f}, floor {row.floor:.3f}",
                file=sys.stderr,
                flush=True,
            )
    except ValueError as error:
        failure = f"error: {cases[len(rows)].method} at {cases[len(rows)].layer}: {error}"
    except KeyboardInterrupt:
        failure = "interrupted: the table holds what was measured"
    print(table(rows))
    if failure:
        sys.exit(failure)
    if FLAGS.csv:
        try:
            files.write_text(FLAGS.csv, as_csv(rows))
        except OSError as error:
            sys.exit(f"error: --csv: {error}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
