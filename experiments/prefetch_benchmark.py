r"""Times training with and without prefetching: reading and placing batches while a step runs.

    python -m experiments.prefetch_benchmark --model=resnet8 --image_size=32

The images are random and nothing is learned. The batches have three sources: arrays in memory, JPEG
files that are decoded on demand, and the same files read ahead in threads, as the experiments do
it. In every round the same steps run once with `lpa_jax.data.prefetch.Prefetched` and once without,
in alternating order, and the last one is waited for. The ratio is the median of the ratios of the
rounds, so that a machine whose speed drifts slows both.

On CPU devices, reading ahead competes with the step for the cores; such a row does not show the
gain on an accelerator.
"""

import contextlib
import functools
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
import optax
import PIL.Image
from absl import flags

import lpa_jax
from experiments.compiled import timing
from experiments.reporting import screen
from experiments.runtime import main as entry_point
from lpa_jax import data, models, parallel
from lpa_jax.data.prefetch import Prefetched

FLAGS = flags.FLAGS
CLASSES = 10
HEADER = ("source", "steps/s without", "with", "ratio", "range")
Batches = data.Batches | data.Prefetched


def define_flags() -> None:
    flags.DEFINE_enum("model", "resnet8", models.names(), "Network.")
    flags.DEFINE_integer(
        "image_size", 32, "Height and width that a step sees.", lower_bound=1, upper_bound=2**12
    )
    flags.DEFINE_integer(
        "file_size", 256, "Height and width of the files.", lower_bound=1, upper_bound=2**12
    )
    flags.DEFINE_integer("images", 512, "Images of the set.", lower_bound=1, upper_bound=10**6)
    flags.DEFINE_integer("batch_size", 64, "Examples in a step.", lower_bound=1, upper_bound=2**20)
    flags.DEFINE_integer("steps", 16, "Steps of one timing.", lower_bound=1, upper_bound=1000)
    flags.DEFINE_integer(
        "rounds", 7, "Rounds of one timing each way.", lower_bound=1, upper_bound=10**6
    )


@contextlib.contextmanager
def sources() -> Iterator[dict[str, Callable[[], Batches]]]:
    """Functions that make the batches of each source; the files exist within the block."""
    rng = np.random.default_rng(0)
    labels = np.arange(FLAGS.images, dtype=np.int32) % CLASSES
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{number}.jpg" for number in range(FLAGS.images)]
        for name in names:
            # Blocks of noise take about as long to decode as a photograph.
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
    """A step of plain training, which all sources share, and its first state."""
    step = parallel.map_step(
        functools.partial(lpa_jax.lpa_step, augment=_scaled), num_classes=CLASSES
    )
    example = {"image": np.zeros((FLAGS.batch_size, FLAGS.image_size, FLAGS.image_size, 3), "f4")}
    model = models.create(FLAGS.model, CLASSES)
    # So small that training on random labels does not diverge.
    return step, lpa_jax.TrainState.create(model, optax.sgd(1e-3), jax.random.key(0), example)


def measure(
    make_batches: Callable[[], Batches], step: parallel.MappedStep, state: lpa_jax.TrainState
) -> timing.Rounds:
    """Steps a second without and with prefetching, by round."""

    def without():
        return _steps_a_second(step, state, make_batches())

    def with_():
        with Prefetched(make_batches(), step.place) as batches:
            return _steps_a_second(step, state, batches)

    return timing.in_turn(without, with_, FLAGS.rounds, warm_up=1)


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


def _cells(source: str, rates: timing.Rounds) -> list[str]:
    return [
        source,
        *(f"{statistics.median(rate):.2f}" for rate in rates),
        f"{rates.ratio:.3f}",
        f"{min(rates.ratios):.2f} to {max(rates.ratios):.2f}",
    ]


def main(argv: list[str]) -> None:
    """Measures every source and prints the table."""
    entry_point.refuse_arguments(argv)
    entry_point.check_devices()
    if FLAGS.batch_size % jax.device_count():
        sys.exit(
            f"error: --batch_size must be a multiple of the {jax.device_count()} devices, "
            f"got {FLAGS.batch_size}"
        )
    rows = []
    try:
        with sources() as found:
            step, state = make_step()
            for source, make_batches in found.items():
                rows.append(_cells(source, measure(make_batches, step, state)))
                timing.progress(source)
    except ValueError as error:
        sys.exit(entry_point.refusal(error))
    screen.show(
        f"{FLAGS.model}, batch {FLAGS.batch_size}, files of {FLAGS.file_size} pixels a side to "
        f"{FLAGS.image_size}, {FLAGS.steps} steps a timing, {FLAGS.rounds} rounds, "
        f"{timing.devices()}\n"
    )
    screen.show_table([HEADER, *rows])


if __name__ == "__main__":
    entry_point.start(define_flags, main)
