"""The calling convention of all kernels, and the position of their tile.

Every kernel has the signature ``kernel(arguments, vector, scratch)``: the address of an array of 64-bit
arguments, the first vector of the tile to work on (counted over all images of the batch), and memory of the
thread's own. Its tile's width in vectors is part of the kernel. An argument that places a buffer has three
numbers, ``base``, ``step`` and ``local``: the tile begins at ``base + step · vector + local · scratch``.
"""

from __future__ import annotations

from trainers.sparse.kernels.builder import Code, Value

SIGNATURE = ("ptr", "i64", "i64")
PLACE = 3  # numbers that place a buffer


class Tile:
    """The parameters of a kernel that is being written, and its arguments.

    Args:
        code: the function; its parameters are taken here.
        width: the tile's vectors.
    """

    def __init__(self, code: Code, width: int) -> None:
        self.code, self.width = code, width
        self.arguments, self.vector, self.scratch = code.parameters(*SIGNATURE)
        self.row_bytes = code.vector_bytes * width
        self.offsets = [v * code.vector_bytes for v in range(width)]

    def pointer(self, argument: int) -> Value:
        return self.code.load("ptr", self.arguments, 8 * argument)

    def number(self, argument: int) -> Value:
        return self.code.load("i64", self.arguments, 8 * argument)

    def real(self, argument: int) -> Value:
        """A float32, in the low half of an argument."""
        return self.code.load("float", self.arguments, 8 * argument)

    def address(self, argument: int, vector: Value | None = None) -> Value:
        """Address of a buffer's tile: of this tile, or of the tile at ``vector``."""
        base, step, local = (self.number(argument + i) for i in range(PLACE))
        where = base + step * (vector or self.vector) + local * self.scratch
        return self.code.convert("inttoptr", where, "ptr")

    def loads(self, row: Value) -> list[Value]:
        """The vectors of a row of a tile."""
        return [self.code.load("vector", row, offset) for offset in self.offsets]

    def stores(self, values: list[Value], row: Value) -> None:
        for value, offset in zip(values, self.offsets, strict=True):
            self.code.store(value, row, offset)
