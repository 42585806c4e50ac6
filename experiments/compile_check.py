r"""Compiles the training step for a TPU slice on a machine without TPUs, and checks the program.

    python -m experiments.compile_check --topology=v5e:16x16 --model=resnet32 --layer=stage2

needs the extra `tpu-check` (libtpu). For plain training (ERM) and LPA it prints, per device, the
FLOPs and their floor (see `experiments.benchmark`), the bytes read and written, the memory, every
collective with its bytes and the compile time, and checks in the compiled text what the method
promises:

  * it fits the memory of the device;
  * PGD forms no parameter gradients: the weight gradients are those of ERM, by shape;
  * encode is not recomputed: below the layer, every convolution and product is one of ERM;
  * decode runs for K gradient passes more than in ERM, and no more;
  * beyond ERM, the devices exchange nothing but the class table ([slots, *S] float32, once per
    gradient pass and once for the class means, with slots = min(C, batch)), the class counts and
    the mean norm.

Flags that are lists are multiplied out. --grid fills those that are not given: `full` with every
combination (320 cases), `star` with a base case and the cases that differ from it in one value (22
cases). --output keeps every compiled program (`experiments.compiled.store`), so that a stopped run
resumes; with --nocompile only cases whose programs it holds are printed.

The exit status is 1 if a check fails. Compiling a program takes between one and ten minutes on two
idle CPU cores, longer for more examples a device. Nothing printed is a timing of the step.
"""

import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence

import jax
from absl import flags

from experiments.compiled import program_report, timing, tpu
from experiments.compiled.promises import Method, Result, checks
from experiments.compiled.store import Programs
from experiments.methods import names as methods
from experiments.reporting import tables
from experiments.runtime import fields, files
from experiments.runtime import main as entry_point
from lpa_jax import injection, models, pgd
from lpa_jax.perturbations.lpa import MODES

FLAGS = flags.FLAGS
Case = tuple[tpu.Setting, Method]
DTYPES = ("float32", "bfloat16")
# Values of --grid for flags that are not given.
GRID = {
    "topology": ["v5e:4x4", "v5e:16x16"],
    "model": ["resnet32", "wrn_28_10"],
    "dtype": list(DTYPES),
    "num_classes": ["10", "100", "1000", "8142"],
    "mode": list(MODES),
    "steps": ["1", "3", "5"],
    "shape": list(pgd.SHAPES),
}
# The base case of --grid=star for each model, and the flags that vary around it, in that order. The
# larger slice compiles in half the time, since each device has fewer examples.
BASE = {
    "topology": "v5e:16x16",
    "dtype": "float32",
    "num_classes": "100",
    "mode": "cold",
    "steps": "3",
    "shape": "full",
}
RAYS = ("shape", "mode", "topology", "dtype", "steps", "num_classes")


def define_flags() -> None:
    flags.DEFINE_list("topology", ["v5e:16x16"], "TPU slices, KIND:AxB or KIND:AxBxC.")
    flags.DEFINE_list("model", ["resnet32"], f"Networks: {', '.join(models.names())}.")
    flags.DEFINE_list("dtype", ["float32"], "Types of the computation: float32, bfloat16.")
    flags.DEFINE_list("num_classes", ["100"], "Numbers of classes.")
    flags.DEFINE_list("layer", ["stage2"], "Injection points.")
    flags.DEFINE_list("mode", ["cold"], f"Modes of lpa: {', '.join(MODES)}.")
    flags.DEFINE_list("steps", ["3"], "PGD steps of mode cold; other modes take 1.")
    flags.DEFINE_list("shape", ["full"], f"Shapes of the perturbation: {', '.join(pgd.SHAPES)}.")
    flags.DEFINE_enum("geometry", "signed", pgd.GEOMETRIES, "Half-space of the perturbation.")
    flags.DEFINE_enum(
        "assignment", "frequency", methods.ASSIGNMENTS, "Which classes get which sign."
    )
    timing.define_sizes(2048)
    flags.DEFINE_enum(
        "placement", "pmap", list(tpu.PLACEMENTS),
        "How the step is spread: pmap, or mesh_step with the state whole on every device (mesh) or "
        "spread (fsdp). Of the last two, only the memory is checked.",
    )  # fmt: skip
    flags.DEFINE_enum(
        "grid", None, ["full", "star"], "Fills the list flags that are not given with a grid."
    )
    files.define_path("output", None, "JSON file that keeps compiled programs between runs.")
    flags.DEFINE_bool("compile", True, "Compile programs that --output lacks; if not, skip them.")
    flags.DEFINE_bool("markdown", False, "Print one Markdown table instead of a report per case.")


