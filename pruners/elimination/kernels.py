"""Compiled loops for CPUs: one Fisher block at a time, which stays in a core's cache.

They compute what the batched formulation in :mod:`pruners.elimination.obs` and
:mod:`pruners.elimination.fisher` computes on GPUs; a test compares the two. There all blocks take each step
together, here each thread works on its own blocks. Several rows are combined at a time, so that the row that
is being computed is read and written less often.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numba import njit

Array = np.ndarray[Any, Any]

STRIDE = 264
"""Distance of two rows of a work matrix, in numbers."""
_THREADS = "espalier-kernel"
LARGEST = 256
"""The largest matrix that is inverted here, B of all published settings; LAPACK inverts larger ones."""

# The compiler may reorder sums; NaN and infinity keep their meaning.
_Function = TypeVar("_Function", bound=Callable[..., Any])
_compiled = cast(
    Callable[[_Function], _Function],
    njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "nsz", "reassoc"}),
)


def supports(*tensors: torch.Tensor) -> bool:
    """Whether the compiled loops can work on some tensors: whether all are in the CPU's memory."""
    return all(tensor.device.type == "cpu" for tensor in tensors)


def on_threads(work: Callable[[slice], object], count: int) -> None:
    """Divide ``range(count)`` into parts, and work on each part in a thread of its own.

    There are as many threads as torch uses. A call from one of these threads works in that thread alone.

    Args:
        work: is called with each part, a slice; it must release the interpreter lock to gain speed.
        count: number of items, as blocks or layers.
    """
    nested = threading.current_thread().name.startswith(_THREADS)
    threads = 1 if nested else max(1, min(torch.get_num_threads(), count))
    cuts = [count * part // threads for part in range(threads + 1)]
    parts = [slice(first, last) for first, last in itertools.pairwise(cuts) if last > first]
    if len(parts) < 2:
        for part in parts:
            work(part)
        return
    for future in [_pool().submit(work, part) for part in parts]:
        future.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix=_THREADS)


# A forked process inherits the pool object, but not its threads.
os.register_at_fork(after_in_child=_pool.cache_clear)


@_compiled
def _subtract_rows(row: Array, rows: Array, shares: Array, count: int, width: int) -> None:
    """``row[:width] -= Σ_{i<count} shares[i]·rows[i, :width]``; ``row`` is not one of ``rows``."""
    i = 0
    while i + 8 <= count:
        a0, a1, a2, a3 = shares[i], shares[i + 1], shares[i + 2], shares[i + 3]
        a4, a5, a6, a7 = shares[i + 4], shares[i + 5], shares[i + 6], shares[i + 7]
        for j in range(width):
            row[j] -= (
                (a0 * rows[i, j] + a1 * rows[i + 1, j]) + (a2 * rows[i + 2, j] + a3 * rows[i + 3, j])
            ) + ((a4 * rows[i + 4, j] + a5 * rows[i + 5, j]) + (a6 * rows[i + 6, j] + a7 * rows[i + 7, j]))
        i += 8
    while i < count:
        share = shares[i]
        for j in range(width):
            row[j] -= share * rows[i, j]
        i += 1


@_compiled
def _subtract_tile(out: Array, rows: Array, first: int, shares: Array, start: int, stop: int) -> None:
    """``out[q, start:stop] -= Σ_p shares[4q + p]·rows[first + p, start:stop]`` for four rows q and p.

    Both are flat, with rows STRIDE apart. The compiler vectorises the loop because STRIDE is a constant and
    the indices are unsigned.
    """
    u = np.uint64
    r0, r1, r2, r3 = (
        u(first * STRIDE),
        u((first + 1) * STRIDE),
        u((first + 2) * STRIDE),
        u((first + 3) * STRIDE),
    )
    q1, q2, q3 = u(STRIDE), u(2 * STRIDE), u(3 * STRIDE)
    a00, a01, a02, a03 = shares[0], shares[1], shares[2], shares[3]
    a10, a11, a12, a13 = shares[4], shares[5], shares[6], shares[7]
    a20, a21, a22, a23 = shares[8], shares[9], shares[10], shares[11]
    a30, a31, a32, a33 = shares[12], shares[13], shares[14], shares[15]
    for j in range(u(start), u(stop)):
        x0, x1, x2, x3 = rows[r0 + j], rows[r1 + j], rows[r2 + j], rows[r3 + j]
        out[j] -= (a00 * x0 + a01 * x1) + (a02 * x2 + a03 * x3)
        out[q1 + j] -= (a10 * x0 + a11 * x1) + (a12 * x2 + a13 * x3)
        out[q2 + j] -= (a20 * x0 + a21 * x1) + (a22 * x2 + a23 * x3)
        out[q3 + j] -= (a30 * x0 + a31 * x1) + (a32 * x2 + a33 * x3)


