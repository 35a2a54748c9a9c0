"""Linear layers on tiles: the product with a sparse or a dense matrix, bias, GELU or residual in one pass.

Called as :mod:`~trainers.sparse.kernels.tile` says, with the arguments named below.
"""

from __future__ import annotations

from typing import Literal

from trainers.sparse.kernels import host
from trainers.sparse.kernels.builder import Code, Value, Variable
from trainers.sparse.kernels.tile import Tile
from trainers.sparse.kernels.vector_math import gelu

# arguments: the positions of two buffers (input, output), then addresses and sizes
X, Y, INPUTS, OUTPUTS, BIAS, GROUPS, FIRST, MIDDLE, LAST, ROWS, COLUMNS, VALUES = 0, 3, *range(6, 16)
ARGUMENTS = 16

AHEAD = 8  # number of outputs by which prefetching is ahead of computing

End = Literal["none", "gelu"]
Start = Literal["bias", "residual", "sum"]
UNROLLED = 2  # nonzeros in a turn of the inner loop
DENSE_BLOCK = (host.registers() - 5) // 4
"""Outputs that the dense kernel computes at a time: four vectors each, with registers left for four vectors
of inputs and a weight."""


def _begin(tile: Tile, start: Start, y: Value, bias: Value) -> list[Variable]:
    """Variables for the sums of one output, with their first values."""
    code = tile.code
    if start == "sum":
        return [code.variable(value) for value in tile.loads(y)]
    first = code.splat(code.load("float", bias))
    if start == "bias":
        return [code.variable(first) for _ in tile.offsets]
    return [code.variable(value + first) for value in tile.loads(y)]


def _end(tile: Tile, end: End, sums: list[Variable], y: Value) -> None:
    values = [total.get() for total in sums]
    tile.stores([gelu(tile.code, value) for value in values] if end == "gelu" else values, y)


def _nonzero(
    tile: Tile, panel: Value, column: Variable, value: Variable, *, sums: list[Variable], number: int
) -> None:
    """Add the products of one weight: one broadcast, and a multiplication for each vector of the tile."""
    code = tile.code
    index = code.convert("zext", code.load("i16", column.get(), 2 * number), "i64")
    x = code.at(panel, index * tile.row_bytes)
    weight = code.splat(code.load("float", value.get(), 4 * number))
    for total, offset in zip(sums, tile.offsets, strict=True):
        total.set(code.fma(weight, code.load("vector", x, offset), total.get()))


def _fetch(code: Code, start: Value, size: Value) -> None:
    """Prefetch some bytes of memory."""
    with code.loop(size, step=64) as offset:
        code.prefetch(start, offset)


def _fetch_output(tile: Tile, row: Variable, y: Value) -> None:
    """Prefetch the output that is computed ``AHEAD`` turns later."""
    code = tile.code
    later = code.convert("zext", code.load("i32", row.get(), 4 * AHEAD), "i64")
    for line in range(0, tile.row_bytes, 64):
        code.prefetch(code.at(y, later * tile.row_bytes), line, write=True)


