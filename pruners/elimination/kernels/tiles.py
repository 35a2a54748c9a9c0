"""Matrix products of the compiled loops: tiles of a matrix that stay in a core's registers.

One tile of C −= AᵀB has several rows, and several vectors of columns. Its numbers are loaded once and stored
once, with all products of the sum in between, as in BLAS (Goto and van de Geijn, "Anatomy of high-performance
matrix multiplication", 2008). BLAS itself is not called on single blocks by several threads: it has its own
threads and locks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

Array = np.ndarray[Any, Any]

# The compiler may reorder sums; NaN and infinity keep their meaning.
_Function = TypeVar("_Function", bound=Callable[..., Any])
compiled = cast(
    Callable[[_Function], _Function],
    njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "nsz", "reassoc"}),
)

PANEL = 16
"""Number of steps after which the rest of a matrix is brought up to date by one product."""
# as many sums as the registers hold: 32 of 512 bits, or 16 of 256
ROWS, _VECTORS, _LANES = (8, 2, 8) if binding.get_host_cpu_features().get("avx512f") else (4, 3, 4)
COLUMNS = _VECTORS * _LANES
"""Columns of a tile, which has ROWS rows; of one in float32 twice as many."""


@compiled
def work_shape(size: int) -> tuple[int, int]:
    """The shape of a work matrix for (size, size) numbers: whole tiles, and rows that share no cache set."""
    return (size + ROWS - 1) // ROWS * ROWS, (size + COLUMNS - 1) // COLUMNS * COLUMNS + 8


def _tile(number: ir.Type, lanes: int, *, subtracts: bool) -> Callable[..., None]:
    """A function for compiled loops: a tile of products added to, or subtracted from, what is in memory.

    It takes (out, out_at, out_stride, left, left_at, left_stride, right, right_at, right_stride, depth) and
    computes ``out[i, j] ±= Σ_{p<depth} left[p, i]·right[p, j]``; each matrix is given by its array, the index
    of its first number in memory, and the distance of two rows.

    Args:
        number: the type of the numbers, LLVM's.
        lanes: numbers in a vector.
        subtracts: whether the products are subtracted.
    """
    vector, size = ir.VectorType(number, lanes), 8 if isinstance(number, ir.DoubleType) else 4

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        arrays = [context.make_array(signature.args[at])(context, builder, values[at]) for at in (0, 3, 6)]
        index = values[1].type
        multiply_add = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call]
            builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{lanes}f{8 * size}"
        )

        def pointer(array: Any, at: Any) -> Any:
            return builder.gep(array.data, [at])

        def load(address: Any) -> Any:
            loaded = builder.load(builder.bitcast(address, vector.as_pointer()))
            loaded.align = size
            return loaded

        def spread(scalar: Any) -> Any:
            undefined = ir.Constant(vector, ir.Undefined)
            first = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
            zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
            return builder.shuffle_vector(first, undefined, zeros)

        tile = [(row, vector_of_row) for row in range(ROWS) for vector_of_row in range(_VECTORS)]
        addresses = {}
        for row, part in tile:
            begin = builder.add(values[1], builder.mul(values[2], index(row)))
            addresses[row, part] = pointer(arrays[0], builder.add(begin, index(part * lanes)))
        before = {at: load(address) for at, address in addresses.items()}
        entry = builder.block
        loop, end = (builder.append_basic_block(name) for name in ("products", "end"))
        builder.branch(loop)
        builder.position_at_end(loop)
        step, left_at, right_at = (builder.phi(index) for _ in range(3))
        for value, start in ((step, index(0)), (left_at, values[4]), (right_at, values[7])):
            value.add_incoming(start, entry)
        sums = {at: builder.phi(vector) for at in tile}
        for at, value in sums.items():
            value.add_incoming(before[at], entry)
        rights = [
            load(pointer(arrays[2], builder.add(right_at, index(part * lanes)))) for part in range(_VECTORS)
        ]
        after = {}
        for row in range(ROWS):
            factor = builder.load(pointer(arrays[1], builder.add(left_at, index(row))))
            factors = spread(builder.fneg(factor) if subtracts else factor)
            for part in range(_VECTORS):
                after[row, part] = builder.call(multiply_add, [factors, rights[part], sums[row, part]])
                sums[row, part].add_incoming(after[row, part], loop)
        following = builder.add(step, index(1))
        step.add_incoming(following, loop)
        left_at.add_incoming(builder.add(left_at, values[5]), loop)
        right_at.add_incoming(builder.add(right_at, values[8]), loop)
        builder.cbranch(builder.icmp_signed("<", following, values[9]), loop, end)
        builder.position_at_end(end)
        for at, address in addresses.items():
            stored = builder.store(after[at], builder.bitcast(address, vector.as_pointer()))
            stored.align = size
        return context.get_dummy_value()

    @intrinsic
    def tile_of_products(
        typing: Any,
        out: Any,
        out_at: Any,
        out_stride: Any,
        left: Any,
        left_at: Any,
        left_stride: Any,
        right: Any,
        right_at: Any,
        right_stride: Any,
        depth: Any,
    ) -> Any:
        at = types.intp
        return types.void(out, at, at, left, at, at, right, at, at, at), generate

    return cast(Callable[..., None], tile_of_products)  # without the argument that is the compiler's


_subtract_tile = _tile(ir.DoubleType(), _LANES, subtracts=True)
_add_tile = _tile(ir.FloatType(), 2 * _LANES, subtracts=False)


@compiled
def subtract_lower(matrix: Array, rows: Array, first: int, begin: int, depth: int) -> None:
    """``matrix −= VᵀV`` in the lower triangle of ROWS rows.

    Args:
        matrix: a work matrix (:func:`work_shape`); above its diagonal are meaningless numbers afterwards.
        rows: V, the ``depth`` rows from row ``first`` on, of the matrix's width.
        first: see ``rows``.
        begin: the first of the rows that change, a multiple of ROWS.
        depth: number of products that are subtracted, at least 1.
    """
    stride, across = matrix.shape[1], rows.shape[1]
    out, left = begin * stride, first * across
    for j in range(0, begin + ROWS, COLUMNS):
        _subtract_tile(matrix, out + j, stride, rows, left + begin, across, rows, left + j, across, depth)


@compiled
def subtract_upper(matrix: Array, rows: Array, size: int, depth: int) -> None:
    """``matrix −= VᵀV`` in the upper triangle, with V the first ``depth`` rows of ``rows``."""
    stride, across = matrix.shape[1], rows.shape[1]
    for i in range(0, size, ROWS):
        for j in range(i // COLUMNS * COLUMNS, size, COLUMNS):
            _subtract_tile(matrix, i * stride + j, stride, rows, i, across, rows, j, across, depth)


@compiled
def subtract_product(out: Array, left: Array, right: Array, size: int, depth: int) -> None:
    """``out −= leftᵀ·right`` for ``depth`` rows of ``out`` and of the others, in ``size`` columns.

    Args:
        out: (depth, size or more), as wide as whole tiles; depth is a multiple of ROWS.
        left: (depth, depth).
        right: (depth, size or more), as wide as whole tiles.
        size: number of columns.
        depth: number of rows, and of products.
    """
    stride, across, wide = out.shape[1], right.shape[1], left.shape[1]
    for i in range(0, depth, ROWS):
        for j in range(0, size, COLUMNS):
            _subtract_tile(out, i * stride + j, stride, left, i, wide, right, j, across, depth)


@compiled
def add_squares(out: Array, rows: Array, begin: int, end: int, across: int) -> None:
    """``out += GᵀG`` for some rows of the symmetric product, in float32, from the diagonal on.

    Args:
        out: (end − begin, across − begin), rows ``begin`` to ``end`` of the product and its columns from
            ``begin`` on. What lies below the diagonal of the product is meaningless afterwards.
        rows: G, (k, B).
        begin: see ``out``.
        end: see ``out``; at least as many rows as a tile has, and columns.
        across: of the columns of G, as many are taken; B at most.
    """
    wide = 2 * COLUMNS
    stride, width, depth = out.shape[1], rows.shape[1], len(rows)
    tile = np.empty((ROWS, wide), np.float32)
    for j in range(begin, across, wide):  # its columns of G stay in the nearest cache
        for i in range(begin, min(j + wide, end), ROWS):
            if i + ROWS <= end and j + wide <= across:
                at = (i - begin) * stride + j - begin
                _add_tile(out, at, stride, rows, i, width, rows, j, width, depth)
                continue
            # the last tile ends with the matrix; what an earlier one has added is not added again
            row, column = min(i, end - ROWS), min(j, across - wide)
            tile[:] = 0.0
            _add_tile(tile, 0, wide, rows, row, width, rows, column, width, depth)
            for y in range(i - row, ROWS):
                for x in range(j - column, wide):
                    out[row + y - begin, column + x - begin] += tile[y, x]


@compiled
def mirror(square: Array, size: int) -> None:
    """Copy what is above the diagonal of the first ``size`` columns to below it."""
    for i in range(size):
        for j in range(i):
            square[i, j] = square[j, i]
