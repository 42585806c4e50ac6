"""One run of any protocol, from the first step to a complete result file."""

import abc
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from experiments.methods.names import parse, part_options
from experiments.training.folder import USUAL, Names, RunFolder
from experiments.training.log import Logging, RunLog
from experiments.training.program import Program
from experiments.training.saving import Saving
from experiments.training.task import Task
from lpa_jax import metrics, multihost, parallel
from lpa_jax.data.prefetch import Prefetched
from lpa_jax.injection import LOGITS
from lpa_jax.perturbations import radius_target
from lpa_jax.training import loop
from lpa_jax.training.interrupts import InterruptedRunError
from lpa_jax.training.step import TrainState

DEFAULT_SAVING = Saving()
DEFAULT_LOGGING = Logging()
# Share of the training examples that the perturbation alone makes correct. Where networks read the
# label from it this was 0.3 to 1 (results/leakage).
LEAKING = 0.2


class Job(abc.ABC):
    """A network to train, and what its files hold: each protocol defines its own.

    Attributes:
      program: the compiled method.
      task: the data.
      seed: of the initial parameters and of the order of the data.
      names: names of the files.
    """

    program: Program
    task: Task
    seed: int
    names: Names = USUAL

    @abc.abstractmethod
    def configuration(self) -> dict[str, Any]:
        """Everything that decides the result, as plain values."""

    @abc.abstractmethod
    def evaluation(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """The metrics of an evaluation, from those of every evaluation set."""

    @abc.abstractmethod
    def row(self, state: TrainState, record: loop.EpochRecord) -> dict[str, Any]:
        """The line of the log after an epoch."""

    @abc.abstractmethod
    def score(self, evaluation: Mapping[str, Any]) -> float:
        """The accuracy by which the best checkpoint is chosen."""

    @abc.abstractmethod
    def result(
        self, rows: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What the result file holds, from all lines of the log and the last evaluation."""

    def diverged(self, error: loop.NonFiniteLossError) -> dict[str, Any]:
        """What the result file holds if the loss diverged; by default that is no result."""
        raise error


def run(
    job: Job,
    folder: pathlib.Path | None,
    *,
    on_epoch: Callable[[loop.EpochRecord], None] = lambda record: None,
    on_step: Callable[[int, float, loop.Totals], None] = lambda step, epochs, totals: None,
    saving: Saving = DEFAULT_SAVING,
    logging: Logging = DEFAULT_LOGGING,
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Trains and evaluates; writes configuration, log and result.

    If the folder holds the complete result of the same run, the result is read instead. If it holds
    checkpoints of it, the run resumes from the newest intact one, to the same result bit for bit.

    Args:
      job: what to train.
      folder: of this run alone; None writes nothing.
      on_epoch: called after every epoch.
      on_step: called after all other steps with the number of steps, the same in epochs, and the
        sums of the epoch's metrics; reading these waits for the devices.
      saving: when to save checkpoints, and how many to keep.
      logging: what to log beyond scalars; changes no result.
      should_stop: called after every step and before every evaluation batch; True saves a
        checkpoint and raises. Several hosts must get the same answer at the same time, as
        `Interrupts` gives it.
      say: called with a line for each damaged checkpoint or file, and for each layer at which the
        network reads the label from the perturbation.

    Returns:
      What the result file holds: that of the job, and "complete", "seconds", "environment".

    Raises:
      ValueError: the folder holds another run.
      NonFiniteLossError: the loss diverged, and the job takes this for no result.
      CheckpointError: a checkpoint cannot be written, or none is intact.
      hosts.DifferingHostsError: the processes would not start from the same state.
      InterruptedRunError: `should_stop` returned True; the same call resumes the run.
    """
    run_folder = RunFolder(folder, job.configuration(), saving, job.names)
    earlier = run_folder.result(say)
    if earlier is not None:
        return earlier
    if should_stop():
        raise InterruptedRunError("stopped before the run began")
    program, task, seed = job.program, job.task, job.seed
    restored = run_folder.begin(program.init(seed), say)
    started = time.perf_counter() - restored.notes.get("seconds", 0.0)
    length, batches = program.length, task.train_batches(program.settings, seed)
    evaluated = task.evaluation_batches()
    log_folder = folder if multihost.is_first_host() else None
    record, warned = None, set()
    with (
        RunLog(log_folder, restored.notes.get("rows", ()), logging) as log,
        Prefetched(batches, program.place) as batches,
    ):

        def notes():
            return {"rows": log.rows, "seconds": time.perf_counter() - started}

        try:
            for state, record in loop.train(
                restored.state,
                program.stages,
                batches,
                length.epochs,
                evaluate=lambda state: evaluate(job, state, evaluated, should_stop),
                evaluate_every=length.evaluate_every,
                totals=restored.totals,
                save=lambda state, totals: run_folder.save(state, totals, notes()),
                should_save=saving.schedule(length.steps_per_epoch, length.total_steps),
                should_stop=should_stop,
                watch=lambda done, totals: on_step(done, done / length.steps_per_epoch, totals),
                block_every_step=parallel.must_block(),
            ):
                row = job.row(state, record)
                log.write(record.step, row, **_details(logging, state, record))
                for about, line in (leaks(row, program.method) | unreached_targets(row)).items():
                    if about not in warned:
                        say(f"epoch {record.epoch}: {line}")
                    warned.add(about)
                if record.evaluation is not None:
                    run_folder.score(state, job.score(record.evaluation), notes())
                on_epoch(record)
            if record is None or record.epoch < length.epochs:
                raise InterruptedRunError("stopped, and what was done is saved")
            result = job.result(log.rows, record.evaluation)
            log.finish(_hparams(job), result.get("accuracy"))
        except loop.NonFiniteLossError as error:
            result = job.diverged(error)
    seconds = time.perf_counter() - started
    return run_folder.finish({"complete": True, **result, "seconds": seconds})


def evaluate(
    job: Job,
    state: TrainState,
    evaluated: Mapping[str, Sequence[Any]],
    should_stop: Callable[[], bool],
) -> dict[str, Any] | None:
    """The metrics of all evaluation sets, each example counted once; None if asked to stop."""
    totals = {}
    for name, batches in evaluated.items():
        for number in range(len(batches)):
            if should_stop():
                return None
            pairs = job.program.evaluate(state, batches[number])
            totals[name] = metrics.add(totals[name], pairs) if name in totals else pairs
    # The host waits once for all sets.
    return job.evaluation(metrics.compute(totals))


def leaks(row: Mapping[str, Any], method: str) -> dict[str, str]:
    """A warning for each layer at which the network reads the label from the perturbation.

    >>> leaks({"effect/stage2/accuracy_change/negative": 0.9}, "lpa")["stage2"][:49]
    'warning: at stage2 the perturbation of negative c'
    """
    found = {}
    for layer, sign, gain in _effects(row, "accuracy_change"):
        if gain > LEAKING:
            radius = row.get(f"effect/{layer}/radius/{sign}")
            there = "" if radius is None else f" ({radius:.3g} there)"
            sparing = "".join(f" or set {option}=0.5" for option in _probabilities(method, layer))
            found[layer] = (
                f"warning: at {layer} the perturbation of {sign} classes tells the network the "
                f"label: {100 * gain:.0f} % more training examples are correct with it than "
                f"without; lower its radius{there}{sparing}"
            )
    return found


def unreached_targets(row: Mapping[str, Any]) -> dict[str, str]:
    """A warning for each layer and sign at which `radius_target` has no larger radius to give.

    >>> list(unreached_targets({"effect/stage2/radius_scale/positive": 100.0}))
    ['effect/stage2/radius_scale/positive']
    """
    found = {}
    for layer, sign, scale in _effects(row, "radius_scale"):
        if scale >= radius_target.BOUND * (1 - 1e-4):
            found[f"effect/{layer}/radius_scale/{sign}"] = (
                f"warning: at {layer} the radius of {sign} classes has grown to its limit, "
                f"{radius_target.BOUND:.0f} times the radius that was set, and the loss still "
                "changes by less than radius_target; lower radius_target"
            )
    return found


def _effects(row: Mapping[str, Any], name: str) -> Iterator[tuple[str, str, float]]:
    """(layer, sign, value) of each logged effect of a name."""
    for field, value in row.items():
        layer, _, sign = field.removeprefix("effect/").partition(f"/{name}/")
        if sign and value is not None:
            yield layer, sign, value


def _probabilities(method: str, layer: str) -> list[str]:
    """Options of the method that leave some examples as they are at a layer."""
    parts = [part for part in parse(method) if layer in (part.layer or layer).split("|")]
    at_logits = [part for part in parts if part.name == "lpl" and layer == LOGITS]
    names = [part.name for part in at_logits or parts]
    return [f"{name}.probability" for name in names if "probability" in part_options(name)]


def _details(logging: Logging, state: TrainState, record: loop.EpochRecord) -> dict[str, Any]:
    """What TensorBoard alone gets at evaluations."""
    if logging.tensorboard != "full" or record.evaluation is None:
        return {}
    weights, per_class = jax.device_get(state.params), record.evaluation["per_class_accuracy"]
    return {"weights": weights, "class_accuracy": per_class}


def _hparams(job: Job) -> dict[str, Any]:
    """What TensorBoard compares runs by: the method, the seed, and the options that are numbers."""
    numbers = {k: v for k, v in job.program.options.items() if isinstance(v, int | float | str)}
    return {"method": job.program.method, "seed": job.seed, **numbers}


def adapted_radii(state: TrainState) -> dict[str, float]:
    """Factors on the radii of perturbations with a `radius_target`, by layer and sign group."""
    kept = jax.tree_util.tree_leaves_with_path(dict(state.perturbation_state))
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in kept}
    return {
        f"effect/{name}/{group}": float(factor)
        for name, factors in named.items()
        if name.endswith("/radius_scale")
        for group, factor in zip(("positive", "negative"), jax.device_get(factors), strict=True)
    }
