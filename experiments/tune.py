r"""Tunes hyperparameters on validation images, with the same number of trials for every method.

    python -m experiments.tune --output=experiments/methods/hparams/long_tail_mnist5k_mlp.json

Random search (ranges: `experiments.search`): in each trial a method draws its options and trains on
`--seeds` long-tailed subsets; the trial with the highest mean validation accuracy is chosen. The
validation images are carved from the training split; test images are never opened. Finished trials
are kept in `--workdir` and skipped when the command is given again; several workers share the work
with --worker=0..n-1 --num_workers=n. Four methods, 40 trials of 3 seeds: about 20 minutes on 2 CPU
cores.
"""

import pathlib
from typing import Any

import numpy as np
from absl import flags

from experiments.images import flags as image_flags
from experiments.images.settings import Settings, TaskSource
from experiments.methods import flags as method_flags
from experiments.methods import names as methods
from experiments.methods import search
from experiments.runtime import fields, files
from experiments.runtime import main as entry_point
from experiments.runtime.progress import RunProgress
from experiments.training import (
    flags as run_flags,
)
from experiments.training import (
    run as runner,
)
from experiments.training import (
    search_loop,
)
from experiments.training import (
    suggested_radii as radius_center,
)
from experiments.training.program import Program, make_program, structure
from lpa_jax.interrupts import InterruptedRunError, Interrupts
from lpa_jax.training import loop as trainer

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Flags of this module."""
    flags.DEFINE_list("methods", ["erm", "lpl", "lpa", "lpa+lpl"], "Methods to tune.")
    search_loop.define_flags(trials=40, seeds="100-102")
    flags.DEFINE_enum(
        "radius_center",
        "range",
        list(radius_center.CENTERS),
        "Where the radii of LPA and LPL are drawn: in the fixed range of experiments.search, or "
        "within a factor of 10 around the one that lpa_jax.suggest_radius finds after a short ERM "
        "warm-up on the first seed.",
    )
    flags.DEFINE_string("workdir", "runs/tune", "Folder of the trials.")
    image_flags.define()
    fields.define(method_flags.Searching)
    fields.define(method_flags.Perturbing)
    run_flags.define_console_flags()
    FLAGS.set_default("evaluate_on", "validation")


def run_trial(
    method: str,
    trial: int,
    settings: Settings,
    tasks: dict[int, Any],
    progress: RunProgress,
    programs: dict[Any, Program],
    interrupts: Interrupts,
    suggestions: radius_center.Suggestions | None = None,
) -> dict[str, Any]:
    """Trains one draw of options with every seed; a diverged trial scores null.

    `programs` keeps what is compiled: trials that differ in numbers alone share it.

    Raises:
      InterruptedRunError: a signal came; nothing is kept of the trial.
    """
    drawn = search.draw(
        method,
        trial,
        method_flags.searched_layers(settings.model),
        FLAGS.search_seed,
        method_flags.searched_space(),
    )
    if suggestions is not None:
        drawn = suggestions.recentred(method, drawn)
    options = methods.options_for(method, drawn, method_flags.explicit_options())
    options |= method_flags.explicit_run_options()
    accuracies = []
    try:
        for seed, task in tasks.items():
            progress.start(f"{method} trial {trial} seed {seed}")
            key = method, structure(method, options), task.counts
            if key not in programs:
                programs[key] = make_program(method, options, settings, task)
            program = _scoring(programs[key].with_options(options))
            result = runner.run(
                program,
                task,
                seed,
                None,
                progress.epoch,
                on_step=progress.step,
                should_stop=interrupts,
            )
            accuracies.append(result["accuracy"])
            progress.finish(f"validation accuracy {100 * accuracies[-1]:.2f} %")
    except trainer.NonFiniteLossError as error:
        progress.finish(str(error))
        accuracies = []
    except InterruptedRunError:
        raise InterruptedRunError("stopped, and finished trials are kept") from None
    score = float(np.mean(accuracies)) if accuracies else None
    return {"method": method, "trial": trial, "options": options, "score": score,
            "accuracies": accuracies}  # fmt: skip


def _scoring(program: Program) -> Program:
    """The program without what a score does not need, which would have to be compiled, too."""
    return program._replace(effect=None)


def trial_path(workdir: pathlib.Path, method: str, trial: int) -> pathlib.Path:
    """Where a trial's outcome stands."""
    return workdir / "trials" / method / f"{trial:04d}.json"


