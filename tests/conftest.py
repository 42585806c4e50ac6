"""What holds for every test: strict shapes, the CPU, a compilation cache that outlives the run."""

import functools
import gc
import os
import pathlib
import signal
import sys

from tests.helpers import xla_options

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".jax_cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("XLA_FLAGS", xla_options.known())

import jax
import numpy as np
import pytest

from tests.helpers import lowering, module_call

lowering.share_contexts()
# Tracing makes and drops millions of small objects; 700 at a time is too few to look for cycles.
gc.set_threshold(50_000, 5, 5)
# The asserts that pytest rewrites are cached as well, 6 s of each worker.
sys.dont_write_bytecode = False
jax.config.update("jax_numpy_rank_promotion", "raise")
# Here every program is cached; the processes that tests start, and may kill, cache the slow ones.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
# A shell that starts the tests in the background has them, and what they start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# The files that take longest start first, so that all workers end at about the same time.
LONGEST = (
    "test_parallel", "test_landscape", "test_protocols", "test_multihost", "test_reliability",
    "test_experiments", "test_generalization", "test_layer_sweep", "test_sweep", "test_docs",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_collection_finish():
    """Spares the garbage collector everything that was imported."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_display(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def images():
    """Four random images, [4, 8, 8, 3]."""
    draws = np.random.default_rng(1).normal(size=(4, 8, 8, 3))
    return jax.numpy.asarray(draws, jax.numpy.float32)


@pytest.fixture
def planned(tmp_path):
    """Four jobs of two settings, written down."""
    from experiments.jobs import jobs  # for those tests alone

    made = jobs.plan(tmp_path, "long_tail", ["erm", "lpa"], [1], {"imbalance": ["10", "100"]})
    jobs.prepare(made)
    return made


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Where embedded sets are prepared, once for all test files of a process.

    The domains of MNIST are made of images that are read once.
    """
    from lpa_jax.data import sources  # for those tests alone

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "load", functools.cache(sources.load))
        yield tmp_path_factory.getbasetemp() / "tfds"


@pytest.fixture
def run(data_dir, capsys):
    """(module, *flags) -> (exit message or None, standard output, standard error).

    Its figures are not drawn.
    """
    from tests.helpers import drawn_texts  # for those tests alone

    def run_and_capture(name, *arguments):
        with drawn_texts.undrawn():
            message = module_call.call_by_name(data_dir, name, *arguments)
        captured = capsys.readouterr()
        return message, captured.out, captured.err

    return run_and_capture


@pytest.fixture
def refusal(run, tmp_path):
    """(module, *flags) -> the one line that refuses them; nothing is printed or written."""

    def refused(name, *arguments):
        workdir = tmp_path / "refused"
        message, out, _ = run(name, f"--workdir={workdir}", *arguments)
        assert message is not None and "\n" not in message.strip() and not out
        assert not workdir.exists()
        return message

    return refused
