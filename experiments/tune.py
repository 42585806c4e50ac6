r"""Tunes hyperparameters on validation images, with the same number of trials for every method.

    python -m experiments.tune --output=experiments/methods/hparams/long_tail_mnist5k_mlp.json

Random search (ranges: `experiments.search`): in each trial a method draws its options and trains on
`--seeds` long-tailed subsets; the trial with the highest mean validation accuracy is chosen. The
validation images are carved from the training split; test images are never opened. Finished trials
are kept in `--workdir` and skipped when the command is given again; several workers share the work
with --worker=0..n-1 --num_workers=n. With --finalists only the best trials of the first seed train
on the others. Four methods, 40 trials of 3 seeds: about 20 minutes on 2 CPU cores.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import flags

from experiments.images import flags as image_flags
from experiments.images.data import ImageTask, TaskSource
from experiments.images.job import ImageJob
from experiments.images.settings import Settings
from experiments.methods import flags as method_flags
from experiments.methods import names as methods
from experiments.methods import search
from experiments.runtime import fields, files, schema
from experiments.runtime import main as entry_point
from experiments.runtime.progress import RunProgress
from experiments.training import flags as run_flags
from experiments.training import run, search_loop, suggested_radii
from experiments.training.folder import DATA
from experiments.training.program import Programs
from experiments.training.search_loop import Trial
from experiments.training.suggested_radii import Suggestions
from lpa_jax.training.interrupts import InterruptedRunError, Interrupts
from lpa_jax.training.loop import NonFiniteLossError

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_list("methods", ["erm", "lpl", "lpa", "lpa+lpl"], "Methods to tune.")
    search_loop.define_flags(trials=40, seeds="100-102")
    flags.DEFINE_enum(
        "radius_center",
        "range",
        list(suggested_radii.CENTERS),
        "Where the radii of LPA and LPL are drawn: in the fixed range of experiments.search, or "
        "within a factor of 10 around the one that lpa_jax.suggest_radius finds after a short ERM "
        "warm-up on the first seed.",
    )
    flags.DEFINE_integer(
        "finalists",
        None,
        "Trials of every method, the best of the first seed, that train on the other seeds as well "
        "and of which one is chosen; unset: all.",
        lower_bound=1,
    )
    files.define_path("workdir", "runs/tune", "Folder of the trials.", folder=True)
    image_flags.define()
    fields.define(method_flags.Searching)
    fields.define(method_flags.Perturbing)
    run_flags.define_console_flags()
    FLAGS.set_default("evaluate_on", "validation")


OUTCOME = {
    "method": schema.TEXT,
    "trial": schema.WHOLE,
    "options": schema.OBJECT,
    "score": (schema.SHARE, None),
    "accuracies": [(schema.SHARE, None)],
}


@dataclasses.dataclass(frozen=True)
class Search:
    """Trains draws of options.

    Attributes:
      settings: settings of all runs.
      tasks: by seed.
      programs: what is compiled; draws that differ in numbers alone share it.
      interrupts: says whether to stop.
      suggestions: suggested radii to draw around, or None.
      workdir: folder of the trials.
    """

    settings: Settings
    tasks: Mapping[int, ImageTask]
    programs: Programs
    interrupts: Interrupts
    suggestions: Suggestions | None
    workdir: pathlib.Path

    def trial(self, method: str, number: int, seeds: int) -> Trial:
        """A draw that trains with the first seeds."""
        place = (method, number, seeds)
        find, train = (functools.partial(do, *place) for do in (self.find, self.train))
        lock = self.workdir / "locks" / method / f"{number:04d}"
        return Trial(method, number, None, lock, find, train)

    def options(self, method: str, number: int) -> dict[str, Any]:
        """The options of a draw; flags replace what is drawn."""
        drawn = self._drawn(method, number)
        if self.suggestions is not None:
            drawn = self.suggestions.recentred(method, drawn)
        return method_flags.options_for(method, drawn)

    def check(self, method: str, number: int) -> None:
        """Refuses a draw that cannot be trained; suggested radii are not looked at.

        Raises:
          ValueError: naming what does not fit.
        """
        options = method_flags.options_for(method, self._drawn(method, number))
        self.programs.program(method, options, next(iter(self.tasks.values())))

    def _drawn(self, method: str, number: int) -> dict[str, Any]:
        layers = method_flags.searched_layers(self.settings.model)
        ranges = method_flags.searched_space()
        return search.draw(method, number, layers, FLAGS.search_seed, ranges)

    def train(self, method: str, number: int, seeds: int, progress: RunProgress) -> None:
        """Trains a draw with the first seeds and writes the outcome; a diverged draw scores null.

        Seeds that it has trained with before are not repeated, nor is a draw that a worker with
        another --num_workers has finished meanwhile.

        Raises:
          InterruptedRunError: a signal came; nothing is kept of the draw.
        """
        kept = self._kept(method, number)
        if _prefix(kept, seeds) is not None:
            return
        options = self.options(method, number)
        accuracies = [] if kept is None else list(kept["accuracies"])
        try:
            for seed, task in list(self.tasks.items())[len(accuracies) : seeds]:
                progress.start(f"{method} trial {number} seed {seed}")
                program = self.programs.program(method, options, task)
                result = run.run(
                    # The score does not need the effects, which would have to be compiled.
                    ImageJob(program, task, seed, measure_effects=False),
                    None,
                    on_epoch=progress.epoch,
                    on_step=progress.step,
                    should_stop=self.interrupts,
                )
                accuracies.append(result["accuracy"])
                progress.finish(f"validation accuracy {100 * accuracies[-1]:.2f} %")
        except NonFiniteLossError as error:
            progress.finish(str(error))
            accuracies.append(None)
        except InterruptedRunError:
            raise InterruptedRunError("stopped, and finished trials are kept") from None
        path = self._path(method, number)
        files.write_json(path, _outcome(method, number, options, accuracies))

    def find(self, method: str, number: int, seeds: int) -> dict[str, Any] | None:
        """The outcome of a draw with the first seeds; None if there is none of so many."""
        return _prefix(self._kept(method, number), seeds)

    def _path(self, method: str, number: int) -> pathlib.Path:
        return self.workdir / "trials" / method / f"{number:04d}.json"

    def _kept(self, method: str, number: int) -> dict[str, Any] | None:
        """What the file of a draw holds; None if it is missing, damaged or of another draw."""
        path = self._path(method, number)
        found = schema.read_or_say(path, OUTCOME, run_flags.say)
        if found is None:
            return None
        # Suggested radii would have to be measured again.
        options = self.options(method, number) if self.suggestions is None else found["options"]
        expected = files.plain(_outcome(method, number, options, found["accuracies"]))
        if len(found["accuracies"]) > len(self.tasks) or found != expected:
            run_flags.say(f"{path} is of another trial: it will be written again")
            return None
        return found


def _prefix(kept: Mapping[str, Any] | None, seeds: int) -> dict[str, Any] | None:
    """The part of an outcome that the first seeds make; None if it has not trained with them."""
    if kept is None or (len(kept["accuracies"]) < seeds and kept["score"] is not None):
        return None
    return _outcome(kept["method"], kept["trial"], kept["options"], kept["accuracies"][:seeds])


def _outcome(
    method: str, number: int, options: Mapping[str, Any], accuracies: list[float | None]
) -> dict[str, Any]:
    """What the file of a draw holds; the last accuracy of a draw that diverged is None."""
    score = float(np.mean(accuracies)) if accuracies and None not in accuracies else None
    return {"method": method, "trial": number, "options": options, "score": score,
            "accuracies": accuracies}  # fmt: skip


def describe(settings: Settings, seeds: list[int], digests: Mapping[str, str]) -> dict[str, Any]:
    """What all trials of a workdir have in common, as plain values.

    Raises:
      ValueError: a layer or a range that this search cannot draw.
    """
    # Refuse bad names and ranges before anything is written.
    methods.check_different(FLAGS.methods)
    method_flags.check_reach(FLAGS.methods)
    method_flags.searched_layers(settings.model)
    ranges = method_flags.searched_space()
    for name in {*methods.COMPILED_RUN_OPTIONS} & {*ranges}:
        raise ValueError(f"--space: {name} is drawn in domain generalization alone")
    setting = {
        "settings": settings.as_dict() | {"data_dir": None, "image_root": None},
        "seeds": seeds,
        DATA: digests,
        "search_seed": FLAGS.search_seed,
        "fixed_options": method_flags.explicit_options() | method_flags.explicit_run_options(),
    }
    given = {
        "finalists": FLAGS.finalists,
        "search_layers": FLAGS.search_layers,
        "space": sorted(FLAGS.space),
    }
    setting |= {name: value for name, value in given.items() if value}
    if FLAGS.radius_center == "suggest":
        suggested_radii.check_ranges(ranges)
        setting["radius_center"] = FLAGS.radius_center
    return files.plain(setting)


def tune(interrupts: Interrupts) -> None:
    """Trains this worker's missing trials; writes the choice if no trial is missing."""
    settings = image_flags.settings()
    if settings.evaluate_on != "validation":
        raise ValueError("--evaluate_on must be validation: test images choose nothing")
    search_loop.check_flags()
    if FLAGS.finalists is not None and len(run_flags.seeds()) < 2:
        raise ValueError("--finalists needs at least two seeds in --seeds, got one")
    image_flags.prepare_data()
    workdir = pathlib.Path(FLAGS.workdir)
    source = TaskSource(settings)
    tasks = {seed: source.task(seed) for seed in run_flags.seeds()}
    setting = describe(settings, list(tasks), source.digests)
    setting = search_loop.check_setting(workdir, setting)
    suggestions = None
    if FLAGS.radius_center == "suggest":
        first = min(tasks)
        suggestions = Suggestions(settings, tasks[first], first, setting["fixed_options"])
    shared = Search(settings, tasks, Programs(settings), interrupts, suggestions, workdir)

    def train(trials: list[Trial], runs: int) -> None:
        todo = search_loop.missing(trials)
        for trial in todo:  # before anything is written
            shared.check(trial.method, trial.number)
        progress = RunProgress(len(todo) * runs, settings.epochs, FLAGS.quiet)
        search_loop.run(workdir, todo, progress, interrupts, setting)

    seeds = 1 if FLAGS.finalists else len(tasks)
    trials = [shared.trial(m, n, seeds) for n in range(FLAGS.trials) for m in FLAGS.methods]
    train(trials, seeds)
    finals = []
    if FLAGS.finalists:
        best = search_loop.finalists(trials, FLAGS.finalists)
        if best is None:
            return
        finals = [shared.trial(one.method, one.number, len(tasks)) for one in best]
        train(finals, len(tasks) - 1)
    search_loop.finish(trials, setting, finals)


def main(argv: list[str]) -> None:
    entry_point.run(argv, tune)


if __name__ == "__main__":
    entry_point.start(define_flags, main)
