"""Bad values for every flag of an experiment, tried in one process up to where training begins.

    python -m tests.helpers.flag_fuzz long_tail FOLDER 0 some

tries cases from case 0 on, and prints a JSON line for each: its flag, its end and what it wrote.
`every` in place of `some` tries every value on every flag. A signal of `HUNG` ends the process at a
case that takes more than `PATIENCE` seconds of CPU time, or that waits for long.
"""

import contextlib
import importlib
import io
import json
import os
import pathlib
import random
import signal
import sys
import traceback

import jax
from absl import app, flags

from experiments.compiled import step_cost
from experiments.jobs import jobs, run_job, slurm
from experiments.reporting import sections
from experiments.runtime import console
from experiments.runtime import main as entry_point
from experiments.training import run, suggested_radii
from lpa_jax import data
from tests.helpers.paths import ROOT

FLAGS = flags.FLAGS
# CPU time, which other processes do not change, and seconds.
PATIENCE, LONGEST = 20, 300
HUNG = (signal.SIGPROF, signal.SIGALRM)
HUGE = str(10**25)
NUMBERS = ("0", "-1", "1", "0.5", "nan", "inf", "-inf", "1e308", "1e-320", HUGE, f"-{HUGE}")
WORDS = ("", " ", "x", "erm", "=", ",", "a=b", "a.b=c", "\n", "é", "../..", "/", "x" * 5000,
         "9" * 5000)  # fmt: skip
LISTS = ("0,0", "1,2,3,4,5", "nan,nan,nan,nan", "inf,inf", "1e308,1e308", f"{HUGE},{HUGE}", "a,,b")
OPTIONS = ("lpa.radius=nan", f"lpa.steps={HUGE}", "lpa.layer=3", "lpa.mode=x", "lpa.radius=1e999",
           "lpl.steps=-1", "lpa.radius=[1]", "lpa.radius={}", "lpa.assignment=x", "lpa.ema=-1",
           "lpa.radius=1:inf", "lpa.steps=1|x", f"learning_rate=1:{HUGE}")  # fmt: skip
# Small, so that a case takes as short as it can.
BASE = {
    "long_tail": ["--dataset=digits", "--methods=erm,lpa,lpl", "--hparams=none"],
    "domain_generalization": ["--images_per_domain=50", "--methods=erm,lpa,lpl", "--hparams=none",
                              "--test_domains=15"],
    "report": [str(ROOT / "results/long_tail/mlp")],
    "sweep": ["--methods=erm"],
}  # fmt: skip
SAME_AS = {"balanced": "long_tail", "landscape": "long_tail", "layer_sweep": "long_tail",
           "tune": "long_tail", "domain_tune": "domain_generalization"}  # fmt: skip
EXPERIMENTS = (*BASE, *SAME_AS, "benchmark", "many_classes", "prefetch_benchmark", "compile_check")
# So many are tried of the values that a parser refuses for all flags of a kind, and of all values
# where an experiment shares a flag with another one.
SAMPLE = 4


class Started(BaseException):
    """The work would begin here: the flags were accepted."""


def begin(*_, **__):
    """Stands in for the work."""
    raise Started


def cases(experiment, every=False):
    """(flag, command line) of the cases, `every` or those that differ in kind."""
    chosen = random.Random(experiment)
    shared = set(_kinds_of(SAME_AS[experiment])) if experiment in SAME_AS else set()
    base = [*BASE.get(SAME_AS.get(experiment, experiment), ())]
    if experiment == "layer_sweep":
        base.remove("--methods=erm,lpa,lpl")
    if experiment in ("tune", "domain_tune"):
        base[base.index("--hparams=none")] = "--trials=2"
    found = []
    for name, own in _kinds_of(experiment).items():
        values = (*NUMBERS, *WORDS, *LISTS, *OPTIONS)
        if name in shared or experiment in ("sweep", "layer_sweep"):
            values = chosen.sample(values, SAMPLE)
        elif not every:
            others = [value for value in values if value not in own]
            values = (*own, *chosen.sample(others, min(SAMPLE, len(others))))
        found += [(name, [*base, f"--{name}={value}"]) for value in values]
    return found


