r"""Many classes: memory and time of the table of class perturbations, as C grows.

    python -m experiments.many_classes --model=resnet8 --layer=stage3 --classes=10,1000,8142

The batch is random and nothing is learned. It holds few of the many classes; beyond the memory of
their rows, a step must not pay for the others. Every row of the table is one (C, mode, shape): the
memory of the table that training keeps, the memory of the compiled step beside that of plain
training (ERM) with the same C, and the time of a step relative to an ERM step of the same round
(see `experiments.benchmark`). The classifier grows with C for ERM too, so the ratio shows what LPA
adds.

If a table exceeds --memory_limit, its row is empty and the reason follows the table. The defaults
take about ten minutes on two CPU cores, most of it for compilation.
"""

import itertools
import statistics
import sys
from typing import NamedTuple

import jax
from absl import flags

import lpa_jax
from experiments.compiled import step_cost, timing
from experiments.reporting import screen
from experiments.runtime import fields
from experiments.runtime import main as entry_point
from lpa_jax import injection, models, pgd
from lpa_jax.perturbations.lpa import MODES

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_enum("model", "resnet8", models.names(), "Network.")
    flags.DEFINE_string("layer", "stage3", "Injection point.")
    flags.DEFINE_list("classes", ["10", "100", "1000", "8142"], "Numbers of classes C.")
    flags.DEFINE_list("modes", list(MODES), f"Modes of lpa: {', '.join(MODES)}.")
    flags.DEFINE_list("shapes", list(pgd.SHAPES), f"Shapes of delta: {', '.join(pgd.SHAPES)}.")
    flags.DEFINE_integer("steps", 1, "PGD steps of mode cold.", lower_bound=1, upper_bound=1000)
    timing.define_sizes(128)
    flags.DEFINE_integer(
        "rounds", 11, "Rounds of one ERM and one LPA step.", lower_bound=1, upper_bound=10**6
    )
    flags.DEFINE_float("memory_limit", 1024.0, "MB that a table may take.", lower_bound=0)


class Row(NamedTuple):
    """One row of the table.

    Attributes:
      classes: C.
      mode, shape: options of lpa.
      table_mb: perturbations that training keeps, in 1e6 bytes.
      memory_mb: arguments, results and temporaries of the compiled step, in 1e6 bytes.
      erm_memory_mb: those of the ERM step.
      erm_ms, step_ms: milliseconds of a step, medians over the rounds.
      ratio: median over the rounds of LPA time / ERM time.
      extra_ms: median over the rounds of LPA time - ERM time.
    """

    classes: int
    mode: str
    shape: str
    table_mb: float
    memory_mb: float
    erm_memory_mb: float
    erm_ms: float
    step_ms: float
    ratio: float
    extra_ms: float


def measure(state: lpa_jax.TrainState, batch, erm, mode: str, shape: str) -> Row:
    """Compiles one combination and times it against the ERM step.

    Raises:
      ValueError: the table exceeds --memory_limit.
    """
    # Equal class counts: the cost does not depend on them.
    rule = lpa_jax.by_frequency([1] * state.num_classes)
    perturbation = lpa_jax.lpa(
        step_cost.RADIUS,
        FLAGS.steps if mode == "cold" else 1,
        mode=mode,
        shape=shape,
        assignment=rule,
        memory_limit=int(FLAGS.memory_limit * 1e6),
    )
    plan = {FLAGS.layer: perturbation}
    own_state = step_cost.with_perturbations(state, batch, plan)
    step, _ = step_cost.compile_step(own_state, batch, plan)
    times = timing.time_steps((erm, state), (step, own_state), batch, FLAGS.rounds)
    return Row(
        classes=state.num_classes,
        mode=mode,
        shape=shape,
        table_mb=sum(leaf.nbytes for leaf in jax.tree.leaves(own_state.perturbation_state)) / 1e6,
        memory_mb=step_cost.memory_mb(step),
        erm_memory_mb=step_cost.memory_mb(erm),
        erm_ms=statistics.median(times.first),
        step_ms=statistics.median(times.second),
        ratio=times.ratio,
        extra_ms=statistics.median(own - plain for plain, own in zip(*times, strict=True)),
    )


def measure_all() -> tuple[list[list[str]], list[str]]:
    """The rows of the table as text, and the reasons of those that are empty.

    Raises:
      ValueError: naming the flag that is out of range.
    """
    classes = timing.whole_numbers("classes", FLAGS.classes, low=2)
    modes = fields.among("modes", FLAGS.modes, MODES)
    shapes = fields.among("shapes", FLAGS.shapes, pgd.SHAPES)
    rows, reasons = [], []
    for num_classes in classes:
        model = models.create(FLAGS.model, num_classes)
        injection.check_layer(model.layers, FLAGS.layer)
        state, batch = step_cost.make_state(
            model, FLAGS.batch_size, FLAGS.image_size, FLAGS.channels
        )
        erm, _ = step_cost.compile_step(state, batch, {})
        for mode, shape in itertools.product(modes, shapes):
            name = [str(num_classes), mode, shape]
            try:
                numbers = measure(state, batch, erm, mode, shape)[len(name) :]
                rows.append(name + [f"{number:.4g}" for number in numbers])
            except ValueError as error:
                rows.append(name + ["-"] * (len(Row._fields) - len(name)))
                reasons.append(f"{' '.join(name)}: {error}")
            timing.progress(" ".join(name))
    return rows, reasons


def main(argv: list[str]) -> None:
    """Measures every combination and prints the table."""
    entry_point.refuse_arguments(argv)
    entry_point.check_devices()
    try:
        rows, reasons = measure_all()
    except ValueError as error:
        sys.exit(entry_point.refusal(error))
    screen.show(
        f"{FLAGS.model} at {FLAGS.layer}, batch {FLAGS.batch_size}, {FLAGS.steps} cold steps, "
        f"{timing.devices()}, {FLAGS.rounds} rounds, {timing.clock()[0]}\n"
    )
    headers = [name.replace("_mb", " MB").replace("_ms", " ms").replace("_", " ")
               for name in Row._fields]  # fmt: skip
    screen.show_table([headers, *rows], keys=3)
    screen.show("\n".join(reasons))


if __name__ == "__main__":
    entry_point.start(define_flags, main)
