"""Times of several things that run, taken in turns: whatever else the machine does falls on all alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Protocol, TypeVar

from pruners.errors import first_line
from trainers.engines.process import EngineError

_SAMPLE_SECONDS = 0.05  # of one turn, at least: shorter ones measure the clock
K = TypeVar("K")


class Worker(Protocol):
    """What is timed; :class:`EngineProcess` is one."""

    def seconds(self, batch: int, calls: int) -> float: ...


def time_interleaved(
    workers: Mapping[K, Worker],
    batches: Sequence[int],
    rounds: int,
    over: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[dict[K, dict[int, tuple[float, ...]]], dict[K, str]]:
    """Seconds of a pass of every worker at every batch size, one in each round; and who broke off, and why.

    Args:
        over: told how far it is.

    Returns:
        Times by worker and batch size, of those that ran to the end; the last words of the others.
    """
    turns = [(key, batch) for key in workers for batch in batches]
    calls: dict[tuple[K, int], int] = {}
    found: dict[K, dict[int, list[float]]] = {key: {batch: [] for batch in batches} for key in workers}
    failed: dict[K, str] = {}
    order = Random(0)
    for number in range(rounds + 1):  # before the first round it is found out how long one pass takes
        for key, batch in order.sample(turns, len(turns)):
            if key in failed:
                continue
            try:
                took = workers[key].seconds(batch, calls.get((key, batch), 1))
            except EngineError as error:
                failed[key] = first_line(error)
                continue
            if number:
                found[key][batch].append(took)
            else:
                calls[key, batch] = max(1, round(_SAMPLE_SECONDS / took))
        over("rounds", number, rounds)
    whole = {key: times for key, times in found.items() if key not in failed}
    return {key: {b: tuple(one) for b, one in times.items()} for key, times in whole.items()}, failed