def choose(workdir: pathlib.Path, names: list[str], trials: int) -> dict[str, Any] | None:
    """The best trial of every method, or None while a trial is missing."""
    chosen = {}
    for method in names:
        outcomes = [files.read_json(trial_path(workdir, method, t)) for t in range(trials)]
        if any(outcome is None for outcome in outcomes):
            return None
        chosen[method] = search_loop.choice(
            {outcome["trial"]: outcome["score"] for outcome in outcomes},
            {outcome["trial"]: outcome["options"] for outcome in outcomes},
        )
        if chosen[method] is None:
            raise ValueError(f"--methods: every trial of {method} diverged")
    return chosen


def describe(settings: Settings, seeds: list[int]) -> dict[str, Any]:
    """What all trials of a workdir have in common, as plain values.

    Raises:
      ValueError: a layer or a range that this search cannot draw.
    """
    # Refuse bad names and ranges before anything is written.
    method_flags.searched_layers(settings.model)
    ranges = method_flags.searched_space()
    for name in {*methods.COMPILED_RUN_OPTIONS} & {*ranges}:
        raise ValueError(f"--space: {name} is drawn in domain generalization alone")
    setting = {
        "settings": settings.as_dict() | {"data_dir": None, "image_root": None},
        "seeds": seeds,
        "search_seed": FLAGS.search_seed,
        "fixed_options": method_flags.explicit_options() | method_flags.explicit_run_options(),
    }
    if FLAGS.search_layers:
        setting["search_layers"] = FLAGS.search_layers
    if FLAGS.space:
        setting["space"] = sorted(FLAGS.space)
    if FLAGS.radius_center == "suggest":
        radius_center.check_ranges(ranges)
        setting["radius_center"] = FLAGS.radius_center
    return files.plain(setting)


def run_missing(
    settings: Settings, tasks: dict[int, Any], workdir: pathlib.Path, interrupts: Interrupts
) -> None:
    """Runs this worker's missing trials.

    Raises:
      InterruptedRunError: a signal came.
      lpa_jax.files.LockedError: another process runs this share, or a trial of it.
    """
    suggestions = None
    if FLAGS.radius_center == "suggest":
        first = min(tasks)
        explicit = method_flags.explicit_options() | method_flags.explicit_run_options()
        suggestions = radius_center.Suggestions(settings, tasks[first], first, explicit)
    todo = [
        (method, trial)
        for trial in range(FLAGS.trials)
        for method in FLAGS.methods
        if search_loop.is_mine(trial)
        and files.read_or_say(trial_path(workdir, method, trial), run_flags.say) is None
    ]
    programs: dict[Any, Program] = {}
    progress = RunProgress(len(todo) * len(tasks), settings.epochs, FLAGS.quiet)
    with interrupts, progress:
        for method, trial in todo:
            path = trial_path(workdir, method, trial)
            with search_loop.held(workdir, workdir / "locks" / method / path.stem):
                # A worker that was told another --num_workers may have run it meanwhile.
                if files.read_json(path) is None:
                    outcome = run_trial(
                        method, trial, settings, tasks, progress, programs, interrupts, suggestions
                    )
                    files.write_json(path, outcome)


def tune(interrupts: Interrupts) -> None:
    """Runs this worker's missing trials; writes the choice when no trial is missing."""
    settings = image_flags.settings()
    run_flags.apply_runtime_flags()
    if settings.evaluate_on != "validation":
        raise ValueError("--evaluate_on must be validation: test images choose nothing")
    search_loop.check_flags()
    image_flags.prepare_data()
    workdir = pathlib.Path(FLAGS.workdir)
    source = TaskSource(settings)
    tasks = {seed: source.task(seed) for seed in run_flags.seeds(FLAGS.seeds)}
    setting = describe(settings, list(tasks))
    earlier = files.read_or_say(workdir / "setting.json", run_flags.say)
    if earlier not in (None, setting):
        raise ValueError(f"--workdir: {workdir} holds trials with other settings; choose another")
    with search_loop.held(workdir, search_loop.share(workdir)):
        files.write_json(workdir / "setting.json", setting)
        run_missing(settings, tasks, workdir, interrupts)
    chosen = choose(workdir, FLAGS.methods, FLAGS.trials)
    if chosen is None:
        search_loop.say_incomplete()
        return
    for method, entry in chosen.items():
        search_loop.say_choice(method, entry)
    search_loop.write(setting, chosen)


def main(argv: list[str]) -> None:
    """Entry point."""
    entry_point.run(argv, tune)


if __name__ == "__main__":
    entry_point.start(define_flags, main)