@_compiled
def _factorise(factor: Array, out: Array, shares: Array, size: int) -> bool:
    """Factorise F = UᵀU in place, four rows at a time; returns whether F is positive definite."""
    for k in range(0, size, 4):
        for q in range(4):
            for j in range(k, size):
                out[q * STRIDE + j] = factor[(k + q) * STRIDE + j]
        for i in range(0, k, 4):
            for q in range(4):
                for p in range(4):
                    shares[4 * q + p] = factor[(i + p) * STRIDE + k + q]
            _subtract_tile(out, factor, i, shares, k, size)
        for q in range(4):
            for p in range(q):
                share = factor[(k + p) * STRIDE + k + q]
                for j in range(k + q, size):
                    out[q * STRIDE + j] -= share * factor[(k + p) * STRIDE + j]
            pivot = out[q * STRIDE + k + q]
            if not pivot > 0.0 or not pivot < np.inf:
                return False
            root = 1.0 / np.sqrt(pivot)
            for j in range(k, k + q):
                factor[(k + q) * STRIDE + j] = 0.0
            for j in range(k + q, size):
                factor[(k + q) * STRIDE + j] = out[q * STRIDE + j] * root
    return True


@_compiled
def _invert_factor(factor: Array, rows: Array, out: Array, shares: Array, size: int) -> None:
    """Invert the factor, X = U⁻¹, from the last four rows up; ``rows`` is X."""
    for k in range(size - 4, -1, -4):
        for q in range(4):
            for j in range(k, size):
                out[q * STRIDE + j] = 0.0
            out[q * STRIDE + k + q] = 1.0
        for i in range(k + 4, size, 4):
            for q in range(4):
                for p in range(4):
                    shares[4 * q + p] = factor[(k + q) * STRIDE + i + p]
            _subtract_tile(out, rows, i, shares, i, size)
        for q in range(3, -1, -1):
            for p in range(q + 1, 4):
                share = factor[(k + q) * STRIDE + k + p]
                for j in range(k, size):
                    out[q * STRIDE + j] -= share * rows[(k + p) * STRIDE + j]
            root = 1.0 / factor[(k + q) * STRIDE + k + q]
            for j in range(k, size):
                rows[(k + q) * STRIDE + j] = out[q * STRIDE + j] * root


@_compiled
def _product(rows: Array, turned: Array, inverse: Array, out: Array, shares: Array, size: int) -> None:
    """Multiply F⁻¹ = X Xᵀ, four rows at a time; ``turned`` is memory for Xᵀ."""
    left = len(inverse)
    for i in range(size):
        for j in range(i):
            turned[j * STRIDE + i] = 0.0
        for j in range(i, size):
            turned[j * STRIDE + i] = rows[i * STRIDE + j]
    for i in range(0, size, 4):
        for q in range(4):
            for j in range(i + 4):
                out[q * STRIDE + j] = 0.0
        for k in range(i, size, 4):
            for q in range(4):
                for p in range(4):
                    shares[4 * q + p] = -rows[(i + q) * STRIDE + k + p] if k + p >= i + q else 0.0
            _subtract_tile(out, turned, k, shares, 0, i + 4)
        for q in range(min(4, left - i)):
            for j in range(i + q + 1):
                inverse[i + q, j] = out[q * STRIDE + j]
                inverse[j, i + q] = out[q * STRIDE + j]


