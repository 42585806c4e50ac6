"""Norms of rows of every size, and the part of a batch that is spread over its classes."""

import jax.numpy as jnp
import numpy as np
import pytest

from lpa_jax import tables


@pytest.mark.parametrize("width", [1, 4096])
@pytest.mark.parametrize("norms", [tables._norms_in_one_read, tables._norms_in_two_reads])
def test_norms_of_rows_of_every_size_are_accurate(norms, width):
    # One row a binary exponent, up to the largest norms and down to entries at the edge of what is
    # flushed to zero; a few entries are much smaller than the rest.
    entries = np.random.default_rng(8).uniform(0.5, 1.0, (235, width))
    entries[:, 1::7] *= 1e-3
    rows = (entries * 2.0 ** np.arange(-108, 127)[:, None] / np.sqrt(width)).astype(np.float32)
    expected = np.linalg.norm(rows.astype(np.float64), axis=1)
    np.testing.assert_allclose(norms(jnp.asarray(rows)), expected, rtol=1e-6)
    np.testing.assert_array_equal(norms(jnp.array([[0.0, 0.0], [1.0, jnp.nan]])), [0.0, np.nan])


@pytest.mark.parametrize("seed", range(4))
def test_a_part_spread_over_the_classes_takes_one_more_of_each_class_in_turn(seed):
    rng = np.random.default_rng(seed)
    labels = rng.choice(7, p=[0.5, 0.2, 0.1, 0.1, 0.05, 0.05, 0.0], size=40) - seed % 2
    turns, waiting = [], [i for i in range(40) if labels[i] >= 0]
    while waiting:
        seen = set()
        turn = [i for i in waiting if not (labels[i] in seen or seen.add(labels[i]))]
        turns += turn
        waiting = [i for i in waiting if i not in turn]
    expected = turns + [i for i in range(40) if labels[i] < 0]
    for size in (1, 9, 20, 40):
        chosen = tables.spread_over_classes(jnp.asarray(labels), size)
        np.testing.assert_array_equal(chosen, expected[:size])
