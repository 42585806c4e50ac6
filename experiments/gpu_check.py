r"""Everything to measure on a GPU that is lent for a few minutes, by one command.

    python -m experiments.gpu_check --data_dir=~/tensorflow_datasets

runs, one after another, each with a time limit and 8 minutes in all:

- correctness: tests of PGD, of LPA against a slow NumPy loop, of steps on several devices (forced
  CPU ones, the GPU) and of bfloat16, with float32 products in full precision;
- `experiments.benchmark` in float32 and bfloat16: time of a step over that of ERM, beside the floor
  of the arithmetic;
- `experiments.prefetch_benchmark`;
- CIFAR-10-LT 100:1 with ResNet-32, by the published recipe (`methods/recipes/`) but for --epochs:
  ERM, logit adjustment, LPL, and LPA at two layers with its default options, in five processes.
  CIFAR-10 must be prepared in --data_dir.

WORKDIR/gpu_check.md gets each part's outcome and the end of its output as soon as the part ends. A
part at its limit is interrupted, and the others follow; the same command resumes training.
It was not run on a GPU yet. `--small` runs tiny versions of all parts, on any device.
"""

import os
import pathlib
import shlex
import subprocess  # of this project's own modules
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
from absl import flags

from experiments.compiled import timing
from experiments.jobs import jobs
from experiments.runtime import files
from experiments.runtime import main as entry_point

FLAGS = flags.FLAGS
ROOT, REPORT = pathlib.Path(__file__).parents[1], "gpu_check.md"
LAST_LINES = 60
TESTS = tuple(
    f"tests/lpa_jax/{name}.py"
    for name in ("test_pgd", "test_parallel", "perturbations/test_lpa", "training/test_step")
)
RECIPE = (
    "--model=resnet32 --batch_size=128 --learning_rate=0.1 --weight_decay=2e-4 --clip_norm=0 "
    "--decay_biases_and_norms --warmup_epochs=5 --schedule=step --milestones=0.8,0.9 "
    "--decay_factor=0.01 --augmentation=crop+flip --crop_padding=4 --hparams=none --split=0.4 "
    "--option=lpl.steps=10 --option=lpl.step_size=1 --lpl_radius=0.015 --option=lpl.kappa=99 "
    "--option=lpl.negative_scale=0.6"
)


class Part(NamedTuple):
    """One command.

    Attributes:
      name: in the report.
      seconds: at most.
      command: what follows `python -m`.
      small: flags that make it tiny; of two equal flags the last counts.
      environment: variables that are set for it.
    """

    name: str
    seconds: int
    command: str
    small: str = ""
    environment: tuple[tuple[str, str], ...] = ()


def parts(platform: str) -> tuple[Part, ...]:
    """The parts in their order; tests need the CPU beside the platform."""
    benchmark = "experiments.benchmark --layers=stage2 --methods=erm,lpa,lpa:carry,lpa:free"
    tiny = "--model=mlp --layers=hidden2 --image_size=4 --batch_size=8 --rounds=1 --steps=1"
    methods = (
        "erm,lpl,lpa@hidden2" if FLAGS.small else "erm,logit_adjusted,lpl,lpa@stage2,lpa@stage3"
    )
    of_tests = {"JAX_PLATFORMS": f"{platform},cpu", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    runs, data = (
        shlex.quote(os.path.abspath(path))
        for path in (f"{FLAGS.workdir}/cifar10_lt", FLAGS.data_dir)
    )
    return (
        Part(
            "correctness", 110, f"pytest -n 4 {' '.join(TESTS)}",
            "-n 0 -k by_hand", tuple(of_tests.items()),
        ),
        Part("float32", 60, f"{benchmark} --model=resnet32 --steps=1,3", tiny),
        Part(
            "bfloat16", 60,
            f"{benchmark} --model=resnet32 --steps=3 --dtype=bfloat16 --batch_size=1024",
            tiny,
        ),
        Part(
            "prefetching", 40, "experiments.prefetch_benchmark",
            "--model=mlp --image_size=4 --file_size=8 --images=8 --batch_size=4 --rounds=1",
        ),
        Part(
            "cifar10_lt", 150,
            f"experiments.sweep --workdir={runs} --num_seeds=1 --num_workers=5 "
            f"--methods={methods} -- --dataset=cifar10 "
            f"--imbalance=100 --epochs={FLAGS.epochs} --data_dir={data} {RECIPE}",
            "--dataset=mnist5k --prepare --model=mlp --epochs=1 --per_class=5 "
            "--imbalance=2 --warmup_epochs=0",
        ),
        Part("table", 40, f"experiments.report {runs} --output={runs}/table"),
    )  # fmt: skip


def define_flags() -> None:
    files.define_path("workdir", "runs/gpu_check", "Folder of the report and runs.", folder=True)
    files.define_path("data_dir", "~/tensorflow_datasets", "Where CIFAR-10 is prepared.")
    flags.DEFINE_integer(
        "epochs", 50, "Epochs; the publication has 200.", lower_bound=1, upper_bound=1000
    )
    flags.DEFINE_bool("small", False, "Tiny versions of all parts, to try the command.")


def run(part: Part, words: Sequence[str]) -> tuple[str, str]:
    """Runs `python -m WORDS` for at most the seconds of the part; outcome and output."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(  # noqa: S603  the words are this file's
            [sys.executable, "-m", *words],
            env={**os.environ, **dict(part.environment)},
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )
        try:
            status = process.wait(part.seconds)
            outcome = "ok" if status == 0 else f"exit status {status}"
        except subprocess.TimeoutExpired:
            jobs.stop([process])
            outcome = "interrupted"
        output.seek(0)
        return f"{outcome}, {time.monotonic() - start:.0f} s", output.read()


def main(argv: list[str]) -> None:
    """Runs all parts; exits with 1 if one did not end well."""
    entry_point.refuse_arguments(argv)
    # Several processes share the GPU's memory.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    entry_point.check_devices()
    devices = f"{timing.devices()}, jax {jax.__version__}"
    bad = []
    report = pathlib.Path(FLAGS.workdir, REPORT)
    try:
        files.write_text(report, f"# Checks on {devices}\n")
        for part in parts(jax.default_backend()):
            words = shlex.split(f"{part.command} {part.small if FLAGS.small else ''}")
            outcome, output = run(part, words)
            if not outcome.startswith("ok"):
                bad.append(part.name)
            print(f"{part.name}: {outcome}", flush=True)
            text = "\n".join(output.splitlines()[-LAST_LINES:])
            with report.open("a", encoding="utf-8") as file:
                file.write(f"\n## {part.name}: {outcome}\n\n```\n{text}\n```\n")
    except OSError as error:
        sys.exit(entry_point.refusal(error))
    if bad:
        sys.exit(entry_point.refusal(f"{', '.join(bad)} did not end well; see {report}"))


if __name__ == "__main__":
    entry_point.start(define_flags, main)
