r"""Times training steps: what a perturbation costs above plain training (ERM), layer by layer.

    python -m experiments.benchmark --layers=stage1,stage2,stage3 --methods=lpa,lpa:carry,lpa:free

The batch is random and nothing is learned. In every round one ERM step and one step of the method
run, in alternating order, and each is waited for. The ratio is the median of the ratios of the
rounds, so that a machine whose speed drifts slows both. The method `erm` times ERM against itself:
the distance of its ratio from 1 is the noise.

The table also gives the floor of the arithmetic, from XLA's cost analysis,

    floor = ( flops(ERM step) + K flops(decode forward + decode backward to the activation) )
            / flops(ERM step),

for K gradient passes above the layer (`free` and random methods: 0), every term compiled on its
own. `flops` is that of the compiled step relative to ERM: above the floor, work is wasted. The time
can be below the floor, since weight gradients, which PGD does not need, cost more time per FLOP
than the rest.

With `--against=torch` each method is timed against the same step in PyTorch, which the user
installs (`pip install torch`): the same weights, batch, layer, K and optimizer. Both first steps
are compared (rtol 1e-4). PyTorch's faster memory layout counts. With `--folder=PATH` as well, only
reading a folder of images is timed, against torchvision's `ImageFolder` and `DataLoader`.

On one CPU core (`taskset -c 0`) all times are CPU times, which other programs on the machine do not
lengthen. Otherwise they are wall times.

The defaults (ResNet-20, batch 128, all layers, 36 rows of 11 rounds) take about 15 minutes on two
idle CPU cores, a quarter of it for compilation.
"""

import functools
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import pandas as pd
from absl import flags

import lpa_jax
from experiments.compiled import against_torch, folder_reading, step_cost, timing
from experiments.compiled.cases import Case, make_cases
from experiments.methods import build, names
from experiments.reporting import screen
from experiments.runtime import files
from experiments.runtime import main as entry_point
from lpa_jax import checks, injection, models, perturbations
from lpa_jax.perturbations.lpa import MODES

FLAGS = flags.FLAGS
ERM = names.ERM


def define_flags() -> None:
    """Defines the flags of this module."""
    flags.DEFINE_enum("model", "resnet20", models.names(), "Network.")
    flags.DEFINE_list("layers", [], "Injection points, such as stem,stage2; empty: all.")
    flags.DEFINE_list(
        "methods",
        [ERM, "lpa", "lpa:carry", "lpa:free"],
        f"Methods to compare with ERM: {ERM} (shows the noise), "
        f"{', '.join(perturbations.names())}; lpa:MODE is lpa in mode {', '.join(MODES)}.",
    )
    flags.DEFINE_list("steps", ["1", "3", "5"], "PGD steps, for methods that take a number.")
    flags.DEFINE_float("examples", 1.0, "Share of the batch on which PGD of a cold lpa runs.")
    flags.DEFINE_enum(
        "assignment",
        "frequency",
        names.ASSIGNMENTS,
        "Which classes get which sign, for lpa and lpl; confidence costs lpa:carry a forward pass.",
    )
    timing.define_sizes(128)
    flags.DEFINE_integer("num_classes", 10, "Number of classes.", lower_bound=2, upper_bound=10**6)
    flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "Type of the computation.")
    flags.DEFINE_integer(
        "rounds", 11, "Rounds of one ERM and one method step.", lower_bound=1, upper_bound=10**6
    )
    flags.DEFINE_enum(
        "against",
        None,
        ("torch",),
        "Time erm and lpa against the same steps in PyTorch (mlp, small_cnn, WideResNets, ResNets "
        "of the CIFAR form).",
    )
    flags.DEFINE_bool("jit", False, "With --against=torch: torch.compile compiles its networks.")
    files.define_path("folder", None, "With --against=torch: class folders of images to read.")
    files.define_path("csv", None, "CSV file to write the table to.")


