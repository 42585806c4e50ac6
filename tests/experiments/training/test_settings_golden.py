"""Flags and settings of the experiments are those of the first release, by tests/golden.

A difference here changes what an old command means, or keeps an old run from being resumed. To add
a flag on purpose, write the golden file again:

    python -m tests.experiments.training.test_settings_golden
"""

import importlib
import json
import pathlib
import re

import pytest
from absl import flags

from experiments.domains import flags as domain_flags
from experiments.images import flags as image_flags
from experiments.runtime import files
from experiments.training import flags as run_flags
from tests.helpers.commands import parsed

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "settings.json"
TRAINING = [
    *("--batch_size=32", "--weight_decay=0.001", "--clip_norm=0", "--accumulate=2"),
    *("--augmentation=crop+flip+jitter", "--jitter=0.1,0.2,0.3,0.05", "--crop_scale=0.5,1"),
    *("--head=normalized", "--model_dropout=0.1", "--keep_finished_checkpoints"),
    *("--radius=0.1", "--option=dropout.rate=0.3"),
]
COMMANDS = {
    "long_tail": [],
    "balanced": [],
    "tune": [],
    "layer_sweep": [],
    "landscape": [],
    "domain_generalization": [],
    "domain_tune": [],
    "long_tail given": [
        *("--schedule=step", "--milestones=0.5,0.75", "--warmup_epochs=1.5", "--seeds=1,3-5"),
        *TRAINING,
    ],
    "long_tail cifar10": ["--dataset=cifar10"],
    "balanced cifar100": ["--dataset=cifar100", "--epochs=3"],
    "balanced lists": ["--train_list=somewhere/mine.txt", "--eval_list=b.txt", "--image_root=c"],
    "domain_generalization given": [*TRAINING, "--train_steps=100", "--model=mlp"],
    "domain_generalization photos": ["--dataset=PACS", "--model=resnet50", "--image_size=64"],
    "landscape given": ["--measure_layers=hidden2", "--severities=2,4", "--assignment=confidence"],
}


def found(command):
    """Flags with their types, and settings, as an experiment has them after parsing."""
    name = command.partition(" ")[0]
    module = importlib.import_module(f"experiments.{name}")
    protocol = domain_flags if name.startswith("domain") else image_flags
    with parsed(module, COMMANDS[command]):
        settings = protocol.settings()
        resolved = run_flags.resolved()
        result = {"flags": resolved, "settings": settings.as_dict()}
        if name == "landscape":
            result["measuring"] = vars(module.measuring(settings.model))
        if not COMMANDS[command]:
            every = {flag: flags.FLAGS[flag] for flag in resolved}
            result["kinds"] = {
                flag: [of.flag_type(), of.default, getattr(of.parser, "enum_values", None)]
                for flag, of in every.items()
            }
    return files.plain(result)


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_and_settings_are_those_of_the_release(command):
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert found(command) == golden[command]


if __name__ == "__main__":
    content = json.dumps({command: found(command) for command in COMMANDS}, indent=1)
    lists_on_one_line = re.sub(r"\[[^][{}]*\]", lambda of: " ".join(of[0].split()), content)
    GOLDEN.write_text(lists_on_one_line + "\n", encoding="utf-8")