def _kinds_of(experiment):
    """Values that are tried of a flag whatever the sample is: those that its own code decides."""
    importlib.import_module(f"experiments.{experiment}").define_flags()
    kinds = {}
    for flag in entry_point.own_flags():
        if isinstance(flag.parser, flags.EnumParser | flags.BooleanParser):
            kinds[flag.name] = ()
        elif isinstance(flag.parser, flags.IntegerParser | flags.FloatParser):
            kinds[flag.name] = NUMBERS
        else:
            kinds[flag.name] = (*NUMBERS, *WORDS, *LISTS, *OPTIONS)
    _forget()
    return kinds


def _forget():
    for flag in entry_point.own_flags():
        delattr(FLAGS, flag.name)
    FLAGS.unparse_flags()


def end_of(module, arguments):
    """How a command ends: ("refused" | "accepted" | "broken", the last that it says)."""
    sys.argv = [module.__name__, *arguments]
    screen = io.StringIO()
    try:
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
            entry_point.start(module.define_flags, module.main)
    except Started:
        return "accepted", ""
    except SystemExit as stop:
        text = stop.code if isinstance(stop.code, str) else screen.getvalue()
        one_line = isinstance(stop.code, str) and text.startswith("error: ") and "\n" not in text
        return ("refused" if one_line else "broken"), f"{stop.code}: {text[-300:]}"
    except BaseException:
        return "broken", traceback.format_exc()[-1500:]
    finally:
        _forget()
    return "broken", "ended without work"


def stub():
    """Puts `begin` where the work of each experiment begins; data are read once."""
    console.install = lambda: None
    app.run = lambda main, flags_parser: main(flags_parser(sys.argv))
    loaded = {}

    def once(real, key, data_dir):
        if data_dir is not None and not os.path.exists(data_dir):
            begin()  # an embedded set would be prepared there
        if key not in loaded:
            loaded[key] = real()
        return loaded[key]

    def load(name, split, data_dir=None, size=None, real=data.load):
        key = (name, split, data_dir, size)
        return once(lambda: real(*key), key, data_dir)

    def load_domains(name, data_dir=None, real=data.load_domains, **settings):
        key = (name, data_dir, *settings.values())
        return once(lambda: real(name, data_dir, **settings), key, data_dir)

    data.load, data.load_domains = load, load_domains
    run.run = sections.sections = step_cost.make_state = jobs.prepare = slurm.executor = begin
    suggested_radii.suggest_radius = jax.distributed.initialize = begin
    for name, start in (("prefetch_benchmark", "sources"), ("compile_check", "compile_case")):
        setattr(importlib.import_module(f"experiments.{name}"), start, begin)
    # Each would take a second, and sweeps of the first experiment are checked by its own cases.
    run_job.check_in_new_process = lambda *_: None


def main(experiment, folder, first, every):
    """Tries the cases of an experiment and prints how each ends."""
    stub()
    module = importlib.import_module(f"experiments.{experiment}")
    for number, (flag, arguments) in enumerate(cases(experiment, every)[first:], first):
        place = pathlib.Path(folder, experiment, str(number))
        place.mkdir(parents=True)
        os.chdir(place)
        case = {"case": number, "flag": flag, "arguments": arguments[-1][:80]}
        print(json.dumps(case), flush=True)
        signal.setitimer(signal.ITIMER_PROF, PATIENCE)
        signal.alarm(LONGEST)
        end, said = end_of(module, arguments)
        wrote = [str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()]
        print(json.dumps({"end": end, "said": said, "wrote": wrote[:5]}), flush=True)
        jax.clear_caches() if number % 100 == 0 else None


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "every")
