"""Which images a worker sees in which step: the same global batches for any number of workers."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import quick
from hypothesis import given
from hypothesis import strategies as st

from pruners.errors import InputError
from trainers.data.sampler import EpochBatches, Sample

SIZES: Any = st.tuples(st.integers(1, 60), st.integers(4, 17))


def epoch(size: int, batch: int, world: int, number: int, start: int = 0) -> list[list[list[Sample]]]:
    """The batches of each worker."""
    batches = []
    for rank in range(world):
        sampler = EpochBatches(size, batch, rank=rank, world=world, seed=3)
        sampler.start(number, start)
        batches.append(list(sampler))
    return batches


def joined(workers: list[list[list[Sample]]], step: int, size: int, batch: int) -> list[Sample]:
    """A global batch, without what a worker took that was left without an image."""
    whole = min(batch, size - step * batch)
    return sorted(sample for worker in workers[:whole] for sample in worker[step])


@quick(150)
@given(SIZES, st.integers(1, 4), st.integers(0, 5))
def test_sampler__workers_share_the_batches_of_one(sizes: tuple[int, int], world: int, number: int) -> None:
    size, batch = sizes
    alone, shared = epoch(size, batch, 1, number)[0], epoch(size, batch, world, number)
    assert [sorted(batch) for batch in alone] == [
        joined(shared, step, size, batch) for step in range(len(alone))
    ]
    assert sorted(sample.row for batch in alone for sample in batch) == list(range(size))
    assert [len(batch) for batch in alone[:-1]] == [batch] * (len(alone) - 1)
    assert all(sample.epoch == number for batch in alone for sample in batch)


@quick(100)
@given(SIZES, st.integers(1, 4), st.integers(0, 20))
def test_sampler__an_epoch_goes_on_where_it_was(sizes: tuple[int, int], world: int, step: int) -> None:
    whole = epoch(*sizes, world, 2)
    rest = epoch(*sizes, world, 2, start=step)
    assert rest == [worker[step:] for worker in whole]


@quick(100)
@given(SIZES, st.integers(1, 4))
def test_sampler__shares_add_up_to_the_mean_over_the_batch(sizes: tuple[int, int], world: int) -> None:
    """Σ over workers of share·(their mean) / world is the mean over all images."""
    size, batch = sizes
    samplers = [EpochBatches(size, batch, rank=rank, world=world, seed=3) for rank in range(world)]
    for step in range(len(samplers[0])):
        sums = [
            sampler.share(step) * sum(sample.row for sample in samples) / len(samples) / world
            for sampler in samplers
            for samples in [sampler.samples(0, step)]
        ]
        rows = [sample.row for sample in EpochBatches(size, batch, seed=3).samples(0, step)]
        assert sum(sums) == pytest.approx(sum(rows) / len(rows))


def test_sampler__epochs_are_shuffled_anew() -> None:
    assert epoch(40, 8, 1, 0) != epoch(40, 8, 1, 1)
    assert epoch(40, 8, 1, 1) == epoch(40, 8, 1, 1)


def test_sampler__a_batch_that_is_smaller_than_the_workers() -> None:
    with pytest.raises(InputError, match=r"training\.batch_size = 3, .*4 workers|at least one for each of 4"):
        EpochBatches(10, 3, rank=0, world=4)
