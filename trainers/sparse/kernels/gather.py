"""Kernels that fill or read out a tile: gather numbers (pixels, tokens to merge), copy, write rows."""

from __future__ import annotations

from trainers.sparse.kernels.builder import Code, Value
from trainers.sparse.kernels.tile import Tile

# INDEX is int32 [groups or 1][lanes of all tiles], bytes from SOURCE + the group's offset to a token's first
# feature, -1 for zeros; STRIDES int32 of the same shape, bytes to its next feature; INDEX_STEP bytes from one
# group's to the next's; OFFSETS int64, one a group
SOURCE, Y, GROUPS, FEATURES, OFFSETS, INDEX, STRIDES, INDEX_STEP = 0, 3, *range(6, 12)
# arguments of a copy: the source repeats every VECTORS vectors
X, VECTORS = 0, 6
COPIED = 7
# arguments of rows: a tile at X; TARGET has rows of WRITTEN features; the first TOKENS tokens are written
TARGET, WRITTEN, TOKENS = 3, 6, 7


def gather(name: str, lanes: int, width: int) -> Code:
    """Write the kernel that gathers groups of FEATURES features; each token has its own address."""
    code = Code(name, lanes)
    tile = Tile(code, width)
    y, features = code.variable(tile.address(Y)), tile.number(FEATURES)
    offsets = tile.pointer(OFFSETS)
    first = tile.vector * code.vector_bytes
    index, strides = (code.variable(code.at(tile.pointer(i), first)) for i in (INDEX, STRIDES))
    zero = Value(code, code.integers, "zeroinitializer")
    with code.loop(tile.number(GROUPS)) as group:
        source = code.at(tile.pointer(SOURCE), code.load("i64", code.at(offsets, group * 8)))
        at = [code.variable(code.load("integers", index.get(), offset)) for offset in tile.offsets]
        steps = [code.load("integers", strides.get(), offset) for offset in tile.offsets]
        inside = [code.compare("sge", each.get(), zero) for each in at]
        with code.loop(features):
            values = [code.gathered(source, each.get(), mask) for each, mask in zip(at, inside, strict=True)]
            tile.stores(values, y.get())
            for each, step in zip(at, steps, strict=True):
                each.set(each.get() + step)
            y.set(code.at(y.get(), tile.row_bytes))
        for each in (index, strides):
            each.set(code.at(each.get(), tile.number(INDEX_STEP)))
    return code


def copy(name: str, lanes: int, width: int) -> Code:
    """Write the kernel that copies COPIED features of a tile from a buffer of VECTORS vectors, repeated."""
    code = Code(name, lanes)
    tile = Tile(code, width)
    vectors = tile.number(VECTORS)
    x, y = tile.address(X, tile.vector - tile.vector / vectors * vectors), tile.address(Y)
    with code.loop(tile.number(COPIED)) as k:
        tile.stores(tile.loads(code.at(x, k * tile.row_bytes)), code.at(y, k * tile.row_bytes))
    return code


def rows(name: str, lanes: int, width: int) -> Code:
    """Write the kernel that writes the tokens of a tile as rows of an array ``[tokens, features]``."""
    code = Code(name, lanes)
    tile = Tile(code, width)
    features = tile.number(WRITTEN)
    first = tile.vector * lanes
    left = tile.number(TOKENS) - first
    x, target = tile.address(X), code.at(tile.pointer(TARGET), first * features * 4)
    whole = features / lanes * lanes
    # squares of lanes × lanes numbers: what is stored is whole lines of memory
    with code.loop(whole, step=lanes) as k:
        square = code.at(x, k * tile.row_bytes)
        for v, offset in enumerate(tile.offsets):
            loaded = [code.load("vector", square, r * tile.row_bytes + offset) for r in range(lanes)]
            for lane, value in enumerate(code.transpose(loaded)):
                token = v * lanes + lane
                with code.when(code.compare("sgt", left, code.whole(token))):
                    code.store(value, code.at(target, (features * token + k) * 4), align=4)
    steps = code.splat(code.convert("trunc", features * 4, "i32"))
    offsets = [code.lane_numbers(v * lanes) * steps for v in range(width)]
    masks = [code.first_lanes(left, v * lanes) for v in range(width)]
    with code.loop(features, start=whole) as k:
        values = tile.loads(code.at(x, k * tile.row_bytes))
        for value, lane_offsets, mask in zip(values, offsets, masks, strict=True):
            code.scatter(value, code.at(target, k * 4), lane_offsets, mask)
    return code