def sparse_linear(
    name: str,
    lanes: int,
    width: int,
    *,
    residual: bool = False,
    end: End = "none",
    unrolled: int = UNROLLED,
) -> Code:
    """Write the kernel ``y = W x + bias`` that multiplies the nonzero weights only.

    The products of zero weights are not computed: an input of infinity or NaN changes only the outputs that
    have a nonzero weight for it, whereas a dense product gives NaN for ``0 · inf``.

    Args:
        name: of the function.
        lanes: float32 numbers in a vector.
        width: vectors of tokens in a tile.
        residual: add to ``y``: ``y += W x + bias``.
        end: applied to the sums: ``none`` or ``gelu``.
        unrolled: nonzeros in a turn of the inner loop.

    Returns:
        The kernel, for weights in the order of :func:`trainers.sparse.weights.pack_sparse`.
    """
    code = Code(name, lanes)
    tile = Tile(code, width)
    group = code.variable(tile.pointer(GROUPS))
    row, column, value = (code.variable(tile.pointer(i)) for i in (ROWS, COLUMNS, VALUES))
    start_x, start_y = tile.address(X), tile.address(Y)
    following = code.variable(start_x)
    begin: Start = "residual" if residual else "bias"
    only = code.compare("slt", tile.number(LAST), code.whole(0))
    several = code.compare("sge", tile.number(LAST), code.whole(0))

    def advance(nonzeros: int) -> None:
        column.set(code.at(column.get(), 2 * nonzeros))
        value.set(code.at(value.get(), 4 * nonzeros))

    def segment(count: Value, start: Start, last: End) -> None:
        bias = tile.pointer(BIAS)
        with code.loop(count):
            first, each, rows = (
                code.convert("zext", code.load("i32", group.get(), 4 * i), "i64") for i in range(3)
            )
            panel = code.at(start_x, first * tile.row_bytes)
            inputs = code.convert("zext", code.load("i32", group.get(), 12), "i64")
            panel_bytes = inputs * tile.row_bytes
            with code.when(code.compare("sgt", inputs, code.whole(0))):
                following.set(code.at(panel, panel_bytes))
            if start != "sum":
                _fetch(code, panel, panel_bytes)
            whole = each / unrolled
            left = each - whole * unrolled
            with code.loop(rows):
                output = code.convert("zext", code.load("i32", row.get()), "i64")
                y = code.at(start_y, output * tile.row_bytes)
                if start != "sum":
                    _fetch_output(tile, row, start_y)
                sums = _begin(tile, start, y, code.at(bias, output * 4))
                with code.loop(whole):
                    for number in range(unrolled):
                        _nonzero(tile, panel, column, value, sums=sums, number=number)
                    advance(unrolled)
                with code.loop(left):
                    _nonzero(tile, panel, column, value, sums=sums, number=0)
                    advance(1)
                _end(tile, last, sums, y)
                row.set(code.at(row.get(), 4))
                for line in range(0, 128, 64):  # prefetch the next panel, or the next tile, which follows it
                    code.prefetch(following.get(), line)
                following.set(code.at(following.get(), 128))
            group.set(code.at(group.get(), 16))

    with code.when(only):
        segment(tile.number(FIRST), begin, end)
    with code.when(several):
        segment(tile.number(FIRST), begin, "none")
        segment(tile.number(MIDDLE), "sum", "none")
        segment(tile.number(LAST), "sum", end)
    return code


def dense_linear(name: str, lanes: int, width: int, *, residual: bool = False, end: End = "none") -> Code:
    """Write the kernel ``y = W x + bias`` that multiplies all weights.

    Args:
        name: of the function.
        lanes: float32 numbers in a vector.
        width: vectors of tokens in a tile.
        residual: add to ``y``: ``y += W x + bias``.
        end: applied to the sums: ``none`` or ``gelu``.

    Returns:
        The kernel, for weights in the order of :func:`trainers.sparse.weights.pack_dense`, in blocks of
        :data:`DENSE_BLOCK` outputs.
    """
    code = Code(name, lanes)
    tile = Tile(code, width)
    start_x, start_y = tile.address(X), tile.address(Y)
    begin: Start = "residual" if residual else "bias"
    weight = code.variable(tile.pointer(VALUES))
    bias, inputs, outputs = tile.pointer(BIAS), tile.number(INPUTS), tile.number(OUTPUTS)

    def block(output: Value, size: int) -> None:
        y = code.at(start_y, output * tile.row_bytes)
        at = [(code.at(y, r * tile.row_bytes), code.at(bias, output * 4 + 4 * r)) for r in range(size)]
        sums = [_begin(tile, begin, *addresses) for addresses in at]
        with code.loop(inputs) as k:
            x = code.at(start_x, k * tile.row_bytes)
            loaded = tile.loads(x)
            for r in range(size):
                w = code.splat(code.load("float", weight.get(), 4 * r))
                for v in range(width):
                    sums[r][v].set(code.fma(w, loaded[v], sums[r][v].get()))
            weight.set(code.at(weight.get(), 4 * size))
        for r in range(size):
            _end(tile, end, sums[r], at[r][0])

    size = DENSE_BLOCK
    whole = outputs / size * size
    with code.loop(whole, step=size) as output:
        block(output, size)
    with code.loop(outputs, start=whole) as output:
        block(output, 1)
    return code
