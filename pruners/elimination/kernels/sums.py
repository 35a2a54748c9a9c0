"""Sums of outer products of gradients, Σ g gᵀ of each Fisher block."""

from __future__ import annotations

from typing import Any

import numpy as np

from pruners.elimination.kernels.tiles import COLUMNS, add_squares, compiled, mirror

Array = np.ndarray[Any, Any]

LEAST_HALF = 2 * COLUMNS
"""The fewest rows and columns of each part of the sums in :func:`accumulate`."""


@compiled
def accumulate(first: Array, last: Array, gradients: Array, begin: int, fresh: bool) -> None:
    """Add Σ g gᵀ to the sums of each block; :func:`complete` later fills the part below each diagonal.

    Args:
        first: the first h rows of the symmetric sums, (n, h, B) float32, h and B − h at least LEAST_HALF.
        last: the last B − h columns of the other rows, (n, B − h, B − h) float32.
        gradients: (k, blocks, B) float32.
        begin: which of these blocks the first one is.
        fresh: whether there are no sums yet: the numbers in memory are overwritten.
    """
    count, half, size = len(gradients), first.shape[1], first.shape[2]
    near = np.empty((count, size), np.float32)
    for block in range(len(first)):
        for k in range(count):  # a block's numbers lie far apart, and are needed many times
            for j in range(size):
                near[k, j] = gradients[k, begin + block, j]
        if fresh:
            first[block] = 0.0
            last[block] = 0.0
        add_squares(first[block], near, 0, half, size)
        add_squares(last[block], near, half, size, size)


@compiled
def complete(first: Array, last: Array) -> None:
    """Make the sums of :func:`accumulate` symmetric."""
    for block in range(len(first)):
        mirror(first[block], first.shape[1])
        mirror(last[block], last.shape[1])
