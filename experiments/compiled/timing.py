"""Times two programs in turn, so that a machine whose speed drifts slows both."""

import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

import lpa_jax

WARM_UP_ROUNDS = 2
Compiled = Any


def define_sizes(batch_size: int) -> None:
    """Defines the flags for the sizes of a batch of random images, with the default of B."""
    for name, default, most, about in (
        ("batch_size", batch_size, 2**20, "Examples in a step, over all devices."),
        ("image_size", 32, 2**12, "Height and width of the random images."),
        ("channels", 3, 2**10, "Channels of the random images."),
    ):
        flags.DEFINE_integer(name, default, about, lower_bound=1, upper_bound=most)


def cores() -> int:
    """Number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def clock() -> tuple[str, Callable[[], float]]:
    """Name and function of the benchmarks' clock, in seconds.

    On one CPU core it is the CPU time of this process and of its children that have ended: about
    the wall time of an idle machine, and on a busy one without the time of other programs.
    Otherwise it is the wall time.
    """
    if cores() == 1 and jax.default_backend() == "cpu":
        return "CPU time", _cpu_seconds
    return "wall time", time.perf_counter


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class Rounds(NamedTuple):
    """Measurements of two programs that took turns: of each one number a round."""

    first: tuple[float, ...]
    second: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """Second / first, by round.

        >>> Rounds((2.0, 4.0), (3.0, 5.0)).ratios
        [1.5, 1.25]
        """
        return [second / first for first, second in zip(*self, strict=True)]

    @property
    def ratio(self) -> float:
        """Median of the ratios, each of two measurements that were made one after the other."""
        return statistics.median(self.ratios)


def in_turn(
    first: Callable[[], float], second: Callable[[], float], rounds: int, warm_up: int
) -> Rounds:
    """Calls two measurements once a round; which of them goes first alternates.

    Args:
      first: returns what it measured.
      second: the same of the other.
      rounds: number of rounds to return.
      warm_up: number of rounds before those.
    """
    measured = []
    for number in range(warm_up + rounds):
        one, other = (first, second) if number % 2 == 0 else (second, first)
        pair = one(), other()
        measured.append(pair if number % 2 == 0 else pair[::-1])
    return Rounds(*zip(*measured[warm_up:], strict=True))


def time_steps(
    first: tuple[Compiled, lpa_jax.TrainState],
    second: tuple[Compiled, lpa_jax.TrainState],
    batch: Mapping[str, jax.Array],
    rounds: int,
) -> Rounds:
    """Milliseconds of one training step of each, by round, in the same process.

    Each step starts from the state that its last one returned and is waited for.
    """
    return in_turn(timed(*first, batch), timed(*second, batch), rounds, WARM_UP_ROUNDS)


def timed(
    step: Compiled, state: lpa_jax.TrainState, batch: Mapping[str, jax.Array]
) -> Callable[[], float]:
    """A function that runs the next step from `state` and returns its milliseconds."""
    state = jax.tree.map(jnp.copy, state)  # steps donate their state; the caller keeps the original
    jax.block_until_ready(state)

    def run():
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    return milliseconds(run)


def milliseconds(call: Callable[[], object]) -> Callable[[], float]:
    """A function that calls `call` and returns the milliseconds that it took."""
    _, now = clock()

    def measured():
        start = now()
        call()
        return 1e3 * (now() - start)

    return measured


def devices() -> str:
    """Number and kind of the devices, such as `8 x TPU v4`."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def progress(line: str) -> None:
    """Prints a line on standard error."""
    print(line, file=sys.stderr, flush=True)


def whole_numbers(flag: str, texts: Sequence[str], low: int, high: int = 10**6) -> list[int]:
    """Values of a list flag as whole numbers.

    Raises:
      ValueError: there is none, or one is no whole number in low..high.
    """
    found = [int(text) for text in texts if text.strip().isdecimal() and len(text) < 20]
    if not texts or len(found) < len(texts) or not all(low <= number <= high for number in found):
        given = ",".join(texts)[:200]
        raise ValueError(f"--{flag} must be whole numbers in {low}..{high}, got {given!r}")
    return found
