"""Token order for shifted-window attention: each window, shifted or not, is a few contiguous runs of tokens.

The borders of the windows and of the shifted windows together cut the grid into cells. Each cell lies within
one window of each kind. Tokens are ordered window by window (unshifted), within a window cell by cell, and
within a cell row by row. An unshifted window is then one run of tokens, and a shifted window at most four.
:func:`runs` gives these runs as the attention kernel reads them; where a tile ends, a run is divided.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pruners.arithmetic import ceil_div
from trainers.sparse.layout import Tiling

MASKED = -100.0  # added, as in Swin, to the scores of two tokens that were not neighbours before the shift
# a run of a window's tokens in one tile, int64: address of the first feature, bytes to the next one, bytes
# from a window's first token, address for the result, tokens (none of padding)
SOURCE, ROW, LANE, TARGET, COUNT = range(5)
RUN = 5

Pair = tuple[int, int]


def _cells(length: int, cut: int) -> list[range]:
    return [part for part in (range(cut), range(cut, length)) if part]


def local_order(window: Pair, shift: Pair, *, shifted: bool) -> NDArray[np.int64]:
    """The tokens of a window (numbered row by row), cell by cell.

    Args:
        window: rows and columns.
        shift: by how much the shifted windows of the level are moved.
        shifted: whether this is one of them: it is cut where the unshifted ones end.
    """
    cuts = [(size - by if shifted else by) if by else size for size, by in zip(window, shift, strict=True)]
    rows, columns = (_cells(size, cut) for size, cut in zip(window, cuts, strict=True))
    return np.array(
        [
            row * window[1] + column
            for some_rows, some_columns in itertools.product(rows, columns)
            for row, column in itertools.product(some_rows, some_columns)
        ],
        dtype=np.int64,
    )


def token_order(grid: Pair, window: Pair, shift: Pair) -> NDArray[np.int64]:
    """The position of each token of a grid in the order of this module.

    Args:
        grid, window, shift: rows and columns.

    Returns:
        ``[tokens]``, for the tokens numbered row by row.
    """
    windows = window_tokens(grid, window, (0, 0))[:, local_order(window, shift, shifted=False)]
    tokens = windows[windows >= 0]
    order = np.empty(len(tokens), dtype=np.int64)
    order[tokens] = np.arange(len(tokens))
    return order


def _axis(length: int, window: int, shift: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For the positions of a padded and shifted axis: where each comes from (-1: padding), and its region."""
    padded = ceil_div(length, window) * window
    at = np.arange(padded)
    source = np.where(at < length, (at + shift) % length, -1)
    region = (at >= padded - window).astype(np.int64) + (at >= padded - shift) if shift else np.zeros_like(at)
    return source, region


