"""Spatial dropout: whole channels, or contiguous blocks of them (DropBlock), zeroed at random."""

import functools
import math

import jax
import numpy as np

from lpa_jax import checks
from lpa_jax.perturbations.base import Perturbation, identity, register, stateless
from lpa_jax.perturbations.dropout import inverted_dropout

Array = jax.Array


@register("spatial_dropout")
def spatial_dropout(rate: float = 0.1, *, block_size: int | None = None) -> Perturbation:
    r"""Dropout with structured masks, unbiased at every position: h~_i = h_i * m_i / E[m_i].

    Neighbouring positions of a feature map carry nearly the same information, so zeroing them
    independently removes little of it. Here every channel (last axis) of every example draws

        corners ~ Bernoulli(gamma) at the positions where a block fits into the map,
        m = 0 on the blocks that start at a corner and 1 elsewhere,
        gamma = rate * prod_a n_a / prod_a k_a (n_a - k_a + 1),

    over the position axes a, with n_a the length of the map and k_a = min(block_size, n_a) that of
    a block. So a block as large as the map drops whole channels with probability `rate` (spatial
    dropout), and blocks of one position, or an activation without positions [B, channels], are
    plain dropout. In between, blocks overlap and the dropped share is a little below `rate`.

    Args:
      rate: Probability of zeroing a value, up to the overlap of blocks, in [0, 1). 0 is no
        perturbation, bitwise.
      block_size: Side of a block, in positions; None is the whole map.

    Raises:
      ValueError: `rate` or `block_size` out of range.

    Example:
      >>> spatial_dropout(0.1, block_size=7).name
      'spatial_dropout'

    References:
      Tompson et al., CVPR 2015 (arXiv 1411.4280), whole channels; Ghiasi et al., NeurIPS 2018
      (arXiv 1810.12890), blocks and gamma. DropBlock rescales by the share that survived in the
      batch. Dividing by its expectation is this library's choice and needs no communication. The
      default rate is that of DropBlock's ResNet-50 on ImageNet, whose `keep_prob` is 0.9.
    """
    checks.number("rate", rate, 0.0, 1.0, open_high=True)
    if block_size is not None:
        checks.integer("block_size", block_size, 1)
    if checks.vanishes(rate):
        return identity("spatial_dropout")

    def perturb(site):
        dropped, keep_probability = _blocks(site.rng, site.activation.shape, rate, block_size)
        return inverted_dropout(site.activation, dropped, keep_probability), site.targets

    return stateless("spatial_dropout", perturb)


def _blocks(
    rng: Array, shape: tuple[int, ...], rate: float, block_size: int | None
) -> tuple[Array, np.ndarray]:
    """Which values are dropped and E[m] at every position; both broadcast over [*shape]."""
    lengths = shape[1:-1]
    sides = [n if block_size is None else min(block_size, n) for n in lengths]
    corners = [n - side + 1 for n, side in zip(lengths, sides, strict=True)]
    gamma = rate * (math.prod(lengths) / (math.prod(sides) * math.prod(corners)))
    dropped = jax.random.bernoulli(rng, gamma, (shape[0], *corners, shape[-1]))
    for axis, (side, starts) in enumerate(zip(sides, corners, strict=True), start=1):
        # A block along the whole axis stays at length one, which broadcasts.
        if side > 1 and starts > 1:
            dropped = _spread(dropped, axis, side)
    covering = [
        np.convolve(np.ones(starts), np.ones(side))
        for side, starts in zip(sides, corners, strict=True)
    ]
    blocks_over_position = functools.reduce(np.multiply.outer, covering, np.ones(()))
    return dropped, (1.0 - gamma) ** blocks_over_position[np.newaxis, ..., np.newaxis]


def _spread(corners: Array, axis: int, side: int) -> Array:
    """Extends every true entry to `side` entries along `axis`, which grows by `side - 1`."""
    window = [side if a == axis else 1 for a in range(corners.ndim)]
    padding = [(length - 1, length - 1) for length in window]
    return jax.lax.reduce_window(corners, False, jax.lax.max, window, [1] * corners.ndim, padding)
