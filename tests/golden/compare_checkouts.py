"""Shows where two checkouts of this project give different results, to the last bit.

    git worktree add /tmp/before REVISION
    python tests/golden/compare_checkouts.py /tmp/before . --only=long_tail,domains

runs the same commands in both and compares every JSON file, table and printed line, without times,
versions and paths. Figures and checkpoints are not compared. Both sides must use the same number of
cores, which decides the order of sums. All commands take about 6 minutes a checkout on 2 cores.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

DOMAINS = "--images_per_domain=300 --test_domains=0,30 --evaluate_every=5 --train_steps=10"
COMMANDS = {
    "long_tail": "long_tail --epochs=5 --seeds=0-1 --class_geometry_batches=1",
    "many": "long_tail --epochs=2 --evaluate_every=1 --seeds=5-5 --hparams=none --methods="
    "dropout@hidden2,ldam_drw,logit_adjusted+lpa,sam,posthoc_logit_adjustment,"
    "manifold_mixup@input|hidden1,mixup,isda,adversarial",
    "balanced": "balanced --per_class=20 --epochs=3 --seeds=0-1",
    "domains": f"domain_generalization {DOMAINS} --seeds=0-1 --methods=erm,lpa,coral+lpa,mixup,irm",
    "draws": "domain_generalization --train_steps=10 --evaluate_every=5 --seeds=0-0 --draws=2 "
    "--dataset=ColoredMNIST --model=mlp --images_per_domain=300 --methods=erm,lpa+group_dro "
    "--leave_two_out",
    "tune": "tune --trials=2 --seeds=100-101 --epochs=3 --methods=erm,lpa",
    "domain_tune": f"domain_tune --trials=2 {DOMAINS} --methods=erm,lpa",
    "layer_sweep": "layer_sweep --epochs=2 --seeds=0-0 --methods=lpa",
    "landscape": "landscape --epochs=2 --seeds=0-0 --methods=erm,lpa",
    "report": "report long_tail --html --compare=lpa:lpl",
}
OF_THE_MACHINE = {"seconds", "environment", "examples_per_second", "workdir", "output"}


def run(checkout: pathlib.Path, name: str, out: pathlib.Path) -> None:
    """Runs one command in a checkout; its files and what it prints go below `out`."""
    folder = "--output" if name == "report" else "--workdir"
    module, *arguments = COMMANDS[name].split()
    if name.endswith("tune"):
        arguments.append(f"--output={out / name}.json")
    command = [sys.executable, "-m", f"experiments.{module}", f"{folder}={out / name}", *arguments]
    done = subprocess.run(
        [str(out / "long_tail") if word == "long_tail" else word for word in command],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout), "COLUMNS": "100"},
        capture_output=True,
        text=True,
    )
    (out / f"{name}.txt").write_text(done.stdout)
    print(f"{checkout}: {name} ended with {done.returncode}", flush=True)


def content(path: pathlib.Path, out: pathlib.Path):
    """What a file says, without what the machine decides."""

    def kept(value):
        if isinstance(value, dict):
            return {k: kept(v) for k, v in value.items() if k not in OF_THE_MACHINE}
        return [kept(v) for v in value] if isinstance(value, list) else value

    text = path.read_text().replace(str(out), "OUT")
    if path.suffix == ".json":
        return kept(json.loads(text))
    if path.suffix == ".jsonl":
        return [kept(json.loads(line)) for line in text.splitlines()]
    # The last column of every table is that of the seconds.
    return [re.sub(r"[|│,&]\s*[\d.]+\s*([|│]|\\\\)?$", "", line) for line in text.splitlines()]


def main() -> None:
    """Entry point; exits with 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", nargs=2, type=pathlib.Path)
    parser.add_argument("--only", default=",".join(COMMANDS), help="names of commands")
    given = parser.parse_args()
    outs = [pathlib.Path(tempfile.mkdtemp()) for _ in given.checkouts]
    for name in given.only.split(","):
        for checkout, out in zip(given.checkouts, outs, strict=True):
            run(checkout.resolve(), name, out)
    compared = (".json", ".jsonl", ".csv", ".md", ".tex", ".txt")
    files = {path.relative_to(out) for out in outs for path in out.rglob("*")
             if path.suffix in compared and "checkpoints" not in path.parts}  # fmt: skip
    before, after = outs
    different = []
    for file in sorted(files):
        there = (before / file).exists() and (after / file).exists()
        if not there or content(before / file, before) != content(after / file, after):
            different.append(str(file))
    print("\n".join([*different, f"{len(different)} of {len(files)} files differ"]))
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