def _partition(grid: NDArray[np.int64], window: Pair) -> NDArray[np.int64]:
    """``[rows, columns]`` as ``[windows, tokens of a window]``."""
    rows, columns = (size // part for size, part in zip(grid.shape, window, strict=True))
    parts = grid.reshape(rows, window[0], columns, window[1]).transpose(0, 2, 1, 3)
    return parts.reshape(rows * columns, window[0] * window[1])


def window_tokens(grid: Pair, window: Pair, shift: Pair) -> NDArray[np.int64]:
    """The tokens of each window, numbered row by row in the grid.

    Args:
        grid, window, shift: rows and columns.

    Returns:
        ``[windows, tokens]``; -1 is padding.
    """
    (rows, _), (columns, _) = (_axis(*each) for each in zip(grid, window, shift, strict=True))
    tokens = np.where((rows[:, None] < 0) | (columns < 0), -1, rows[:, None] * grid[1] + columns)
    return _partition(tokens, window)


def window_regions(grid: Pair, window: Pair, shift: Pair) -> NDArray[np.int64]:
    """The region of each token of each window; there is no attention between different regions.

    Args:
        grid, window, shift: rows and columns.

    Returns:
        ``[windows, tokens]``, numbers of regions.
    """
    (_, rows), (_, columns) = (_axis(*each) for each in zip(grid, window, shift, strict=True))
    return _partition(rows[:, None] * 3 + columns, window)


@dataclass(frozen=True)
class Partition:
    """The windows of a level.

    Args:
        order: position of each token of the grid (:func:`token_order`).
        tokens: ``[windows, tokens]`` of each window, in the window's own order; -1 is padding.
        local: that order, of tokens numbered row by row.
        regions: as :func:`window_regions`, in the window's own order.
    """

    order: NDArray[np.int64]
    tokens: NDArray[np.int64]
    local: NDArray[np.int64]
    regions: NDArray[np.int64]

    @property
    def area(self) -> int:
        """Tokens in a window."""
        return len(self.local)

    def masks(self, lanes: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The masks that are added to scores, ``[kinds, keys, queries (padded)]``, and each window's kind."""
        kinds, number = np.unique(self.regions, axis=0, return_inverse=True)
        masks = np.zeros((len(kinds), self.area, ceil_div(self.area, lanes) * lanes), dtype=np.float32)
        masks[:, :, : self.area] = np.where(kinds[:, :, None] == kinds[:, None, :], 0, MASKED)
        return masks, number.reshape(-1)

    def bias(self, bias: NDArray[np.float32], lanes: int) -> NDArray[np.float32]:
        """``[heads, keys, queries]``, row by row, in the window's order, with queries padded."""
        ordered = bias[:, self.local][:, :, self.local]
        padded = np.zeros((*ordered.shape[:2], ceil_div(self.area, lanes) * lanes), dtype=np.float32)
        padded[:, :, : self.area] = ordered
        return padded


def partition(grid: Pair, window: Pair, shift: Pair, order: NDArray[np.int64], cut: Pair) -> Partition:
    """The windows of one kind.

    Args:
        grid, window, shift: rows and columns.
        order: the level's order of tokens.
        cut: the shift of the level's shifted windows.
    """
    local = local_order(window, cut, shifted=any(shift))
    tokens, regions = window_tokens(grid, window, shift), window_regions(grid, window, shift)
    return Partition(order, tokens[:, local], local, regions[:, local])


def runs(
    part: Partition, tiling: Tiling, source: tuple[int, int], target: tuple[int, int], padding: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The windows of a batch as runs of tokens.

    Args:
        part: the windows of an image.
        tiling: of their tokens.
        source, target: address and features of the buffers that are read and written.
        padding: address of vectors that hold, feature by feature, what is read for a token of padding.

    Returns:
        All runs ``[runs, RUN]``, and for each window of the batch the first of its own (and their end).
    """
    lanes, area = tiling.lanes, part.area
    inside = part.tokens >= 0
    slots = np.where(inside, tiling.slots(part.order)[:, part.tokens], -1).reshape(-1, area)
    start, row = tiling.addresses(np.maximum(slots, 0), source[1])
    written, _ = tiling.addresses(np.maximum(slots, 0), target[1])
    padded = slots < 0
    begins = np.ones(slots.shape, dtype=bool)
    follows = (np.diff(slots, axis=1) == 1) & (np.diff(start, axis=1) == 4)  # the next lane of the same row
    begins[:, 1:] = ~(follows | (padded[:, 1:] & padded[:, :-1]))
    # a run has at most as many tokens as a vector
    position = np.arange(area)
    since = position - np.maximum.accumulate(np.where(begins, position, 0), axis=1)
    begins |= since % lanes == 0
    window, at = np.nonzero(begins)
    after = np.append(np.flatnonzero(begins.ravel())[1:], begins.size)
    count = after - np.flatnonzero(begins.ravel())
    free = padded[window, at]
    table = np.empty((len(window), RUN), dtype=np.int64)
    table[:, SOURCE] = np.where(free, padding, source[0] + start[window, at])
    table[:, ROW] = np.where(free, 4 * lanes, row[window, at])
    table[:, LANE] = 4 * at
    table[:, TARGET] = target[0] + written[window, at]
    table[:, COUNT] = np.where(free, 0, count)
    return table, np.concatenate([[0], np.cumsum(begins.sum(axis=1))]).astype(np.int64)
