"""Linear layers in INT8 with zeros in blocks of 1 × 4: quantize the inputs of a tile token by token, and
multiply.

The quantized tile holds four inputs in each 32-bit number, ``[inputs / 4][token][4]`` unsigned bytes, and
after them two rows of float32: each token's step and its zero point. One instruction (AVX-512 VNNI)
multiplies the four bytes of 16 tokens with a block of four weights and adds the products to 32-bit sums.
"""

from __future__ import annotations

from trainers.sparse.kernels.builder import Code, Value
from trainers.sparse.kernels.linear import End
from trainers.sparse.kernels.tile import Tile
from trainers.sparse.kernels.vector_math import gelu

BLOCK = 4
EXTRA_ROWS = 2  # after a tile's quantized inputs: steps, zero points

# arguments of the quantization
X, Y, INPUTS = 0, 3, 6
# arguments of the product: the positions of two buffers, then addresses and sizes
QUANTIZED, OUTPUT, INPUT_BLOCKS, OUTPUTS, BIAS, GROUPS, COUNT, ROWS, COLUMNS, BLOCKS, STEPS, SUMS = (
    0,
    3,
    *range(6, 16),
)
HIGHEST = 255.0


def quantize(name: str, lanes: int, width: int) -> Code:
    """Write the kernel that quantizes a tile of float32 to unsigned bytes: ``x ≈ step · (q − zero)``.

    Each token has its own step and zero point: 0 is exact, and the token's smallest and largest value are the
    ends of the range.

    Args:
        name: of the function. Its argument INPUTS is a multiple of four.
        lanes: float32 numbers in a vector.
        width: vectors of tokens in a tile.

    Returns:
        The kernel.
    """
    code = Code(name, lanes)
    tile = Tile(code, width)
    x, y, inputs = tile.address(X), tile.address(Y), tile.number(INPUTS)
    lowest, highest = ([code.variable(code.splat(0.0)) for _ in tile.offsets] for _ in range(2))
    with code.loop(inputs) as k:
        for low, high, value in zip(lowest, highest, tile.loads(code.at(x, k * tile.row_bytes)), strict=True):
            low.set(code.select(code.compare("olt", value, low.get()), value, low.get()))
            high.set(code.larger(value, high.get()))
    blocks, steps, zeros, inverses = inputs / BLOCK, [], [], []
    for low, high in zip(lowest, highest, strict=True):
        step = (high.get() - low.get()) * (1 / HIGHEST)
        step = code.larger(step, code.splat(1e-30))
        inverses.append(code.splat(1.0) / step)
        zeros.append(code.nearest((code.splat(0.0) - low.get()) * inverses[-1]))
        steps.append(step)
    after = code.at(y, blocks * tile.row_bytes)
    tile.stores(steps, after)
    tile.stores(zeros, code.at(after, tile.row_bytes))
    with code.loop(blocks) as block:
        rows = code.at(x, block * (BLOCK * tile.row_bytes))
        packed: list[Value] = []
        for number in range(BLOCK):
            loaded = tile.loads(code.at(rows, number * tile.row_bytes))
            for v, value in enumerate(loaded):
                whole = code.nearest(code.fma(value, inverses[v], zeros[v]))
                whole = code.select(
                    code.compare("olt", whole, code.splat(HIGHEST)), whole, code.splat(HIGHEST)
                )
                whole = code.larger(whole, code.splat(0.0))
                bits = code.shift_left(code.convert("fptosi", whole, "integers"), 8 * number)
                if number:
                    packed[v] = packed[v] + bits
                else:
                    packed.append(bits)
        tile.stores(packed, code.at(y, block * tile.row_bytes))
    return code


def _dot(code: Code, total: Value, unsigned: Value, signed: Value) -> Value:
    return code.call(code.integers, "llvm.x86.avx512.vpdpbusd.512", total, unsigned, signed)


def sparse_int8(name: str, lanes: int, width: int, *, residual: bool = False, end: End = "none") -> Code:
    """Write the kernel ``y = step · weight step · (W q − zero · row's sum) + bias`` for W in blocks of 1 × 4.

    The outputs are in groups with equally many blocks. The argument COLUMNS is the input block of each
    block of weights, SUMS the sum of each output's weights (:class:`trainers.sparse.weights.BlockWeights`).

    Args:
        name: of the function.
        lanes: float32 numbers in a vector, 16.
        width: vectors of tokens in a tile.
        residual: add to ``y``.
        end: applied to the sums: ``none`` or ``gelu``.

    Returns:
        The kernel.

    Raises:
        ValueError: another number of lanes, that is, a processor without AVX-512 VNNI.
    """
    if lanes != 16:
        raise ValueError("INT8 needs a processor with AVX-512 VNNI")
    code = Code(name, lanes)
    tile = Tile(code, width)
    group = code.variable(tile.pointer(GROUPS))
    row, column, value = (code.variable(tile.pointer(i)) for i in (ROWS, COLUMNS, BLOCKS))
    x, y = tile.address(QUANTIZED), tile.address(OUTPUT)
    bias, weight_steps, weight_sums = (tile.pointer(i) for i in (BIAS, STEPS, SUMS))
    after = code.at(x, tile.number(INPUT_BLOCKS) * tile.row_bytes)
    none = Value(code, code.integers, "zeroinitializer")
    with code.loop(tile.number(COUNT)):
        each, rows = (code.convert("zext", code.load("i32", group.get(), 4 * i), "i64") for i in (1, 2))
        with code.loop(rows):
            output = code.convert("zext", code.load("i32", row.get()), "i64")
            sums = [code.variable(none) for _ in tile.offsets]
            with code.loop(each) as index:
                at = code.convert("zext", code.load("i16", column.get(), index * 2), "i64")
                block = code.splat(code.load("i32", value.get(), index * 4))
                for total, offset in zip(sums, tile.offsets, strict=True):
                    loaded = code.load("integers", code.at(x, at * tile.row_bytes), offset)
                    total.set(_dot(code, total.get(), loaded, block))
            row.set(code.at(row.get(), 4))
            column.set(code.at(column.get(), each * 2))
            value.set(code.at(value.get(), each * 4))
            pointer = code.at(y, output * tile.row_bytes)
            by, total_weight, more = (
                code.splat(code.load("float", start, output * 4))
                for start in (weight_steps, weight_sums, bias)
            )
            values = []
            zeros = tile.loads(code.at(after, tile.row_bytes))
            for total, step, zero in zip(sums, tile.loads(after), zeros, strict=True):
                real = code.convert("sitofp", total.get(), "vector") - zero * total_weight
                values.append(code.fma(real * by, step, more))
            if residual:
                values = [value + old for value, old in zip(values, tile.loads(pointer), strict=True)]
            tile.stores([gelu(code, value) for value in values] if end == "gelu" else values, pointer)
        group.set(code.at(group.get(), 16))
    return code
