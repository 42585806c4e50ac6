"""A small run with everything that a checkpoint must hold, for tests that stop and kill it.

    python -m tests.helpers.reliability_worker WORKDIR [--every=3steps] [--pace=0.01]

It prints a line when a phase begins, so that a test can strike in it. What it trains: batch norm,
dropout, momentum under a schedule, carried perturbations, signs from a smoothed confidence, a
radius that adapts to its target, a second loss from the third epoch on, and an epoch of which the
last batch reaches into the next.
"""

import argparse
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import sys
import time
import types

import jax
import numpy as np
import optax

import lpa_jax
from experiments.images.data import ImageTask
from experiments.images.job import ImageJob
from experiments.images.settings import Settings
from experiments.runtime import files
from experiments.training import run as runner
from experiments.training.saving import Saving
from experiments.training.task import Length
from lpa_jax import data, losses, parallel
from lpa_jax.checkpoints import arrays as array_files
from lpa_jax.checkpoints import checkpoints as checkpoint
from lpa_jax.files import LockedError, hold
from lpa_jax.training import loop as trainer
from lpa_jax.training.interrupts import InterruptedRunError, Interrupts
from tests.helpers import toy

EPOCHS, BATCH, EXAMPLES = 4, 8, 42
STEPS_PER_EPOCH = 6
TOTAL_STEPS = EPOCHS * STEPS_PER_EPOCH


def make_task():
    """A task of 42 training images; its evaluation takes three batches."""
    labels = np.random.default_rng(1).integers(toy.CLASSES, size=EXAMPLES + 1200)
    images = toy.batch(labels)["image"]
    sets = [
        data.Dataset("toy", images[part], labels[part].astype(np.int32), toy.CLASSES)
        for part in (slice(EXAMPLES), slice(EXAMPLES, None))
    ]
    return ImageTask(*sets, data.Normalization.fit(sets[0].images), np.arange(EXAMPLES))


def make_program():
    """What a run needs of an `experiments.training.program.Program`."""
    return _program(BATCH)


@functools.cache  # runs of one process share what they compile
def _program(batch_size):
    perturbations = {
        "hidden1": lpa_jax.lpa(
            0.1,
            steps=2,
            mode="carry",
            assignment=lpa_jax.by_confidence(ema=0.9),
            radius_target=0.2,
        ),
        "logits": lpa_jax.lpl(0.5, assignment=lpa_jax.by_confidence()),
    }

    def step_with(loss):
        step = functools.partial(lpa_jax.lpa_step, perturbations=perturbations, loss=loss)
        return parallel.map_step(step, donate_state=True)

    evaluate = parallel.map_step(lpa_jax.eval_step)
    rate = optax.cosine_decay_schedule(0.1, TOTAL_STEPS)
    optimizer = optax.sgd(rate, momentum=0.9)  # the same for all states, or steps compile again
    example = {"image": np.zeros((batch_size, *toy.IMAGE), np.float32)}
    return types.SimpleNamespace(
        method="toy",
        options={},
        settings=Settings(epochs=EPOCHS, batch_size=batch_size, evaluate_every=1),
        init=lambda seed: parallel.with_own_buffers(
            lpa_jax.TrainState.create(
                toy.NormalizedMLP(num_classes=toy.CLASSES, dropout=0.2),
                optimizer,
                jax.random.key(seed),
                example,
                perturbations,
            )
        ),
        stages=((0, step_with(lpa_jax.cross_entropy)), (2, step_with(losses.focal(2.0)))),
        place=evaluate.place,
        evaluate=evaluate,
        learning_rate=lambda step: float(rate(step)),
        has_effects=False,
        length=Length(EPOCHS, STEPS_PER_EPOCH),
    )


def make_job(seed=0):
    """The run."""
    return ImageJob(make_program(), make_task(), seed)


def run(folder, every="3steps", **options):
    """Runs in `folder` to the result; (see `runner.run` for the options)."""
    saving = Saving(every, keep=2, keep_finished=True)
    return runner.run(make_job(), pathlib.Path(folder), saving=saving, **options)


