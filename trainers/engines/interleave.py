"""Interleaved timing of several models, so that other load of the machine slows down all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Protocol, TypeVar

from pruners.errors import first_line
from trainers.engines.process import EngineError

_SAMPLE_SECONDS = 0.05  # a sample takes at least so long: shorter ones would measure the clock
K = TypeVar("K")


class Worker(Protocol):
    """An object that can be timed, such as :class:`EngineProcess`."""

    def seconds(self, batch: int, calls: int) -> float:
        """Mean seconds of ``calls`` passes over a batch of ``batch`` images."""


def time_interleaved(
    workers: Mapping[K, Worker],
    batches: Sequence[int],
    rounds: int,
    report_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[dict[K, dict[int, tuple[float, ...]]], dict[K, str]]:
    """Time every worker at every batch size, once in each round, in a random order.

    Args:
        workers: what is timed, by a key.
        batches: sizes of batches, in images.
        rounds: number of samples of each worker at each batch size.
        report_progress: called after each round with a label, the rounds done and the rounds in all.

    Returns:
        Seconds of a pass by worker and batch size, of the workers that did not fail; and the error message of
        each worker that did.
    """
    turns = [(key, batch) for key in workers for batch in batches]
    calls: dict[tuple[K, int], int] = {}
    times: dict[K, dict[int, list[float]]] = {key: {batch: [] for batch in batches} for key in workers}
    failed: dict[K, str] = {}
    order = Random(0)
    for number in range(rounds + 1):  # round 0 only measures how many calls a sample needs
        for key, batch in order.sample(turns, len(turns)):
            if key in failed:
                continue
            try:
                took = workers[key].seconds(batch, calls.get((key, batch), 1))
            except EngineError as error:
                failed[key] = first_line(error)
                continue
            if number:
                times[key][batch].append(took)
            else:
                calls[key, batch] = max(1, round(_SAMPLE_SECONDS / took))
        report_progress("rounds", number, rounds)
    complete = {
        key: {batch: tuple(samples) for batch, samples in by_batch.items()}
        for key, by_batch in times.items()
        if key not in failed
    }
    return complete, failed
