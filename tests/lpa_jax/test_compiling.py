"""Initialisation compiles with little optimization on CPUs, unless jit or XLA_FLAGS decide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpa_jax import compiling, injection, models


@pytest.mark.parametrize("flags", ["", "--xla_dump_to=there"])
def test_a_program_that_runs_once_is_optimized_little(monkeypatch, flags):
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert compiling.quick(jnp.ones(3)) == {"xla_backend_optimization_level": 1}
    monkeypatch.setenv("XLA_FLAGS", f"--xla_backend_optimization_level=3 {flags}")
    assert compiling.quick(jnp.ones(3)) is None
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert compiling.quick(jnp.ones(3)) is None


@pytest.mark.parametrize("cut", [lambda m: m, lambda m: injection.inject(m, "stages_hidden1")])
def test_networks_start_from_the_same_values_with_and_without_jit(monkeypatch, cut):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    network = injection.as_network(cut(models.MLP(hidden=(4,), num_classes=3)))
    arguments = jax.random.key(0), jnp.ones((2, 3, 3, 1))
    for one, other in zip(
        jax.tree.leaves(network.init(*arguments)),
        jax.tree.leaves(jax.jit(network.init)(*arguments)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-6)
