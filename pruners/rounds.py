"""Several rounds of one pruning: the sparsity after each, and its share of the gradients.

The Fisher describes the loss near the weights at which its gradients were computed, and pruning moves the
weights far away. With the same number of gradients in all, a Fisher that is computed again in each round
describes the last weights better. (Frantar, Kurtić, Alistarh: M-FAC, 2021, recompute it in the same way; the
oViT paper does so between gradual pruning steps.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from pruners.errors import InputError

if TYPE_CHECKING:  # the command line checks rounds without waiting for torch
    from pruners.elimination.gradients import Batch


def round_sparsities(rounds: int | Sequence[float], start: float, end: float) -> list[float]:
    """The sparsity after each round.

    Args:
        rounds: their number, each prunes the same share of the remaining weights; or the sparsity after each.
        start: sparsity of the model now, 0 to 1.
        end: the wanted sparsity, 0 to 1.

    Returns:
        Ascending sparsities; the last one is ``end``.

    Raises:
        InputError: no round, or sparsities that do not ascend from ``start`` to ``end``.
    """
    if isinstance(rounds, int):
        if rounds < 1:
            raise InputError("rounds", rounds, "must be at least 1")
        left, last = 1 - start, 1 - end
        if left <= 0 or last <= 0:
            return [end]
        return [min(1 - left * (last / left) ** (number / rounds), end) for number in range(1, rounds)] + [
            end
        ]
    given = list(rounds)
    if not given or given[-1] != end or given != sorted(set(given)) or given[0] < start:
        expected = f"must be ascending sparsities, from above {start:g}, of which the last is {end:g}"
        raise InputError("rounds", given, expected)
    return given


def remaining_rounds(rounds: int | Sequence[float], start: float, end: float) -> list[float]:
    """The sparsity of each round of a pruning that is a part of a longer one.

    Args:
        rounds: as for :func:`round_sparsities`; sparsities outside ``start`` to ``end`` are left out.
        start: sparsity of the model now, 0 to 1.
        end: the sparsity that this pruning leads to, 0 to 1.

    Returns:
        Ascending sparsities; the last one is ``end``, and the only one if it is reached already.

    Raises:
        InputError: no round.
    """
    if isinstance(rounds, int):
        return round_sparsities(rounds, start, end) if start < end else [end]
    return [*(sparsity for sparsity in rounds if start < sparsity < end), end]


class Shares:
    """The batches for the gradients of a pruning, divided into equal shares for its rounds."""

    def __init__(self, batches: Iterable[Batch], gradients: int, rounds: int, *, per_sample: bool) -> None:
        """Divide up.

        Args:
            batches: images and labels.
            gradients: number of gradients of all rounds together.
            rounds: how many rounds.
            per_sample: whether a gradient is of an image, not of a batch.
        """
        self._batches, self._per_sample = batches, per_sample
        self.gradients = max(gradients // rounds, 1)
        self._source: Iterator[Batch] | None = None

    def once(self) -> Iterator[Batch]:
        """The next batches, for a round that reads its share once."""
        if self._source is None:
            self._source = iter(self._batches)
        return self._source

    def again(self, number: int) -> Iterable[Batch]:
        """The share of a round, counted from 0, for one that reads it several times."""
        return _Again(self._batches, number * self.gradients, self.gradients, self._per_sample)


class _Again:
    """A part of some batches, which can be read again if they can."""

    def __init__(self, batches: Iterable[Batch], skip: int, take: int, per_sample: bool) -> None:
        self._batches, self._skip, self._take, self._per_sample = batches, skip, take, per_sample

    def __iter__(self) -> Iterator[Batch]:
        count = 0
        for batch in self._batches:
            size = len(batch[0]) if self._per_sample else 1
            if count + size > self._skip:
                yield batch
            count += size
            if count >= self._skip + self._take:
                return
