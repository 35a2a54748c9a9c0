"""The order in which the weights of each Fisher block fall by the OBS rule, and what each step changes."""

from __future__ import annotations

from typing import Any

import numpy as np

from pruners.elimination.kernels.inverse import load_sums, sweep
from pruners.elimination.kernels.tiles import PANEL, ROWS, compiled, subtract_lower, work_shape

Array = np.ndarray[Any, Any]


@compiled
def _subtract_rows(row: Array, rows: Array, first: int, shares: Array, count: int, width: int) -> None:
    """``row[:width] -= Σ_{i<count} shares[i]·rows[first + i, :width]``; ``row`` is not one of ``rows``."""
    i, r = 0, first
    while i + 8 <= count:
        a0, a1, a2, a3 = shares[i], shares[i + 1], shares[i + 2], shares[i + 3]
        a4, a5, a6, a7 = shares[i + 4], shares[i + 5], shares[i + 6], shares[i + 7]
        for j in range(width):
            row[j] -= (
                (a0 * rows[r, j] + a1 * rows[r + 1, j]) + (a2 * rows[r + 2, j] + a3 * rows[r + 3, j])
            ) + ((a4 * rows[r + 4, j] + a5 * rows[r + 5, j]) + (a6 * rows[r + 6, j] + a7 * rows[r + 7, j]))
        i, r = i + 8, r + 8
    while i + 2 <= count:
        a0, a1 = shares[i], shares[i + 1]
        for j in range(width):
            row[j] -= a0 * rows[r, j] + a1 * rows[r + 1, j]
        i, r = i + 2, r + 2
    if i < count:
        a0 = shares[i]
        for j in range(width):
            row[j] -= a0 * rows[r, j]


