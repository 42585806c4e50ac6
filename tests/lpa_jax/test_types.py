"""What a type checker makes of a user's program."""

import re
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

CONFIG = """
[mypy]
[mypy-lpa_jax.*]
follow_imports = silent
[mypy-optax.*]
ignore_missing_imports = True
"""
PROGRAM = """
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lpa_jax

batch = {"image": np.zeros((8, 4, 4, 1), np.float32), "label": np.arange(8) % 4}
counts = np.array([9, 5, 2, 1])
model = lpa_jax.models.MLP(num_classes=4, hidden=(8,))
perturbations = {"hidden1": lpa_jax.lpa(radius=0.1, assignment=lpa_jax.by_frequency(counts))}
state = lpa_jax.TrainState.create(model, optax.sgd(0.05), jax.random.key(0), batch, perturbations)
step = functools.partial(lpa_jax.lpa_step, loss=lpa_jax.losses.logit_adjusted(counts))
state, metrics = step(state, batch, perturbations=perturbations)
mixup = {("input", "hidden1"): lpa_jax.manifold_mixup()}
state, metrics = lpa_jax.lpa_step(state, batch, perturbations=mixup, loss=lpa_jax.cross_entropy)
print(lpa_jax.metrics.compute(metrics)["loss"], state.step)
network = lpa_jax.inject(nn.Sequential([nn.Dense(4)]), "layers_0")
delta = lpa_jax.class_perturbation(
    lambda h: h.sum(axis=1),
    jnp.ones((8, 3)),
    jnp.zeros(8, int),
    sign=jnp.ones(4),
    radius=jnp.ones(4),
)
"""
# What is wrong, and the argument that mypy names.
WRONG = {
    'lpa_jax.lpa(radius="large")': "radius",
    "lpa_jax.lpa_step(state, batch, perturbations=lpa_jax.lpa())": "perturbations",
    "lpa_jax.lpa_step(batch, state)": "Argument 1",
    'lpa_jax.TrainState.create("mlp", optax.sgd(0.05), jax.random.key(0), batch)': "Argument 1",
    "lpa_jax.class_perturbation(delta, delta, delta, sign=None, radius=delta)": "sign",
}


@pytest.mark.slow
def test_mypy_accepts_a_right_program_and_names_each_mistake_of_a_wrong_one(tmp_path):
    pytest.importorskip("mypy", reason="mypy is in the extra test")
    (tmp_path / "mypy.ini").write_text(CONFIG)
    (tmp_path / "user.py").write_text(PROGRAM + "\n".join(WRONG))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-incremental", "user.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"MYPYPATH": str(ROOT), "PATH": ""},
    )
    errors = re.findall(r"^user.py:(\d+): error: (.*)$", done.stdout, re.MULTILINE)
    first = len(PROGRAM.splitlines()) + 1
    for line, named in enumerate(WRONG.values(), first):
        assert any(int(at) == line and named in message for at, message in errors), done.stdout
    assert all(int(line) >= first for line, _ in errors), done.stdout
