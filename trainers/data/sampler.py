"""The images of each worker in each step: a pure function of seed, epoch and step.

A run can therefore resume in the middle of an epoch, and any number of workers sees the same global batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from pruners.arithmetic import ceil_div
from pruners.errors import InputError


class Sample(NamedTuple):
    """A row of the images, and the epoch for which it is augmented."""

    row: int
    epoch: int


class EpochBatches(Sampler[list[Sample]]):
    """One worker's share of every batch of an epoch, in an order that is shuffled for each epoch.

    The workers share each batch as evenly as possible; the last one of an epoch may be smaller. A worker that
    gets no image of it takes the batch's first image, which then counts for nothing (:meth:`share`).

    Batch norms take their statistics from a worker's images of a step, for which one image is not enough.
    With them the smaller last batch is left out, as timm does; other images fall into it in each epoch.

    Args:
        size: number of images.
        batch: images of a batch over all workers.
        rank: this worker.
        world: number of workers.
        seed: decides the order.
        normed: the model has batch norms.

    Raises:
        InputError: fewer images in a batch than workers; with batch norms, than two for each.
    """

    def __init__(
        self,
        size: int,
        batch: int,
        *,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        normed: bool = False,
    ) -> None:
        least = 2 if normed else 1
        wanted = f"at least {'two' if normed else 'one'} for each of {world} workers"
        why = ", as the model has batch norms" if normed else ""
        if batch < least * world:
            raise InputError("training.batch_size", batch, f"must be {wanted}{why}")
        if normed and size < least * world:
            raise InputError("data.train", f"{size} images", f"must be {wanted}{why}")
        self._drops = normed and size > batch
        self._size, self._batch, self._rank, self._world, self._seed = size, batch, rank, world, seed
        self._epoch, self._first = 0, 0

    def start(self, epoch: int, step: int = 0) -> None:
        """Set what the next iteration gives: the batches of ``epoch`` from ``step`` on."""
        self._epoch, self._first = epoch, step

    def __len__(self) -> int:
        return self._size // self._batch if self._drops else ceil_div(self._size, self._batch)

    def samples(self, epoch: int, step: int) -> list[Sample]:
        """This worker's images of a step."""
        return self._own_samples(self._order(epoch), epoch, step)

    def share(self, step: int) -> float:
        """The weight of this worker's mean loss in a step: its part of the batch, times the workers."""
        whole = min(self._batch, self._size - step * self._batch)
        own = len(range(self._rank, whole, self._world))
        return own * self._world / whole

    def __iter__(self) -> Iterator[list[Sample]]:
        epoch, order = self._epoch, self._order(self._epoch)
        for step in range(self._first, len(self)):
            yield self._own_samples(order, epoch, step)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(self._size)

    def _own_samples(self, order: np.ndarray, epoch: int, step: int) -> list[Sample]:
        whole = order[step * self._batch : (step + 1) * self._batch]
        own = whole[self._rank :: self._world]
        return [Sample(int(row), epoch) for row in (own if len(own) else whole[:1])]
