"""Which images a worker sees in which step: a pure function of seed, epoch and step.

So a run goes on in the middle of an epoch with what is left of it, and any number of workers sees the same
global batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from pruners.errors import InputError


class Sample(NamedTuple):
    """A row of the images, and the epoch whose augmentation it gets."""

    row: int
    epoch: int


class EpochBatches(Sampler[list[Sample]]):
    """One worker's share of every batch of an epoch, shuffled anew for each; ``start`` says which epoch.

    The workers share each batch as evenly as it goes; the last one of an epoch may be smaller. A worker that
    is left without an image takes the batch's first (its ``weight`` is 0: :meth:`shares`).

    Args:
        size: images.
        batch: images of a batch over all workers.

    Raises:
        InputError: fewer images in a batch than workers.
    """

    def __init__(self, size: int, batch: int, *, rank: int = 0, world: int = 1, seed: int = 0) -> None:
        if batch < world:
            raise InputError(
                "training.batch_size", batch, f"must be at least one for each of {world} workers"
            )
        self._size, self._batch, self._rank, self._world, self._seed = size, batch, rank, world, seed
        self._epoch, self._first = 0, 0

    def start(self, epoch: int, step: int = 0) -> None:
        """What the next iteration gives: the batches of ``epoch`` from ``step`` on."""
        self._epoch, self._first = epoch, step

    def __len__(self) -> int:
        return (self._size + self._batch - 1) // self._batch

    def samples(self, epoch: int, step: int) -> list[Sample]:
        """This worker's images of a step."""
        return self._mine(self._order(epoch), epoch, step)

    def share(self, step: int) -> float:
        """This worker's part of a batch, times the number of workers: what its mean loss counts for."""
        whole = min(self._batch, self._size - step * self._batch)
        mine = len(range(self._rank, whole, self._world))
        return mine * self._world / whole

    def __iter__(self) -> Iterator[list[Sample]]:
        epoch, order = self._epoch, self._order(self._epoch)
        for step in range(self._first, len(self)):
            yield self._mine(order, epoch, step)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(self._size)

    def _mine(self, order: np.ndarray, epoch: int, step: int) -> list[Sample]:
        whole = order[step * self._batch : (step + 1) * self._batch]
        mine = whole[self._rank :: self._world]
        return [Sample(int(row), epoch) for row in (mine if len(mine) else whole[:1])]