class Row(NamedTuple):
    """One row of the table.

    Attributes:
      method, layer, steps: the case; `steps` is K.
      erm_ms, erm_min, erm_max: milliseconds of an ERM step, median and range over the rounds.
      step_ms, step_min, step_max: those of a step of the method in the same rounds.
      ratio: median over the rounds of method time / ERM time.
      floor: the FLOP floor of that ratio.
      ratio_to_floor: ratio / floor.
      flops: FLOPs of the compiled method step / FLOPs of the compiled ERM step.
      compile_s: seconds of tracing and compiling the step of the method.
      memory_mb: 1e6 bytes of arguments, results and temporaries, donated ones once.
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


# Header and format of each printed column.
COLUMNS = (
    *(("method", "{method}"), ("layer", "{layer}"), ("steps", "{steps}")),
    *(("ERM_ms", "{erm_ms:.2f}"), ("[min..max]", "[{erm_min:.2f}..{erm_max:.2f}]")),
    *(("step_ms", "{step_ms:.2f}"), ("[min..max]", "[{step_min:.2f}..{step_max:.2f}]")),
    *(("ratio", "{ratio:.3f}"), ("floor", "{floor:.3f}"), ("ratio/floor", "{ratio_to_floor:.3f}")),
    *(("flops", "{flops:.3f}"), ("compile_s", "{compile_s:.1f}"), ("memory_MB", "{memory_mb:.1f}")),
)
# Columns that a narrow terminal does without, the first first.
SECONDARY = ("[min..max]", "memory_MB", "compile_s", "flops")


def measure(
    state: lpa_jax.TrainState, batch: step_cost.Batch, cases: Sequence[Case], rounds: int
) -> Iterator[Row]:
    """Yields one row per case; compiles ERM and the gradient pass of each layer once."""
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
        times = timing.time_steps((erm, state), (step, own_state), batch, rounds)
        erm_flops, step_flops = step_cost.flops(erm), step_cost.flops(step)
        passes = case.passes * case.examples
        floor = step_cost.floor_ratio(erm_flops, pass_flops(case.layer), passes)
        spread = [f(ms) for ms in times for f in (statistics.median, min, max)]
        yield Row(
            case.method, case.layer, case.passes, *spread, times.ratio, floor, times.ratio / floor,
            step_flops / erm_flops, seconds, step_cost.memory_mb(step),
        )  # fmt: skip


def check_flags() -> None:
    """Raises ValueError naming the first flag that is out of range or needs another."""
    checks.number("--examples", FLAGS.examples, high=1.0, open_low=True)
    if not FLAGS.methods:
        raise ValueError("--methods must name at least one method, got none")
    if FLAGS.csv is not None:
        files.check_writable("csv", FLAGS.csv)
    if FLAGS.folder and not FLAGS.against:
        raise ValueError("--folder needs --against=torch")
    if FLAGS.against and FLAGS.examples != 1:
        raise ValueError(f"--examples must be 1 with --against, got {FLAGS.examples:g}")
    if FLAGS.against and FLAGS.dtype != "float32":
        raise ValueError(f"--dtype must be float32 with --against, got {FLAGS.dtype!r}")


def _read_folder() -> Iterator[against_torch.Row]:
    sizes = FLAGS.image_size, FLAGS.batch_size
    yield folder_reading.measure(FLAGS.folder, *sizes, FLAGS.rounds)


def planned() -> tuple[list[str], Iterator[Row | against_torch.Row]]:
    """Titles of the rows, and the rows, each of which is measured when it is asked for.

    Raises:
      ValueError: naming the flag or option that is out of range.
    """
    steps = timing.whole_numbers("steps", FLAGS.steps, low=1, high=names.MOST_STEPS)
    check_flags()
    if FLAGS.against:
        against_torch.load()
    if FLAGS.folder:
        return [f"read at {FLAGS.folder}"], _read_folder()
    # Without a type the network computes in that of its input, as a check in float64 needs.
    dtype = None if FLAGS.against else FLAGS.dtype
    model = models.create(FLAGS.model, FLAGS.num_classes, dtype=dtype)
    layers = FLAGS.layers or model.layers
    for layer in layers:
        injection.check_layer(model.layers, layer)
    # Of equal class counts: the cost does not depend on them.
    counts = [FLAGS.batch_size] * FLAGS.num_classes
    rule = build.assignment(assignment=FLAGS.assignment, counts=counts)
    cases = make_cases(FLAGS.methods, layers, steps, rule, FLAGS.examples)
    made = step_cost.make_state(model, FLAGS.batch_size, FLAGS.image_size, FLAGS.channels)
    if FLAGS.against:
        options = rule, FLAGS.rounds, FLAGS.jit
        rows = (against_torch.measure(*made, case, *options) for case in cases)
    else:
        rows = measure(*made, cases, FLAGS.rounds)
    return [f"{case.method} at {case.layer}" for case in cases], rows


def main(argv: list[str]) -> None:
    """Measures every case, prints the table and writes it to --csv."""
    entry_point.refuse_arguments(argv)
    entry_point.check_devices()
    try:
        titles, measured = planned()
    except ValueError as error:
        sys.exit(entry_point.refusal(error))
    of_model = f"x{FLAGS.channels}, {FLAGS.num_classes} classes, {FLAGS.dtype}"
    print(
        f"{FLAGS.folder or FLAGS.model}, batch {FLAGS.batch_size}, images {FLAGS.image_size}x"
        f"{FLAGS.image_size}{'' if FLAGS.folder else of_model}, "
        f"{timing.devices()}, jax {jax.__version__}, {FLAGS.rounds} rounds, {timing.clock()[0]}",
        flush=True,
    )
    if jax.config.jax_compilation_cache_dir:
        print("note: a compilation cache is on; compile_s may be the time of reading from it")
    rows, failure = [], None
    try:
        for row in measured:
            rows.append(row)
            found = f"{row.method} {row.layer} {row.steps}: ratio {row.ratio:.3f}"
            floor = "" if FLAGS.against else f", floor {row.floor:.3f}"
            timing.progress(f"[{len(rows)}/{len(titles)}] {found}{floor}")
    except ValueError as error:
        failure = SystemExit(f"error: {titles[len(rows)]}: {error}")
    except KeyboardInterrupt as stop:
        failure = stop  # the table holds what was measured
    columns = against_torch.COLUMNS if FLAGS.against else COLUMNS
    cells = [[text.format(**row._asdict()) for _, text in columns] for row in rows]
    if cells:
        screen.show_table([[header for header, _ in columns], *cells], SECONDARY, keys=3)
    if failure:
        raise failure
    if FLAGS.csv:
        try:
            files.write_text(FLAGS.csv, pd.DataFrame(rows).to_csv(index=False))
        except OSError as error:
            sys.exit(entry_point.refusal(f"--csv: {error}"))


if __name__ == "__main__":
    entry_point.start(define_flags, main)
