"""Where numbers lie: activations in tiles of tokens, feature by feature.

A buffer holds ``images × vectors × features × lanes`` float32. The tokens of an image fill ``vectors``
vectors of ``lanes`` tokens each (the last is padded). Some consecutive vectors form a tile; within a tile
memory runs ``[feature][token]``, so that one feature of a tile's tokens is a short contiguous run that fits
in registers::

    tile of vectors v … v + width − 1:   address = base + 4 · lanes · features · v
                                         shape   = [features][width · lanes]
"""

from __future__ import annotations

from collections.abc import Sequence

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
    raw = np.zeros(size * width + 64, dtype=np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size * width].view(kind)


def to_tiles(tokens: NDArray[np.float32], widths: Sequence[int], lanes: int) -> NDArray[np.float32]:
    """``[tokens, features]`` of one image as a flat buffer in tiles."""
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
    """The inverse of :func:`to_tiles`: ``[count, features]``."""
    features, start, parts = len(buffer) // (sum(widths) * lanes), 0, []
    for width in widths:
        tile = buffer[start * features : (start + width * lanes) * features]
        parts.append(tile.reshape(features, width * lanes).T)
        start += width * lanes
    return np.ascontiguousarray(np.concatenate(parts)[:count])
