r"""Many classes: what the table of class perturbations costs in memory and time, as C grows.

    python -m experiments.many_classes --model=resnet8 --layer=stage3 --classes=10,1000,8142

A benchmark on random images, nothing is learned. A batch holds few of the many classes; a step must
not pay for the others beyond the memory of their rows. Every row of the table is one (C, mode,
shape): the size of the table that training keeps, the memory of the compiled step beside that of
plain training (ERM) with the same C, and the time of a step as a ratio to an ERM step of the same
round (`experiments.benchmark` says how that is measured). The classifier itself grows with C; ERM
pays for it too, so the ratio shows what LPA adds.

Where a table does not fit into --memory_limit, its row says so instead of being measured. The
defaults take about ten minutes on two CPU cores, most of it compilation.
"""

import dataclasses
import statistics
import sys
from collections.abc import Iterator, Sequence

import jax
from absl import app, flags

import lpa_jax
from experiments.compiled import step_cost
from lpa_jax import injection, models, pgd
from lpa_jax.perturbations.lpa import MODES

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Flags of this module."""
    flags.DEFINE_enum("model", "resnet8", models.names(), "Network.")
    flags.DEFINE_string("layer", "stage3", "Injection point.")
    flags.DEFINE_list("classes", ["10", "100", "1000", "8142"], "Numbers of classes C.")
    flags.DEFINE_list("modes", list(MODES), f"Modes of lpa: {', '.join(MODES)}.")
    flags.DEFINE_list("shapes", list(pgd.SHAPES), f"Shapes of delta: {', '.join(pgd.SHAPES)}.")
    flags.DEFINE_integer("steps", 1, "PGD steps of mode cold.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 128, "Examples in a step.", lower_bound=1)
    flags.DEFINE_integer("image_size", 32, "Height and width of the random images.", lower_bound=1)
    flags.DEFINE_integer("channels", 3, "Channels of the random images.", lower_bound=1)
    flags.DEFINE_integer("rounds", 11, "Rounds of one ERM and one LPA step.", lower_bound=1)
    flags.DEFINE_float("memory_limit", 1024.0, "MB that a table may take.", lower_bound=0)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      classes: C.
      mode, shape: options of lpa.
      table_mb: perturbations that training keeps, 1e6 bytes.
      memory_mb: memory of the compiled step, 1e6 bytes: arguments, results and temporaries.
      erm_memory_mb: that of the ERM step.
      erm_ms, step_ms: medians of a step's time.
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


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A line of the table that was not measured, and why."""

    classes: int
    mode: str
    shape: str
    reason: str


def numbers(flag: str, texts: Sequence[str]) -> list[int]:
    """Whole numbers >= 2 from a list flag.

    Raises:
      ValueError: naming the flag.
    """
    if not texts or not all(text.strip().isdecimal() and int(text) > 1 for text in texts):
        raise ValueError(f"--{flag} must be whole numbers >= 2, got {','.join(texts)!r}")
    return [int(text) for text in texts]


def chosen(flag: str, texts: Sequence[str], allowed: Sequence[str]) -> list[str]:
    """Names from a list flag.

    Raises:
      ValueError: naming the flag.
    """
    if not texts or not set(texts) <= set(allowed):
        raise ValueError(f"--{flag} must be among {', '.join(allowed)}, got {','.join(texts)!r}")
    return list(texts)


def measure_all(classes: Sequence[int], modes: Sequence[str], shapes: Sequence[str]) -> Iterator:
    """Yields a `Row` or a `Refusal` for every combination; ERM is compiled once for each C."""
    for num_classes in classes:
        model = models.create(FLAGS.model, num_classes)
        injection.check_layer(model.layers, FLAGS.layer)
        state, batch = step_cost.make_state(
            model, FLAGS.batch_size, FLAGS.image_size, FLAGS.channels
        )
        erm, _ = step_cost.compile_step(state, batch, {})
        for mode in modes:
            for shape in shapes:
                try:
                    yield measure(state, batch, erm, mode, shape)
                except ValueError as error:
                    yield Refusal(num_classes, mode, shape, str(error))


def measure(state: lpa_jax.TrainState, batch, erm, mode: str, shape: str) -> Row:
    """Compiles and times one combination against the ERM step.

    Raises:
      ValueError: the table does not fit.
    """
    # Equal class counts: the rule's cost does not depend on them.
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
    rounds = step_cost.alternate((erm, state), (step, own_state), batch, FLAGS.rounds)
    erm_ms, step_ms = zip(*rounds, strict=True)
    return Row(
        classes=state.num_classes,
        mode=mode,
        shape=shape,
        table_mb=sum(leaf.nbytes for leaf in jax.tree.leaves(own_state.perturbation_state)) / 1e6,
        memory_mb=step_cost.memory_mb(step),
        erm_memory_mb=step_cost.memory_mb(erm),
        erm_ms=statistics.median(erm_ms),
        step_ms=statistics.median(step_ms),
        ratio=statistics.median(own / plain for plain, own in rounds),
        extra_ms=statistics.median(own - plain for plain, own in rounds),
    )


def table(rows: Sequence[Row | Refusal]) -> str:
    """The rows in Markdown; a refused one has its reason below the table."""
    names = [field.name for field in dataclasses.fields(Row)]
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    reasons = []
    for row in rows:
        cells = [str(getattr(row, name)) for name in names[:3]]
        if isinstance(row, Refusal):
            cells += ["-"] * (len(names) - 3)
            reasons.append(f"{row.classes} {row.mode} {row.shape}: {row.reason}")
        else:
            cells += [f"{getattr(row, name):.4g}" for name in names[3:]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *reasons])


def main(argv: list[str]) -> None:
    """Measures every combination, prints the table."""
    if len(argv) > 1:
        raise app.UsageError(
            f"unexpected argument {argv[1]!r}; options are flags, --help lists them"
        )
    rows: list[Row | Refusal] = []
    try:
        classes = numbers("classes", FLAGS.classes)
        modes = chosen("modes", FLAGS.modes, MODES)
        shapes = chosen("shapes", FLAGS.shapes, pgd.SHAPES)
        for row in measure_all(classes, modes, shapes):
            rows.append(row)
            print(f"{row.classes} {row.mode} {row.shape}", file=sys.stderr, flush=True)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(
        f"{FLAGS.model} at {FLAGS.layer}, batch {FLAGS.batch_size}, {FLAGS.steps} cold steps, "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}, {FLAGS.rounds} rounds\n"
    )
    print(table(rows))


if __name__ == "__main__":
    define_flags()
    app.run(main)
