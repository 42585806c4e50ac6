"""Norms of rows: accurate from the smallest to the largest, however they are computed."""

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
