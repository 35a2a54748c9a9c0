"""The numbers v of each elimination step: rounded to 16 bits, and applied to the weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from pruners.elimination.kernels.tiles import compiled

Array = np.ndarray[Any, Any]

STEPS_OF_16_BITS = 32767
"""The largest number of :func:`round_steps`."""


@compiled
def round_steps(
    columns: Array, coefficients: Array, panel: int, size: int, rounded: Array, scaled: Array
) -> None:
    """Round the numbers v of each step to 16 bits: ``y·v = scaled·rounded``.

    Args:
        columns: (n, numbers) float32, as :func:`pruners.elimination.kernels.eliminate.eliminate` writes them.
        coefficients: (n, steps), y.
        panel: number of steps of a panel.
        size: width of the first panel.
        rounded: (n, numbers) int16, is written.
        scaled: (n, steps), is written.
    """
    for block in range(len(columns)):
        here = 0
        for step in range(coefficients.shape[1]):
            width = size - step // panel * panel
            largest = np.float32(0.0)
            for j in range(here, here + width):
                number = abs(columns[block, j])
                largest = number if number > largest else largest
            scaled[block, step] = coefficients[block, step] * (largest / np.float32(STEPS_OF_16_BITS))
            inverse = np.float32(STEPS_OF_16_BITS) / largest if largest > 0 else np.float32(0.0)
            for j in range(here, here + width):
                rounded[block, j] = np.int16(np.rint(columns[block, j] * inverse))
            here += width


@compiled
def apply_steps(
    weights: Array, done: Array, stay: Array, coefficients: Array, columns: Array, slots: Array, panel: int
) -> None:
    """``weights[slots] −= Σ y_i·v_i`` over the first ``done`` steps of each block.

    Args:
        weights: (n, B) float32, changed in place.
        done: (n,), number of steps to apply.
        stay: (n,), how many numbers of each column matter, from the first on.
        coefficients: (n, steps), y.
        columns: (n, numbers), v of each step; those of a panel are as many fewer as it has steps before it.
        slots: (n, r), the positions in the block that the numbers of a column belong to.
        panel: number of steps of a panel.
    """
    size = slots.shape[1]
    moved = np.empty(size, np.float32)
    for block in range(len(columns)):
        moved[:] = 0.0
        here = 0
        for step in range(done[block]):
            width = size - step // panel * panel
            y = coefficients[block, step]
            for j in range(min(width, stay[block])):
                moved[j] += y * columns[block, here + j]
            here += width
        for j in range(stay[block]):
            weights[block, slots[block, j]] -= moved[j]