@compiled
def _first_smallest(numbers: Array, count: int) -> int:
    """The position of the first of the smallest of ``count`` numbers, by four minima side by side."""
    a = b = c = d = np.inf
    for j in range(0, count - 3, 4):
        a = numbers[j] if numbers[j] < a else a
        b = numbers[j + 1] if numbers[j + 1] < b else b
        c = numbers[j + 2] if numbers[j + 2] < c else c
        d = numbers[j + 3] if numbers[j + 3] < d else d
    for j in range(count // 4 * 4, count):
        a = numbers[j] if numbers[j] < a else a
    smallest = min(a, b, c, d)
    for j in range(count):
        if numbers[j] == smallest:
            return j
    return 0


@compiled
def _fetch_column(
    matrix: Array, column: Array, at: Array, holes: Array, filled: int, p: int, count: int
) -> None:
    """Column ``p`` of a symmetric matrix in the present order of positions.

    Args:
        matrix: a work matrix, of which the lower triangle counts.
        column: is written.
        at: row of the matrix for each position; the same number for most of them.
        holes: the positions that another one has taken since the matrix was in order.
        filled: number of ``holes``.
        p: a row of the matrix.
        count: number of positions.
    """
    for j in range(min(p, count)):
        column[j] = matrix[p, j]
    for j in range(p, count):
        column[j] = matrix[j, p]
    for k in range(filled):
        j = holes[k]
        q = at[j]
        column[j] = matrix[max(p, q), min(p, q)]


@compiled
def _update(matrix: Array, v: Array, begin: int, at: Array, holes: Array, filled: int, count: int) -> None:
    """Subtract the last ``filled`` steps from the lower triangle of a matrix, brought into the present order.

    Args:
        matrix: see :func:`_fetch_column`.
        v: the steps; those to subtract are in the rows from ``begin`` on.
        begin: see ``v``.
        at: see :func:`_fetch_column`.
        holes: see :func:`_fetch_column`.
        filled: number of ``holes``, and of steps.
        count: number of positions.
    """
    moved, sources = np.empty(filled, np.int64), np.empty(filled, np.int64)
    number = 0
    for k in range(filled):
        if holes[k] < count and at[holes[k]] != holes[k]:
            moved[number], sources[number] = holes[k], at[holes[k]]
            number += 1
    for first in range(0, count, ROWS):
        end = min(first + ROWS, count)
        for k in range(number):
            hole, source = moved[k], sources[k]
            if hole < end:
                for i in range(first, end):
                    matrix[i, hole] = matrix[source, i]
        for i in range(first, end):
            own = at[i]
            if own != i:  # the whole row lies beyond all positions that are left
                for j in range(i):
                    matrix[i, j] = matrix[own, j]
                for k in range(number):
                    matrix[i, moved[k]] = matrix[max(own, sources[k]), min(own, sources[k])]
        subtract_lower(matrix, v, begin, first, filled)


@compiled
def _eliminate_block(
    matrix: Array,
    weights: Array,
    left: int,
    before: float,
    order: Array,
    losses: Array,
    coefficients: Array,
    columns: Array,
    slots: Array,
    v: Array,
) -> None:
    """:func:`eliminate` for one block, with its inverse as the lower triangle of a work matrix."""
    size, steps = len(weights), len(order)
    tiny = np.finfo(np.float64).tiny
    ranks = np.zeros(((steps + PANEL - 1) // PANEL, size), np.int64)  # row of each position after each panel
    column, diagonal, w, score = np.empty(size), np.empty(size), np.empty(size), np.empty(size)
    shares = np.empty(PANEL)
    positions, at, holes = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(PANEL, np.int64)
    for j in range(size):
        positions[j] = j
        diagonal[j] = max(matrix[j, j], tiny)
        w[j] = weights[j]
        score[j] = w[j] * w[j] / diagonal[j]
    count, loss, taken = left, before, min(steps, left)
    for begin in range(0, taken, PANEL):
        for j in range(count):
            at[j] = j
        panel = min(PANEL, taken - begin)
        for k in range(panel):
            pivot = _first_smallest(score, count)
            _fetch_column(matrix, column, at, holes, k, at[pivot], count)
            for i in range(k):
                shares[i] = v[begin + i, pivot]
            _subtract_rows(column, v, begin, shares, k, count)
            root = 1.0 / np.sqrt(max(diagonal[pivot], tiny))
            y = w[pivot] * root
            step = begin + k
            for j in range(count):
                number = column[j] * root
                v[step, j] = number
                w[j] -= y * number
                rest = diagonal[j] - number * number
                rest = rest if rest > tiny else tiny
                diagonal[j] = rest
                score[j] = w[j] * w[j] / rest
            loss += 0.5 * y * y
            order[step], losses[step], coefficients[step] = positions[pivot], loss, y
            count -= 1
            holes[k] = pivot
            positions[pivot], positions[count] = positions[count], positions[pivot]
            at[pivot] = at[count]
            diagonal[pivot] = diagonal[count]
            w[pivot] = w[count]
            score[pivot] = score[count]
            for i in range(begin, step + 1):
                v[i, pivot], v[i, count] = v[i, count], v[i, pivot]
        for j in range(size):
            ranks[begin // PANEL, positions[j]] = j
        if begin + PANEL < taken:
            _update(matrix, v, begin, at, holes, panel, count)
    here = 0
    for step in range(steps):
        panel = step // PANEL
        width = size - panel * PANEL
        if step % PANEL == 0:
            for j in range(width):
                at[j] = ranks[panel, positions[j]]
        known = left - step - 1 if step < taken else 0  # without the eliminated weight's own number
        for j in range(known):
            columns[here + j] = v[step, at[j]]
        for j in range(known, width):
            columns[here + j] = 0.0
        here += width
    for j in range(size):
        slots[j] = positions[j]


@compiled
def eliminate(
    weights: Array,
    inverse: Array,
    left: Array,
    before: Array,
    order: Array,
    losses: Array,
    coefficients: Array,
    columns: Array,
    slots: Array,
) -> None:
    """Pivoted Cholesky of each block's inverse by the OBS rule (see :mod:`pruners.elimination.obs`).

    An eliminated weight changes places with the last one that is left, so that every loop runs over
    neighbouring numbers. The matrix follows when PANEL weights have been eliminated.

    Args:
        weights: (n, r).
        inverse: (n, r, r).
        left: (n,), how many of the r weights are alive; they are the first ones.
        before: (n,), loss of each block before the first step.
        order: (n, steps), is written: positions of the eliminated weights.
        losses: (n, steps), is written: cumulative losses.
        coefficients: (n, steps), is written: y of each step.
        columns: (n, numbers), is written: for each panel (steps of the panel, width) numbers v. The width is
            the number of weights but those that earlier panels have eliminated.
        slots: (n, r), is written: the positions that the numbers of a column belong to.
    """
    height, across = work_shape(weights.shape[1])
    matrix, v = np.zeros((height, across)), np.zeros((order.shape[1], across))
    for block in range(len(weights)):
        for i in range(weights.shape[1]):
            for j in range(i + 1):
                matrix[i, j] = inverse[block, i, j]
        _eliminate_block(
            matrix,
            weights[block],
            left[block],
            before[block],
            order[block],
            losses[block],
            coefficients[block],
            columns[block],
            slots[block],
            v,
        )


@compiled
def invert_and_eliminate(
    first: Array,
    last: Array,
    scale: float,
    damp: float,
    positions: Array,
    alive: Array,
    sound: Array,
    weights: Array,
    left: Array,
    before: Array,
    order: Array,
    losses: Array,
    coefficients: Array,
    columns: Array,
    slots: Array,
) -> None:
    """Invert, and then call :func:`eliminate` block by block: no inverse leaves a core's cache.

    Blocks that are not sound are not eliminated.

    Args:
        first, last, scale, damp, alive, sound: as for :func:`pruners.elimination.kernels.inverse.invert`.
        positions: (n, r), positions in the block, the ``slots`` there.
        weights, left, before, order, losses, coefficients, columns, slots: as for :func:`eliminate`.
    """
    height, across = work_shape(weights.shape[1])
    swept, matrix = np.zeros((height, across)), np.zeros((height, across))
    v = np.zeros((order.shape[1], across))
    for block in range(len(weights)):
        load_sums(swept, (first[block], last[block]), scale, damp, positions[block], alive[block])
        sound[block] = sweep(swept)
        if sound[block]:
            for begin in range(0, height, 8):  # some rows at a time, to read neighbouring numbers
                for j in range(begin + 8):
                    for i in range(max(begin, j), min(begin + 8, height)):
                        matrix[i, j] = -swept[j, i]
            _eliminate_block(
                matrix,
                weights[block],
                left[block],
                before[block],
                order[block],
                losses[block],
                coefficients[block],
                columns[block],
                slots[block],
                v,
            )
