"""The inverse of each Fisher block, by sweeping (:func:`invert`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from pruners.elimination.kernels.tiles import (
    PANEL,
    compiled,
    subtract_product,
    subtract_upper,
    work_shape,
)

Array = np.ndarray[Any, Any]

LARGEST = 256
"""The largest matrix that is inverted here, B of all published settings; LAPACK inverts larger ones."""


@compiled
def _invert_factor(matrix: Array, inverse: Array, depth: int) -> bool:
    """Write −L⁻ᵀ of D = L Lᵀ, an upper triangle.

    Args:
        matrix: (PANEL, PANEL), D in the first ``depth`` rows and columns; is overwritten.
        inverse: (PANEL, PANEL), is written.
        depth: size of D.

    Returns:
        Whether D is positive definite.
    """
    both = np.zeros((PANEL, 2 * PANEL))  # D and −I become Lᵀ and −L⁻¹
    row = np.empty(2 * PANEL)
    for p in range(depth):
        both[p, :PANEL] = matrix[p]
        both[p, PANEL + p] = -1.0
    for p in range(depth):
        pivot = both[p, p]
        if not pivot > 0.0 or not pivot < np.inf:
            return False
        root = 1.0 / np.sqrt(pivot)
        for j in range(2 * PANEL):
            row[j] = both[p, j] * root
        for j in range(depth):
            inverse[j, p] = row[PANEL + j]
        for q in range(p + 1, depth):
            share, other = row[q], both[q]
            for j in range(2 * PANEL):
                other[j] -= share * row[j]
    return True


@compiled
def _sweep_panel(
    matrix: Array, work: tuple[Array, Array, Array, Array], begin: int, depth: int, size: int
) -> bool:
    """Sweep ``depth`` positions of a symmetric matrix, from ``begin`` on.

    Args:
        matrix: a work matrix, of which the upper triangle counts.
        work: two arrays (PANEL, columns of the matrix), and two (PANEL, PANEL).
        begin: the first of the positions; a multiple of PANEL.
        depth: how many they are, whole tiles.
        size: of the matrix.

    Returns:
        Whether their block D is positive definite; if not, the matrix is left unfinished.
    """
    rows, solved, factor, inverse = work
    end = begin + depth
    for j in range(begin):  # P, the panel's rows
        for p in range(depth):
            rows[p, j] = matrix[j, begin + p]
    for p in range(depth):  # and D as two triangles
        rows[p, begin:end] = 0.0
        rows[p, end:size] = matrix[begin + p, end:size]
        for q in range(p, depth):
            factor[p, q] = factor[q, p] = matrix[begin + p, begin + q]
    if not _invert_factor(factor, inverse, depth):
        return False
    solved[:depth] = 0.0
    subtract_product(solved, inverse, rows, size, depth)  # V = L⁻¹P
    subtract_upper(matrix, solved, size, depth)
    for p in range(depth):
        for q in range(depth):
            factor[p, q] = inverse[q, p]
            solved[p, begin + q] = -inverse[q, p]
    rows[:depth] = 0.0
    subtract_product(rows, factor, solved, size, depth)  # L⁻ᵀV = D⁻¹P, and L⁻ᵀL⁻¹ = D⁻¹
    for j in range(begin):
        for p in range(depth):
            matrix[j, begin + p] = rows[p, j]
    for p in range(depth):
        for j in range(begin + p, end):
            matrix[begin + p, j] = -rows[p, j]
        matrix[begin + p, end:size] = rows[p, end:size]
    return True


@compiled
def sweep(matrix: Array) -> bool:
    """Sweep all positions of a work matrix, unless it is not positive definite; returns whether it is."""
    size, width = matrix.shape
    square = PANEL, PANEL
    work = np.zeros((PANEL, width)), np.zeros((PANEL, width)), np.zeros(square), np.zeros(square)
    for begin in range(0, size, PANEL):
        if not _sweep_panel(matrix, work, begin, min(PANEL, size - begin), size):
            return False
    return True


@compiled
def load_sums(
    matrix: Array, sums: tuple[Array, Array], scale: float, damp: float, slots: Array, alive: Array
) -> None:
    """Write the upper triangle of scale·sums + damp·I, for some positions of one block, into a work matrix.

    Args:
        matrix: the work matrix, is written.
        sums: the first h rows of the block's sums, (h, B), and the last B − h columns of the other rows.
        scale: 1/m, for m gradients.
        damp: λ.
        slots: (r,), positions in the block, ascending where they are alive.
        alive: (r,) bool; rows and columns that are not alive are zero but for λ on the diagonal.
    """
    first, last = sums
    half, left = len(first), len(slots)
    whole = left == half + len(last)
    for j in range(left):
        whole = whole and slots[j] == j and alive[j]
    for k in range(len(matrix)):
        here = matrix[k]
        here[k : len(matrix)] = 0.0
        if k < left and alive[k]:
            slot = slots[k]
            row = first[slot] if slot < half else last[slot - half]
            shift = 0 if slot < half else half
            if whole:
                tail = row[k - shift :]
                for j in range(left - k):
                    here[k + j] = scale * tail[j]
            else:
                for j in range(k, left):
                    if alive[j]:
                        here[j] = scale * row[slots[j] - shift]
        here[k] += damp


@compiled
def store_negative(matrix: Array, out: Array) -> None:
    """Write the negative of a symmetric matrix that is given by its upper triangle."""
    size = len(out)
    for begin in range(0, size, 8):  # some rows at a time, to write neighbouring numbers
        end = min(begin + 8, size)
        for i in range(begin, end):
            for j in range(i, size):
                out[i, j] = -matrix[i, j]
        for j in range(begin, size):
            for i in range(begin, min(end, j)):
                out[j, i] = -matrix[i, j]


@compiled
def invert(
    first: Array,
    last: Array,
    scale: float,
    damp: float,
    slots: Array,
    alive: Array,
    inverse: Array,
    sound: Array,
) -> None:
    """Compute F⁻¹ = (scale·sums + damp·I)⁻¹ for some positions of each block.

    Blocks of PANEL positions are swept one after the other (Goodnight, "A tutorial on the SWEEP operator",
    1979): with D the block of the positions, P their rows in the other columns, and the others A,

        D ← −D⁻¹,  P ← D⁻¹P,  A ← A − PᵀD⁻¹P = A − VᵀV with D = L Lᵀ and V = L⁻¹P.

    When all are swept the matrix is −F⁻¹. F is positive definite if every D is.

    Args:
        first: the first h rows of the symmetric sums, (n, h, B).
        last: the last B − h columns of the other rows, (n, B − h, B − h).
        scale: 1/m, for m gradients.
        damp: λ.
        slots: (n, r), positions in the block, r ≤ LARGEST; ascending where they are alive.
        alive: (n, r) bool; rows and columns that are not alive are zero but for λ on the diagonal.
        inverse: (n, r, r) float64, is written.
        sound: (n,) bool, is written: whether the block was positive definite.
    """
    blocks, left = slots.shape
    height, width = work_shape(left)
    matrix = np.zeros((height, width))
    for block in range(blocks):
        load_sums(matrix, (first[block], last[block]), scale, damp, slots[block], alive[block])
        sound[block] = sweep(matrix)
        store_negative(matrix, inverse[block])