def compile_case(setting: tpu.Setting, method: Method, programs: Programs) -> Result | None:
    """ERM, one gradient pass and the method; None if `programs` lacks one and must not compile."""
    # The gradient pass on one device is the same program in every slice of its kind.
    kind, share = tpu.topology(setting.topology).kind, tpu.share(setting)
    alone = dataclasses.replace(setting, topology=kind, batch_size=share, placement="")
    found = (
        programs.get((setting, "erm"), lambda: tpu.lower_step(setting, {})),
        programs.get((alone, method.layer), lambda: tpu.lower_gradient_pass(setting, method.layer)),
        programs.get(
            (setting, method), lambda: tpu.lower_step(setting, method.perturbations(setting))
        ),
    )
    if None in found:
        return None
    return Result(
        setting,
        method,
        models.create(setting.model, setting.num_classes).layers,
        tpu.table_row(setting, method.layer, method.shape),
        tpu.topology(setting.topology).memory,
        *found,
    )


def make_cases(values: Mapping[str, Sequence[str]]) -> list[Case]:
    """All combinations of the values of the flags in `GRID` and `layer`.

    Raises:
      ValueError: naming the flag that is out of range.
    """
    allowed = {"model": models.names(), "dtype": DTYPES, "mode": MODES, "shape": pgd.SHAPES}
    for flag, texts in values.items():
        if flag in ("num_classes", "steps"):
            low, high = (2, 10**6) if flag == "num_classes" else (1, methods.MOST_STEPS)
            timing.whole_numbers(flag, texts, low, high)
        else:
            fields.among(flag, texts, allowed.get(flag, texts))
    variants = [
        (mode, int(steps))
        for mode in values["mode"]
        for steps in (values["steps"] if mode == "cold" else ["1"])
    ]
    order = ("model", "dtype", "topology", "num_classes", "layer", "shape")
    return [
        (
            tpu.Setting(
                topology, model, dtype, int(num_classes),
                FLAGS.batch_size, FLAGS.image_size, FLAGS.channels, FLAGS.placement,
            ),
            Method(layer, mode, steps, shape, FLAGS.geometry, FLAGS.assignment),
        )
        for model, dtype, topology, num_classes, layer, shape in itertools.product(
            *(values[name] for name in order)
        )
        for mode, steps in variants
    ]  # fmt: skip


def make_star(values: Mapping[str, Sequence[str]]) -> list[Case]:
    """For each model the base case, then the cases that differ from it in one of `RAYS`.

    Raises:
      ValueError: as `make_cases`.
    """
    base = {
        name: list(levels) if name == "model" else levels[:1] for name, levels in values.items()
    }
    base |= {name: [level] for name, level in BASE.items() if level in values[name]}
    varied = [base, *({**base, name: [level]} for name in RAYS for level in values[name])]
    by_model = [
        make_cases({**point, "model": [model]}) for model in values["model"] for point in varied
    ]
    return list(dict.fromkeys(itertools.chain(*by_model)))


def set_up() -> tuple[list[Case], Programs]:
    """Cases and stored programs from the flags.

    Raises:
      ValueError: naming the flag that is out of range, before anything is compiled or written.
    """
    names = (*GRID, "layer")
    filled = {name: GRID[name] for name in GRID if FLAGS.grid and not FLAGS[name].present}
    values = {name: filled.get(name, FLAGS[name].value) for name in names}
    cases = make_cases(values)  # for the star, too: it checks all values
    if FLAGS.grid == "star":
        cases = make_star(values)
    for setting, method in cases:
        layers = models.create(setting.model, setting.num_classes).layers
        injection.check_layer(layers, method.layer)
        tpu.share(setting)
    # One case per model, since tracing takes seconds: the number of classes does not matter.
    for setting, method in {setting.model: (setting, method) for setting, method in cases}.values():
        tpu.abstract_state(setting, method.perturbations(setting))
    if FLAGS.output is not None:
        files.check_writable("output", FLAGS.output)
    return cases, Programs(FLAGS.output, FLAGS.compile)


def main(argv: list[str]) -> None:
    """Compiles every case and prints it."""
    entry_point.refuse_arguments(argv)
    # The CPU even if there is a TPU, which is not needed. A cache would spoil compile times.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        cases, programs = set_up()
    except ValueError as error:
        sys.exit(entry_point.refusal(error))
    rows, failed = [], 0
    for number, (setting, method) in enumerate(cases, start=1):
        timing.progress(
            f"[{number}/{len(cases)}] {setting.topology} {setting.model} {setting.dtype} "
            f"C={setting.num_classes} {method}"
        )
        result = compile_case(setting, method, programs)
        if result is None:
            continue
        outcome = checks(result)
        failed += sum(not check.passed for check in outcome)
        rows.append(program_report.cells(result, outcome))
        if not FLAGS.markdown:
            print(program_report.text(result, outcome), end="\n\n", flush=True)
    if FLAGS.markdown:
        print(tables.markdown_table([program_report.COLUMNS, *rows]), end="")
    if failed:
        sys.exit(f"{failed} checks failed")


if __name__ == "__main__":
    entry_point.start(define_flags, main)
