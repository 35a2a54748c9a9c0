"""Multi-head attention for the queries of one tile, over all keys of their image.

With ``Q``, ``K``, ``V`` feature by feature (rows) and tokens along vectors, both products are sums of a
scalar times a vector of queries: ``S[j] = Σ_d K[d, j] · Q[d]`` and ``O[d] = Σ_j V[d, j] · P[j]``. The scores
of one head and one tile of queries lie in the thread's scratch; keys beyond the last token are not visited.
"""

from __future__ import annotations

from collections.abc import Callable

from trainers.sparse.kernels.builder import Code, Value
from trainers.sparse.kernels.tile import Tile
from trainers.sparse.kernels.vector_math import exponential

# QKV holds queries, keys and values one after the other, heads × size features each; KEY_TILES is an int64
# array [tiles, 3] of an image's tiles: first vector, vectors, tokens
QKV, Y, SCORES, FEATURES, HEADS, HEAD_SIZE, SCALE, VECTORS, KEY_TILES, TILES = 0, 3, 6, *range(9, 16)
ARGUMENTS = 16


def attention(name: str, lanes: int, width: int) -> Code:  # noqa: PLR0915 (a program in one piece)
    """Write the kernel ``softmax(scale · Qᵀ K) V`` of each head, for the queries of a tile.

    Args:
        name: of the function. Its argument FEATURES is heads × size, VECTORS the vectors of an image.
        lanes: float32 numbers in a vector.
        width: vectors of queries in a tile.

    Returns:
        The kernel.
    """
    code = Code(name, lanes)
    tile = Tile(code, width)
    rows = 4 if width >= 4 else 8
    queries, output, scores = tile.address(QKV), tile.address(Y), tile.address(SCORES)
    features, heads, size = tile.number(FEATURES), tile.number(HEADS), tile.number(HEAD_SIZE)
    image = tile.vector / tile.number(VECTORS) * tile.number(VECTORS)
    table, tiles = tile.pointer(KEY_TILES), tile.number(TILES)
    scale = code.splat(tile.real(SCALE))

    def over_keys(visit: Callable[[Value, Value, Value, Value], None]) -> None:
        """Call ``visit(tile's begin, bytes of its row, its tokens, tokens before it)`` for each tile of
        keys."""
        before = code.variable(code.whole(0))
        with code.loop(tiles) as number:
            entry = code.at(table, number * 24)
            first, vectors, tokens = (code.load("i64", entry, 8 * i) for i in range(3))
            visit(tile.address(QKV, image + first), vectors * code.vector_bytes, tokens, before.get())
            before.set(before.get() + tokens)

    def score(head: Value, largest: list[Value]) -> None:
        query = code.at(queries, head * size * tile.row_bytes)
        best = [code.variable(value) for value in largest]

        def block(keys: Value, step: Value, key: Value, number: Value, count: int) -> None:
            sums = [[code.variable(code.splat(0.0)) for _ in tile.offsets] for _ in range(count)]
            pointer = code.variable(code.at(keys, key * 4))
            with code.loop(size) as d:
                loaded = tile.loads(code.at(query, d * tile.row_bytes))
                for r in range(count):
                    factor = code.splat(code.load("float", pointer.get(), 4 * r))
                    for total, value in zip(sums[r], loaded, strict=True):
                        total.set(code.fma(factor, value, total.get()))
                pointer.set(code.at(pointer.get(), step))
            for r in range(count):
                values = [total.get() for total in sums[r]]
                tile.stores(values, code.at(scores, (number + r) * tile.row_bytes))
                for most, value in zip(best, values, strict=True):
                    most.set(code.larger(most.get(), value))

        def visit(start: Value, step: Value, tokens: Value, before: Value) -> None:
            keys = code.at(start, (features + head * size) * step)
            whole = tokens / rows * rows
            with code.loop(whole, step=rows) as key:
                block(keys, step, key, before + key, rows)
            with code.loop(tokens, start=whole) as key:
                block(keys, step, key, before + key, 1)

        over_keys(visit)
        normalise([most.get() for most in best])

    totals = [code.variable(code.splat(0.0)) for _ in tile.offsets]

    def normalise(largest: list[Value]) -> None:
        """Scores to ``e^(scale · (s − largest))``, and their sums."""
        for total in totals:
            total.set(code.splat(0.0))
        count = code.variable(code.whole(0))
        with code.loop(tiles) as number:
            count.set(count.get() + code.load("i64", code.at(table, number * 24), 16))
        with code.loop(count.get()) as key:
            row = code.at(scores, key * tile.row_bytes)
            values = [
                exponential(code, (value - most) * scale)
                for value, most in zip(tile.loads(row), largest, strict=True)
            ]
            for total, value in zip(totals, values, strict=True):
                total.set(total.get() + value)
            tile.stores(values, row)

    def mix(head: Value) -> None:
        shares = [code.splat(1.0) / total.get() for total in totals]

        def block(d: Value, count: int) -> None:
            sums = [[code.variable(code.splat(0.0)) for _ in tile.offsets] for _ in range(count)]
            feature = head * size + d

            def visit(start: Value, step: Value, tokens: Value, before: Value) -> None:
                values = code.at(start, (features * 2 + feature) * step)
                addresses = [code.at(values, step * r) for r in range(count)]
                row = code.at(scores, before * tile.row_bytes)
                with code.loop(tokens) as key:
                    loaded = tile.loads(code.at(row, key * tile.row_bytes))
                    for r in range(count):
                        factor = code.splat(code.load("float", addresses[r], key * 4))
                        for total, value in zip(sums[r], loaded, strict=True):
                            total.set(code.fma(factor, value, total.get()))

            over_keys(visit)
            for r in range(count):
                values = [total.get() * share for total, share in zip(sums[r], shares, strict=True)]
                tile.stores(values, code.at(output, (feature + r) * tile.row_bytes))

        whole = size / rows * rows
        with code.loop(whole, step=rows) as d:
            block(d, rows)
        with code.loop(size, start=whole) as d:
            block(d, 1)

    with code.loop(heads) as head:
        score(head, [code.splat(-3.0e38) for _ in tile.offsets])
        mix(head)
    return code
