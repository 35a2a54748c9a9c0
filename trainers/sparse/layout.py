"""The memory layout of activations: tiles of tokens, feature by feature.

A buffer holds ``images × vectors × features × lanes`` float32. The tokens of an image fill ``vectors``
vectors of ``lanes`` tokens each (the last is padded). Some consecutive vectors form a tile; within a tile
memory runs ``[feature][token]``, so that one feature of a tile's tokens is a short contiguous run that fits
in registers::

    tile of vectors v … v + width − 1:   address = base + 4 · lanes · features · v
                                         shape   = [features][width · lanes]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pruners.arithmetic import ceil_div

WIDEST = 4  # vectors in a tile: as many sums are kept in registers


def vectors_of(tokens: int, lanes: int) -> int:
    """Vectors that hold so many tokens."""
    return ceil_div(tokens, lanes)


def tile_widths(vectors: int, widest: int = WIDEST) -> list[int]:
    """The tiles of ``vectors`` vectors, as even as can be: 13 are 4 + 3 + 3 + 3. The wider come first."""
    if not vectors:
        return []
    tiles = ceil_div(vectors, widest)
    least, more = divmod(vectors, tiles)
    return [least + 1] * more + [least] * (tiles - more)


def aligned(size: int, kind: type = np.float32) -> NDArray[np.float32]:
    """A zeroed array of one dimension that begins at a multiple of 64 bytes."""
    width = np.dtype(kind).itemsize
    raw = np.zeros(size * width + 128, dtype=np.uint8)  # a vector that begins at the last number ends inside
    start = -raw.ctypes.data % 64
    return raw[start : start + size * width].view(kind)


@dataclass(frozen=True)
class Tiling:
    """The tiles that the tokens of a batch fill.

    Args:
        images, tokens: number of images, and of tokens in each.
        lanes: numbers in a vector.
        apart: whether each image begins a tile of its own; else one image follows the other without a gap,
            and tiles may hold tokens of two.
        widest: vectors in the widest tile.
    """

    images: int
    tokens: int
    lanes: int
    apart: bool
    widest: int = WIDEST

    @cached_property
    def widths(self) -> list[int]:
        """Vectors in each tile."""
        if self.apart:
            return tile_widths(vectors_of(self.tokens, self.lanes), self.widest) * self.images
        return tile_widths(vectors_of(self.images * self.tokens, self.lanes), self.widest)

    @property
    def vectors(self) -> int:
        return sum(self.widths)

    @property
    def pitch(self) -> int:
        """Slots from the first token of an image to that of the next; a slot is a lane of a vector."""
        return vectors_of(self.tokens, self.lanes) * self.lanes if self.apart else self.tokens

    @cached_property
    def items(self) -> NDArray[np.int64]:
        """First vector and width of each tile."""
        starts = np.cumsum([0, *self.widths[:-1]]) if self.widths else np.zeros(0)
        return np.stack([starts, np.array(self.widths)], axis=1).astype(np.int64)

    def slots(self, order: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """The slots of the tokens, ``[images, tokens]``; with ``order`` an image's token ``t`` has the slot
        that token ``order[t]`` would have otherwise."""
        within = np.arange(self.tokens) if order is None else order
        return np.arange(self.images)[:, None] * self.pitch + within

    def addresses(
        self, slots: NDArray[np.int64], features: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Bytes from a buffer's begin to the first feature of a slot, and from there to its next feature.

        Args:
            slots: of any shape.
            features: of the buffer.
        """
        tile = np.repeat(np.arange(len(self.widths)), self.widths)[slots // self.lanes]
        first, width = self.items[tile, 0], self.items[tile, 1]
        start = 4 * (self.lanes * features * first + slots - first * self.lanes)
        return start, 4 * self.lanes * width


def to_tiles(tokens: NDArray[np.float32], widths: Sequence[int], lanes: int) -> NDArray[np.float32]:
    """Lay out the tokens of one image in tiles.

    Args:
        tokens: float32 ``[tokens, features]``.
        widths: vectors in each tile.
        lanes: numbers in a vector.

    Returns:
        The flat buffer; slots beyond the last token are zero.
    """
    count, features = tokens.shape
    buffer, start = aligned(sum(widths) * lanes * features), 0
    for width in widths:
        part = tokens[start : start + width * lanes]
        tile = buffer[start * features : (start + width * lanes) * features].reshape(features, width * lanes)
        tile[:, : len(part)] = part.T
        start += width * lanes
    assert start >= count
    return buffer


def from_tiles(
    buffer: NDArray[np.float32], widths: Sequence[int], lanes: int, count: int
) -> NDArray[np.float32]:
    """Undo :func:`to_tiles`.

    Args:
        buffer: the flat buffer of one image.
        widths: vectors in each tile.
        lanes: numbers in a vector.
        count: number of tokens.

    Returns:
        float32 ``[count, features]``.
    """
    features, start, parts = len(buffer) // (sum(widths) * lanes), 0, []
    for width in widths:
        tile = buffer[start * features : (start + width * lanes) * features]
        parts.append(tile.reshape(features, width * lanes).T)
        start += width * lanes
    return np.ascontiguousarray(np.concatenate(parts)[:count])