def outcome(folder, last_step=TOTAL_STEPS):
    """All that a run leaves behind, without times: arrays of the last step, log, result."""
    folder = pathlib.Path(folder)
    arrays = array_files.read(folder / f"checkpoints/step_{last_step:09d}" / "arrays")
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = files.read_json(folder / "result.json")
    del result["seconds"]
    for row in (*log, *result["curve"]):
        del row["examples_per_second"]
    return {name: value.tobytes() for name, value in arrays.items()}, log, result


def announce(owner, name, phase):
    """Has a function print its phase when it begins, and when it ends with its seconds."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def announced(*args, **kwargs):
        print(f"begin {phase}", flush=True)
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            print(f"end {phase} {time.perf_counter() - started:.4f}", flush=True)

    setattr(owner, name, announced)


def digest(state):
    """Of all arrays of a state, wherever they lie."""
    arrays = array_files.flatten("state", state)
    return hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays))).hexdigest()


def announce_steps(pace):
    """Has training print the state it begins with and the number of every step.

    The first step of a stage compiles.
    """
    train = trainer.train

    def paced(state, stages, *args, **kwargs):
        print(f"state {int(state.step)} {digest(state)}", flush=True)

        def announced(step):
            def call(state, batch):
                print(f"begin step {int(state.step) + 1}", flush=True)
                time.sleep(pace)
                return step(state, batch)

            return call

        stages = tuple((first, announced(step)) for first, step in stages)
        return train(state, stages, *args, **kwargs)

    trainer.train = paced


def slow_down(owner, name, seconds):
    """Has a function take longer."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def slow(*args, **kwargs):
        time.sleep(seconds)
        return function(*args, **kwargs)

    if seconds:
        setattr(owner, name, slow)


class CompileAnnouncer(logging.Handler):
    """Prints when XLA begins and ends to compile a program, which JAX logs."""

    def emit(self, record):
        message = record.getMessage()
        if message.startswith("Compiling "):
            print("begin compile", flush=True)
        elif message.startswith("Finished XLA compilation "):
            print(f"end compile {re.search(r' in ([0-9.e-]+) sec', message)[1]}", flush=True)


def announce_compilations():
    """Has every program compiled anew, and say so."""
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_log_compiles", True)
    logger = logging.getLogger("jax")
    logger.handlers, logger.propagate = [CompileAnnouncer()], False


def main(arguments):
    """Runs as a command would; exits with its status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--every", default="3steps")
    parser.add_argument("--pace", type=float, default=0.0, help="seconds added to every step")
    parser.add_argument("--pace_files", type=float, default=0.0, help="to every deletion of a file")
    parser.add_argument("--pace_evaluation", type=float, default=0.0, help="to every batch")
    parser.add_argument("--compile", action="store_true", help="without a compilation cache")
    flags = parser.parse_args(arguments)
    if flags.compile:
        announce_compilations()
    announce(array_files, "write", "save")
    announce(array_files, "read", "restore")
    announce(checkpoint.Checkpoints, "_delete", "delete")
    announce(runner, "evaluate", "evaluation")
    announce(files, "write_json", "file")
    announce_steps(flags.pace)
    slow_down(os, "rmdir", flags.pace_files)
    slow_down(os, "unlink", flags.pace_files)
    slow_down(data.EvaluationBatches, "__getitem__", flags.pace_evaluation)
    interrupts = Interrupts(lambda name: os.write(1, f"caught {name}\n".encode()))
    try:
        with hold(flags.folder), interrupts:
            print("begin run", flush=True)
            run(flags.folder, flags.every, should_stop=interrupts, say=print)
    except InterruptedRunError:
        return interrupts.exit_status
    except (checkpoint.CheckpointError, LockedError, ValueError, OSError) as error:
        print(f"error: {error}", flush=True)
        return 1
    print("done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
