"""Weight matrices in the order in which the kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pruners.arithmetic import ceil_div
from trainers.sparse.kernels.linear import AHEAD

PANEL_BYTES = 24 * 1024  # of a tile's activations in a panel: with the rest they fit in a 32 KiB L1 cache
MOST_PANEL_BYTES = 4 * PANEL_BYTES  # for panels with few nonzeros; a part then comes from the L2 cache
ROW_NONZEROS = 20  # least nonzeros of a row in a panel; with fewer, its sums cost more than the cache saves
MOST_COLUMNS = 65536  # inputs in a panel, because column numbers have 16 bits


@dataclass(frozen=True)
class SparseWeights:
    """The nonzeros of a matrix ``[outputs, inputs]``, panel by panel of inputs.

    Within a panel the rows are sorted by how many nonzeros they have there, so that a loop over the
    nonzeros of a row runs equally often for many rows, and the processor foresees its end. Rows without any
    in a panel are left out, except in the first and last panel, where sums begin and end.

    Args:
        outputs, inputs: the matrix's size.
        panels: number of panels.
        groups: ``[groups, 4]`` int32: first input of the panel, nonzeros a row, rows, and in the
            first group of a panel its inputs, which are fetched then (else 0).
        segments: groups in the first panel, in those between, in the last. With one panel only the first
            counts.
        rows: int32, the output of each row visited, then ``AHEAD`` more that are only fetched ahead.
        columns: uint16, the input of each nonzero, counted from the panel's first.
        values: float32, the nonzeros.
    """

    outputs: int
    inputs: int
    panels: int
    groups: NDArray[np.int32]
    segments: tuple[int, int, int]
    rows: NDArray[np.int32]
    columns: NDArray[np.uint16]
    values: NDArray[np.float32]

    @property
    def bytes(self) -> int:
        return self.groups.nbytes + self.rows.nbytes + self.columns.nbytes + self.values.nbytes


def panel_inputs(width: int, lanes: int, density: float) -> int:
    """Inputs in a panel, for tiles of ``width`` vectors and a matrix with a share ``density`` of nonzeros."""
    row_bytes = 4 * lanes * width
    wanted = ROW_NONZEROS / max(density, 1e-6)
    return max(8, PANEL_BYTES // row_bytes, min(MOST_PANEL_BYTES // row_bytes, int(wanted)))


def pack_sparse(weight: NDArray[np.float32], panel: int) -> SparseWeights:
    """The nonzeros of a matrix, in panels of about ``panel`` inputs (evened out)."""
    outputs, inputs = weight.shape
    panels = max(1, ceil_div(inputs, min(panel, MOST_COLUMNS)))
    edges = [inputs * i // panels for i in range(panels + 1)]
    groups, rows, columns, values = [], [], [], []
    segments = [0, 0, 0]
    for number in range(panels):
        part = weight[:, edges[number] : edges[number + 1]]
        counts = np.count_nonzero(part, axis=1)
        order = np.argsort(counts, kind="stable")
        if 0 < number < panels - 1:
            order = order[counts[order] > 0]
        kinds, sizes = np.unique(counts[order], return_counts=True)
        width = edges[number + 1] - edges[number]
        groups += [
            (edges[number], count, size, width * (index == 0))
            for index, (count, size) in enumerate(zip(kinds, sizes, strict=True))
        ]
        segments[0 if number == 0 else 2 if number == panels - 1 else 1] += len(kinds)
        where = np.nonzero(part[order])
        rows.append(order)
        columns.append(where[1])
        values.append(part[order][where])
    return SparseWeights(
        outputs,
        inputs,
        panels,
        np.array(groups, dtype=np.int32).reshape(-1, 4),
        (segments[0], segments[1], segments[2]),
        np.concatenate([*rows, np.zeros(AHEAD, dtype=np.int64)]).astype(np.int32),
        np.concatenate(columns).astype(np.uint16),
        np.concatenate(values).astype(np.float32),
    )


def pack_dense(weight: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """``[outputs, inputs]`` in blocks of ``block`` outputs, ``[block][input][output in block]``; the
    outputs that fill no block follow one by one."""
    outputs, inputs = weight.shape
    whole = outputs // block * block
    blocks = weight[:whole].reshape(-1, block, inputs).transpose(0, 2, 1)
    return np.ascontiguousarray(np.concatenate([blocks.ravel(), weight[whole:].ravel()]), dtype=np.float32)


@dataclass(frozen=True)
class BlockWeights:
    """An INT8 matrix with zeros in blocks of four inputs: for each output a step, and its blocks that are
    not zero.

    Args:
        outputs, inputs: the matrix's size; inputs is a multiple of four.
        groups: ``[groups, 4]`` int32: 0, blocks a row, rows, 0.
        rows: int32, the output of each row visited.
        columns: uint16, the block of inputs of each block.
        blocks: int8 ``[blocks, 4]``.
        steps, sums: float32 ``[outputs]``: a weight is its step times its int8; the sum of an output's int8.
    """

    outputs: int
    inputs: int
    groups: NDArray[np.int32]
    rows: NDArray[np.int32]
    columns: NDArray[np.uint16]
    blocks: NDArray[np.int8]
    steps: NDArray[np.float32]
    sums: NDArray[np.float32]

    @property
    def bytes(self) -> int:
        arrays = (self.groups, self.rows, self.columns, self.blocks, self.steps, self.sums)
        return sum(array.nbytes for array in arrays)


def to_int8(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """A matrix ``[outputs, inputs]`` as int8, symmetric, and each output's step (its largest weight /
    127)."""
    steps = np.maximum(np.abs(weight).max(axis=1), 1e-30).astype(np.float32) / np.float32(127)
    return np.rint(weight / steps[:, None]).astype(np.int8), steps


def pack_blocks(whole: NDArray[np.int8], steps: NDArray[np.float32]) -> BlockWeights:
    """The blocks of an int8 matrix ``[outputs, inputs]`` that hold anything but zeros.

    Raises:
        ValueError: a number of inputs that four does not divide.
    """
    outputs, inputs = whole.shape
    if inputs % 4:
        raise ValueError(f"{inputs} inputs: blocks of 1 × 4 need a multiple of four")
    blocks = whole.reshape(outputs, inputs // 4, 4)
    used: NDArray[np.bool_] = np.asarray(blocks.any(axis=2))
    counts = used.sum(axis=1)
    order = np.argsort(counts, kind="stable")
    kinds, sizes = np.unique(counts, return_counts=True)
    where = np.nonzero(used[order])
    return BlockWeights(
        outputs,
        inputs,
        np.array([(0, count, size, 0) for count, size in zip(kinds, sizes, strict=True)], dtype=np.int32),
        order.astype(np.int32),
        where[1].astype(np.uint16),
        np.ascontiguousarray(blocks[order][where]),
        steps,
        whole.sum(axis=1, dtype=np.int64).astype(np.float32),
    )
