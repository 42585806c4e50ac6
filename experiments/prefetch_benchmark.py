r"""Times training with and without the next batch being read and placed while a step runs.

    python -m experiments.prefetch_benchmark --model=resnet8 --image_size=32

A benchmark on random images, nothing is learned. Three sources: arrays in memory, JPEG files that
are decoded when they are asked for, and the same files read ahead in threads, as the experiments
do it. In every round the same steps run once with `lpa_jax.data.prefetch.Prefetched` and once
without, in alternating order, and the last one is waited for. The ratio is the median of the
rounds' ratios, so that a machine whose speed drifts slows both.

Where the devices are the processor's own cores, reading ahead takes its time from the step; what
it gains on an accelerator is not to be read from a row measured there.
"""

import contextlib
import dataclasses
import functools
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
import optax
import PIL.Image
from absl import app, flags

import lpa_jax
from lpa_jax import data, models, parallel
from lpa_jax.data.prefetch import Prefetched

FLAGS = flags.FLAGS
CLASSES = 10


def define_flags() -> None:
    """Flags of this module."""
    flags.DEFINE_enum("model", "resnet8", models.names(), "Network.")
    flags.DEFINE_integer("image_size", 32, "Height and width that a step sees.", lower_bound=1)
    flags.DEFINE_integer("file_size", 256, "Height and width of the files.", lower_bound=1)
    flags.DEFINE_integer("images", 512, "Images of the set.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 64, "Examples in a step.", lower_bound=1)
    flags.DEFINE_integer("steps", 16, "Steps of one timing.", lower_bound=1)
    flags.DEFINE_integer("rounds", 7, "Rounds of one timing each way.", lower_bound=1)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      source: where batches come from.
      plain: steps a second without prefetching, median over the rounds.
      prefetched: steps a second with it.
      ratio: median over the rounds of the second over the first.
      lowest, highest: range of that ratio.
    """

    source: str
    plain: float
    prefetched: float
    ratio: float
    lowest: float
    highest: float


@contextlib.contextmanager
def sources() -> Iterator[dict[str, Callable[[], data.Batches | data.ReadAhead]]]:
    """What makes the batches of each source; the files are gone after the block."""
    rng = np.random.default_rng(0)
    labels = np.arange(FLAGS.images, dtype=np.int32) % CLASSES
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{number}.jpg" for number in range(FLAGS.images)]
        for name in names:
            # Noise of a few pixels: as hard to decode as a photograph, about as large a file.
            coarse = rng.integers(0, 256, (FLAGS.file_size // 4 + 1,) * 2 + (3,), np.uint8)
            pixels = coarse.repeat(4, axis=0).repeat(4, axis=1)
            PIL.Image.fromarray(pixels[: FLAGS.file_size, : FLAGS.file_size]).save(
                pathlib.Path(folder, name)
            )
        on_disk = data.open_image_files(
            "jpeg", folder, names, labels, CLASSES, image_size=FLAGS.image_size
        )
        batches = functools.partial(data.batches, seed=0, batch_size=FLAGS.batch_size)
        in_memory = data.in_memory(on_disk)
        yield {
            "memory": lambda: batches(in_memory),
            "files": lambda: batches(on_disk),
            "files, read ahead": lambda: data.read_ahead(batches(on_disk)),
        }


def make_step() -> tuple[parallel.MappedStep, lpa_jax.TrainState]:
    """A step of plain training, which is compiled once for all sources, and its first state."""
    step = parallel.map_step(
        functools.partial(lpa_jax.lpa_step, augment=_scaled), num_classes=CLASSES
    )
    example = {"image": np.zeros((FLAGS.batch_size, FLAGS.image_size, FLAGS.image_size, 3), "f4")}
    model = models.create(FLAGS.model, CLASSES)
    # A rate so small that random labels cannot drive a long run out of range.
    return step, lpa_jax.TrainState.create(model, optax.sgd(1e-3), jax.random.key(0), example)


def measure(
    source: str,
    make_batches: Callable[[], data.Batches | data.ReadAhead],
    step: parallel.MappedStep,
    state: lpa_jax.TrainState,
) -> Row:
    """Times the steps both ways, in turn, after one round that is not counted."""
    rounds = []
    for number in range(1 + FLAGS.rounds):
        rates = {}
        for prefetch in (False, True) if number % 2 else (True, False):
            with contextlib.ExitStack() as stack:
                batches = make_batches()
                if prefetch:
                    batches = stack.enter_context(Prefetched(batches, step.place))
                rates[prefetch] = _steps_a_second(step, state, batches)
        rounds.append((rates[False], rates[True]))
    plain, prefetched = zip(*rounds[1:], strict=True)
    ratios = [there / here for here, there in rounds[1:]]
    return Row(
        source,
        statistics.median(plain),
        statistics.median(prefetched),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
    )


def _scaled(rng, images, positions):
    del rng, positions
    return images.astype(np.float32) / 255


def _steps_a_second(step, state, batches) -> float:
    started = time.perf_counter()
    for number in range(FLAGS.steps):
        state, pairs = step(state, batches[number])
        if parallel.must_block():
            jax.block_until_ready(pairs)
    jax.block_until_ready(state)
    return FLAGS.steps / (time.perf_counter() - started)


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| source | steps/s without | with | ratio | range |", "|" + " --- |" * 5]
    lines += [
        f"| {row.source} | {row.plain:.2f} | {row.prefetched:.2f} | {row.ratio:.3f} | "
        f"{row.lowest:.2f} to {row.highest:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Measures every source, prints the table."""
    if len(argv) > 1:
        raise app.UsageError(
            f"unexpected argument {argv[1]!r}; options are flags, --help lists them"
        )
    if FLAGS.batch_size % jax.device_count():
        sys.exit(
            f"error: --batch_size={FLAGS.batch_size} must be a multiple of the "
            f"{jax.device_count()} devices"
        )
    rows = []
    try:
        with sources() as found:
            step, state = make_step()
            for source, make_batches in found.items():
                rows.append(measure(source, make_batches, step, state))
                print(source, file=sys.stderr, flush=True)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(
        f"{FLAGS.model}, batch {FLAGS.batch_size}, files of {FLAGS.file_size} pixels a side to "
        f"{FLAGS.image_size}, {FLAGS.steps} steps a timing, {FLAGS.rounds} rounds, "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}\n"
    )
    print(table(rows))


if __name__ == "__main__":
    define_flags()
    app.run(main)
