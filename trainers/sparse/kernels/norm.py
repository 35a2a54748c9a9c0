"""LayerNorm on a tile: mean and variance of each token over its features."""

from __future__ import annotations

from trainers.sparse.kernels.builder import Code
from trainers.sparse.kernels.tile import Tile

X, Y, FEATURES, SCALE, SHIFT, EPSILON = 0, 3, *range(6, 10)
ARGUMENTS = 10


def layer_norm(name: str, lanes: int, width: int) -> Code:
    """Write the kernel ``y = (x − mean) / sqrt(variance + ε) · scale + shift``.

    Mean and variance are over the features of each token; the variance is computed in a second pass.

    Args:
        name: of the function.
        lanes: float32 numbers in a vector.
        width: vectors of tokens in a tile.

    Returns:
        The kernel.
    """
    code = Code(name, lanes)
    tile = Tile(code, width)
    x, y, features = tile.address(X), tile.address(Y), tile.number(FEATURES)
    scale, shift, zero = tile.pointer(SCALE), tile.pointer(SHIFT), code.splat(0.0)
    share = code.splat(code.real(1.0) / code.convert("sitofp", features, "float"))
    sums = [code.variable(zero) for _ in tile.offsets]
    with code.loop(features) as k:
        for total, value in zip(sums, tile.loads(code.at(x, k * tile.row_bytes)), strict=True):
            total.set(total.get() + value)
    means = [total.get() * share for total in sums]
    squares = [code.variable(zero) for _ in tile.offsets]
    with code.loop(features) as k:
        loaded = tile.loads(code.at(x, k * tile.row_bytes))
        for total, value, mean in zip(squares, loaded, means, strict=True):
            total.set(code.fma(value - mean, value - mean, total.get()))
    epsilon = code.splat(tile.real(EPSILON))
    factors = [code.splat(1.0) / code.sqrt(code.fma(total.get(), share, epsilon)) for total in squares]
    with code.loop(features) as k:
        loaded = tile.loads(code.at(x, k * tile.row_bytes))
        by = code.splat(code.load("float", scale, k * 4))
        more = code.splat(code.load("float", shift, k * 4))
        values = [
            code.fma((value - mean) * factor, by, more)
            for value, mean, factor in zip(loaded, means, factors, strict=True)
        ]
        tile.stores(values, code.at(y, k * tile.row_bytes))
    return code