@_compiled
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
    """Compute (scale·sums + damp·I)⁻¹ for some positions of each block.

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
    half = first.shape[1]
    size = (left + 3) // 4 * 4
    factor, rows, turned = np.empty(size * STRIDE), np.empty(size * STRIDE), np.empty(size * STRIDE)
    out, shares = np.empty(4 * STRIDE), np.empty(16)
    for block in range(blocks):
        for k in range(size):
            here = k * STRIDE
            for j in range(k, size):
                factor[here + j] = 0.0
            factor[here + k] = damp
            if k < left and alive[block, k]:
                slot = slots[block, k]
                row = first[block, slot] if slot < half else last[block, slot - half]
                shift = 0 if slot < half else half
                for j in range(k, left):
                    if alive[block, j]:
                        factor[here + j] += scale * row[slots[block, j] - shift]
        sound[block] = _factorise(factor, out, shares, size)
        if sound[block]:
            _invert_factor(factor, rows, out, shares, size)
            _product(rows, turned, inverse[block], out, shares, size)


@_compiled
def eliminate(
    weights: Array,
    inverse: Array,
    left: Array,
    before: Array,
    offsets: Array,
    widths: Array,
    strides: Array,
    first: int,
    order: Array,
    losses: Array,
    coefficients: Array,
    columns: Array,
    slots: Array,
) -> None:
    """Pivoted Cholesky of each block's inverse by the OBS rule (see :mod:`pruners.elimination.obs`).

    An eliminated weight changes places with the last one that is left, so that every loop runs over
    neighbouring numbers.

    Args:
        weights: (n, r).
        inverse: (n, r, r).
        left: (n,), how many of the r weights are alive; they are the first ones.
        before: (n,), loss of each block before the first step.
        offsets: (steps,), where the panel of a step begins in ``columns`` for block 0.
        widths: (steps,), length of the columns of a step's panel.
        strides: (steps,), distance in ``columns`` from one block's panel to that of the next.
        first: number of the first of these blocks, among those that ``columns`` is for.
        order: (n, steps), is written: positions of the eliminated weights.
        losses: (n, steps), is written: cumulative losses.
        coefficients: (n, steps), is written: y of each step.
        columns: flat, is written: for each panel (n, width, steps of the panel) numbers v.
        slots: (n, r), is written: the positions that the numbers of a column belong to.
    """
    blocks, size = weights.shape
    steps = len(offsets)
    tiny = np.finfo(np.float64).tiny
    v = np.empty((steps, size))
    shares = np.empty(size)
    column = np.empty(size)
    positions = np.empty(size, np.int64)
    diagonal = np.empty(size)
    w = np.empty(size)
    score = np.empty(size)
    for block in range(blocks):
        count = left[block]
        for j in range(size):
            positions[j] = j
            diagonal[j] = max(inverse[block, j, j], tiny)
            w[j] = weights[block, j]
        loss = before[block]
        taken = min(steps, count)
        for step in range(taken):
            for j in range(count):
                score[j] = w[j] * w[j] / diagonal[j]
            pivot = 0
            for j in range(1, count):
                if score[j] < score[pivot]:
                    pivot = j
            row = inverse[block, positions[pivot]]
            for j in range(count):
                column[j] = row[positions[j]]
            for i in range(step):
                shares[i] = v[i, pivot]
            _subtract_rows(column, v, shares, step, count)
            root = 1.0 / np.sqrt(max(diagonal[pivot], tiny))
            y = w[pivot] * root
            new = v[step]
            for j in range(count):
                new[j] = column[j] * root
                w[j] -= y * new[j]
                diagonal[j] = max(diagonal[j] - new[j] * new[j], tiny)
            loss += 0.5 * y * y
            order[block, step] = positions[pivot]
            losses[block, step] = loss
            coefficients[block, step] = y
            count -= 1
            positions[pivot], positions[count] = positions[count], positions[pivot]
            diagonal[pivot] = diagonal[count]
            w[pivot] = w[count]
            for i in range(step + 1):
                v[i, pivot], v[i, count] = v[i, count], v[i, pivot]
        step = 0
        while step < steps:  # numbers of a panel's steps side by side, as `apply_steps` reads them
            panel = strides[step] // widths[step]
            here = offsets[step] + (first + block) * strides[step]
            for j in range(widths[step]):
                known = min(max(min(taken, left[block] - j) - step, 0), panel)
                for i in range(known):
                    columns[here + i] = v[step + i, j]
                for i in range(known, panel):
                    columns[here + i] = 0.0
                here += panel
            step += panel
        for j in range(size):
            slots[block, j] = positions[j]


@_compiled
def apply_steps(
    weights: Array, done: Array, widths: Array, coefficients: Array, columns: Array, slots: Array
) -> None:
    """``weights[slots] −= Σ y_i·v_i`` over the first ``done`` steps of each block.

    Args:
        weights: (n, B) float32, changed in place.
        done: (n,), number of steps to apply.
        widths: (n,), how many numbers of each column matter, from the first on.
        coefficients: (n, steps), y.
        columns: (n, r, steps), v.
        slots: (n, r), the positions in the block that the numbers of a column belong to.
    """
    for block in range(len(columns)):
        y, count = coefficients[block], done[block]
        for j in range(widths[block]):
            numbers = columns[block, j]
            moved = np.float32(0.0)
            for i in range(count):
                moved += y[i] * numbers[i]
            weights[block, slots[block, j]] -= moved
