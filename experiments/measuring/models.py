"""Trained models of methods and seeds for measurements: missing ones are trained, others loaded.

Runs are in the folders of `long_tail` and `balanced`, `WORKDIR/runs/METHOD/seed_SEED`, and keep
their last checkpoint, so that a comparison with --keep_finished_checkpoints can be measured. The
measurements of a model are kept beside it and are not repeated.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags, logging

from experiments.images import compare
from experiments.images.data import ImageTask, TaskSource
from experiments.images.job import ImageJob
from experiments.images.settings import Settings
from experiments.methods import tuned
from experiments.methods.build import assemble
from experiments.runtime import files
from experiments.training import flags as run_flags
from experiments.training import folder as run_folder
from experiments.training.program import Program
from experiments.training.task import LARGEST_EVALUATION_BATCH, Images, evaluation_batches
from lpa_jax.checkpoints.checkpoints import Checkpoints
from lpa_jax.injection import LOGITS, Network, Pass
from lpa_jax.training.interrupts import InterruptedRunError, Interrupts

FLAGS = flags.FLAGS
Array = jax.Array


class Model(NamedTuple):
    """A trained model and its data.

    Attributes:
      method: its name.
      seed: of the run.
      network: cut at its layers.
      variables: trained parameters and model state.
      task: its training and evaluation data.
      adjust_logits: adjusts logits in evaluation, or None.
    """

    method: str
    seed: int
    network: Network
    variables: Mapping[str, Any]
    task: ImageTask
    adjust_logits: Callable[[Array], Array] | None


@dataclasses.dataclass(frozen=True)
class Models:
    """The models of methods and seeds in a working folder.

    Attributes:
      settings: of their runs.
      options: of every method.
      tasks: by seed.
      workdir: folder of the runs.
      results: of the runs, by method, one per seed.
    """

    settings: Settings
    options: Mapping[str, Mapping[str, Any]]
    tasks: Mapping[int, ImageTask]
    workdir: pathlib.Path
    results: Mapping[str, list[dict[str, Any]]]

    def folder(self, method: str, seed: int) -> pathlib.Path:
        """The folder of a run."""
        return compare.folder_of(self.workdir, method, seed)

    def load(self, method: str, seed: int) -> Model:
        """Loads a model from its last checkpoint.

        Raises:
          ValueError: the folder holds no weights.
          CheckpointError: its checkpoints are damaged.
        """
        task, options = self.tasks[seed], self.options[method]
        program = Program(method, options, self.settings, task, FLAGS.layer)
        folder = self.folder(method, seed)
        config = run_folder.as_recorded(folder, ImageJob(program, task, seed).configuration())
        checkpoints = Checkpoints(folder / run_folder.CHECKPOINTS, config=config)
        restored = checkpoints.restore(program.init(seed))
        if restored is None:
            raise ValueError(_without_weights(folder))
        parts = assemble(
            method,
            options,
            layers=restored.state.network.layers,
            layer=FLAGS.layer,
            counts=task.counts,
            epochs=self.settings.epochs,
        )
        state = restored.state
        return Model(method, seed, state.network, state.variables, task, parts.adjust_logits)

    def measured(
        self, method: str, seed: int, name: str, settings: Mapping[str, Any], measure: Callable
    ) -> dict[str, Any]:
        """The plain values that `measure()` returns, or that it returned earlier.

        Args:
          method: of the model.
          seed: of the model.
          name: of the measurement.
          settings: of the measurement; it is repeated if they differ from the earlier ones.
          measure: takes no arguments.

        Raises:
          ValueError: a symbolic link leads out of the working folder.
        """
        path = self.folder(method, seed) / run_folder.MEASURED / f"{name}.json"
        run_folder.check_inside(self.workdir, path)
        settings = files.plain(settings)
        try:
            earlier = run_folder.read_measured(path)
        except ValueError as error:
            run_flags.say(f"{error}: it will be measured again")
            earlier = None
        if earlier is None or earlier["settings"] != settings:
            earlier = {"settings": settings, "measured": files.plain(measure())}
            run_folder.write_measured(path, **earlier)
        return earlier["measured"]


def define_flags(experiment: str) -> None:
    """Defines the flags of a comparison that keeps its models."""
    compare.define_flags(experiment, profile="exponential")
    FLAGS.set_default("keep_finished_checkpoints", True)


def tuned_hparams(settings: Settings) -> dict[str, dict[str, Any]]:
    """Hyperparameters by method, as the comparison on the same data takes them."""
    experiment = "balanced" if settings.profile == "none" else "long_tail"
    return tuned.find(FLAGS.hparams, experiment, settings).pooled


def train_or_load(
    settings: Settings,
    options: Mapping[str, Mapping[str, Any]],
    workdir: pathlib.Path,
    interrupts: Interrupts,
) -> Models:
    """Trains the missing models; all can then be loaded.

    Raises:
      ValueError: there are several processes, a flag does not fit, or a finished run has no
        weights.
      NonFiniteLossError: runs diverged.
      InterruptedRunError: a signal came; the same call resumes.
    """
    if jax.process_count() > 1:
        # Each would lock the folder and measure the part of the models that it holds.
        raise ValueError(
            f"models are measured by one process, not {jax.process_count()}; it takes from "
            "--workdir what several have trained with --keep_finished_checkpoints"
        )
    if not FLAGS.keep_finished_checkpoints:
        raise ValueError("--keep_finished_checkpoints must be true: weights are what is measured")
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax logs every checkpoint that it reads
    seeds = run_flags.seeds()
    for method in options:
        for seed in seeds:
            folder = compare.folder_of(workdir, method, seed)
            result = files.read_json(folder / run_folder.RESULT)
            if isinstance(result, dict) and not result.get("checkpoints_kept", True):
                raise ValueError(_without_weights(folder))
    results, failed = compare.train_all(settings, options, workdir, interrupts)
    if failed:
        raise run_folder.failures_error(failed, len(options) * len(seeds))
    source = TaskSource(settings)
    return Models(settings, options, {seed: source.task(seed) for seed in seeds}, workdir, results)


def stop_if_asked(interrupts: Interrupts) -> None:
    """Raises InterruptedRunError if a signal came; called between measurements."""
    if interrupts():
        raise InterruptedRunError("stopped, and what was measured is kept")


def batches(
    task: ImageTask, dataset: Images, size: int, count: int | None = None
) -> list[dict[str, Array]]:
    """Normalised batches of images; the last one is padded and masked.

    Args:
      task: gives the normalisation.
      dataset: the images.
      size: images in a batch; a smaller data set makes one smaller batch.
      count: number of batches of random images, the same in every call; None takes all images in
        their order.
    """
    if count is not None:
        shuffled = np.random.default_rng(0).permutation(len(dataset))
        dataset = dataset.subset(shuffled[: count * size])
    found = evaluation_batches(dataset, min(size, len(dataset)))
    normalize = task.normalization.apply
    return [{**batch, "image": jax.device_put(normalize(batch["image"]))} for batch in found]


class Outputs(NamedTuple):
    """Outputs of a model for n images.

    Attributes:
      logits: [n, C], adjusted by the method.
      features: activations of the last hidden layer, [n, ...].
      labels: [n].
    """

    logits: np.ndarray
    features: np.ndarray
    labels: np.ndarray


def outputs(model: Model, found: Iterable[Mapping[str, Array]] | None = None) -> Outputs:
    """Outputs for batches of `batches`, without padding; None takes all evaluation images."""
    if found is None:
        found = batches(model.task, model.task.evaluation, LARGEST_EVALUATION_BATCH)
    parts = []
    for batch in found:
        logits, features = _forward(model.network, model.variables, batch["image"])
        if model.adjust_logits is not None:
            logits = model.adjust_logits(logits)
        real = np.asarray(batch["mask"]) != 0
        parts.append([np.asarray(part)[real] for part in (logits, features, batch["label"])])
    return Outputs(*map(np.concatenate, zip(*parts, strict=True)))


@partial(jax.jit, static_argnums=0)
def _forward(network, variables, images):
    last = network.layers[-2]
    features, _ = network.run(Pass(variables, images), {}, last)
    logits, _ = network.run(Pass(variables, images), {last: features}, LOGITS)
    return logits, features


def _without_weights(folder: pathlib.Path) -> str:
    return (
        f"--workdir: {folder} holds a finished run without its weights; choose another --workdir, "
        "or train with --keep_finished_checkpoints"
    )
