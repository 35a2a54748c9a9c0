"""When to prune, how far, and the learning rate in step with it, against numbers by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
from helpers import quick
from hypothesis import given
from hypothesis import strategies as st

from pruners.errors import InputError
from trainers.config import LearningRate, PruningSchedule
from trainers.schedules import learning_rate, pruning_epochs, step_sparsities

SHARE = st.floats(0.0, 1.0)


def cyclic(peak: float, floor: float, **more: object) -> LearningRate:
    return LearningRate.model_validate({"kind": "cyclic", "peak": peak, "floor": floor, **more})


@pytest.mark.parametrize(
    ("steps", "last_at", "epochs", "expected"),
    [
        (1, 0.5, 30, [0]),
        (2, 0.4, 6, [0, 2]),
        (4, 0.75, 120, [0, 30, 60, 90]),  # oViT's 120 epochs to 75 %
        (15, 280 / 300, 300, list(range(0, 281, 20))),  # oViT's 300 epochs to 90 %, every 20 epochs
        (3, 0.5, 10, [0, 2, 5]),
        (3, 0.2, 10, [0, 1, 2]),
        (2, 0.95, 4, [0, 3]),  # the last step still has an epoch to recover
    ],
)
def test_pruning_epochs(steps: int, last_at: float, epochs: int, expected: list[int]) -> None:
    assert pruning_epochs(PruningSchedule(steps=steps, last_at=last_at), epochs) == expected


@pytest.mark.parametrize(
    ("steps", "last_at", "epochs", "says"),
    [(4, 0.2, 10, "3 of 10 epochs allow 3 steps"), (2, 0.0, 10, "1 of 10 epochs allow 1 steps")],
)
def test_steps_that_do_not_fit(steps: int, last_at: float, epochs: int, says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        pruning_epochs(PruningSchedule(steps=steps, last_at=last_at), epochs)
    assert (error.value.key, error.value.value) == ("pruning.schedule.steps", steps)


@pytest.mark.parametrize(
    ("start", "steps", "target", "expected"),
    [
        (0.5, 1, 0.75, [0.75]),
        (0.5, 2, 0.75, [0.5, 0.75]),
        (0.4, 4, 0.7, [0.4, 0.5, 0.6, 0.7]),
        (0.9, 3, 0.6, [0.6, 0.6, 0.6]),
        (0.0, 3, 0.5, [0.0, 0.25, 0.5]),
    ],
)
def test_step_sparsities(start: float, steps: int, target: float, expected: list[float]) -> None:
    found = step_sparsities(PruningSchedule(start=start, steps=steps), target)
    assert found == pytest.approx(expected)
    assert found[-1] == target


@quick(200)
@given(st.integers(1, 12), SHARE, st.floats(0.0, 0.99), st.integers(1, 60), SHARE)
def test_sparsity_only_rises(steps: int, start: float, last_at: float, epochs: int, target: float) -> None:
    schedule = PruningSchedule(steps=steps, start=start, last_at=last_at)
    sparsities = step_sparsities(schedule, target)
    assert len(sparsities) == steps
    assert all(one <= other + 1e-12 for one, other in pairwise(sparsities))
    assert sparsities[-1] == pytest.approx(target, abs=1e-12)
    assert all(0.0 <= sparsity <= 1.0 for sparsity in sparsities)
    try:
        found = pruning_epochs(schedule, epochs)
    except InputError:
        assert steps > min(round(last_at * epochs), epochs - 1) + 1
        return
    assert len(found) == steps == len(set(found))
    assert found == sorted(found)
    assert found[0] == 0
    assert found[-1] < epochs


def test_cosine_by_hand() -> None:
    rate = LearningRate(kind="cosine", peak=1.0, floor=0.2, warmup_epochs=2)
    expected = {0: 0.0, 1: 0.5, 2: 1.0, 4: 0.2 + 0.8 * 0.85355339, 6: 0.6, 10: 0.2}
    found = {epoch: learning_rate(rate, epoch, 10) for epoch in expected}
    assert found == pytest.approx(expected, abs=1e-6)


def test_cyclic_by_hand() -> None:
    """oViT's 75 % run: 2e-4 → 1e-5 in 30 epochs, again and again."""
    found = {
        epoch: learning_rate(cyclic(2e-4, 1e-5), epoch, 120, [0, 30, 60, 90])
        for epoch in (0, 15, 29.999, 30, 45, 60, 90, 105, 119.999)
    }
    middle = (2e-4 + 1e-5) / 2
    expected = [2e-4, middle, 1e-5, 2e-4, middle, 2e-4, 2e-4, middle, 1e-5]
    assert list(found.values()) == pytest.approx(expected, rel=1e-3)


def test_cycles_of_unlike_length() -> None:
    """Each cycle ends at the floor just before the next jump, the last with the run."""
    jumps = [0, 2, 6]
    for jump, end in ((0, 2), (2, 6), (6, 10)):
        assert learning_rate(cyclic(1.0, 0.1), jump, 10, jumps) == pytest.approx(1.0)
        assert learning_rate(cyclic(1.0, 0.1), end - 1e-9, 10, jumps) == pytest.approx(0.1)
        assert learning_rate(cyclic(1.0, 0.1), (jump + end) / 2, 10, jumps) == pytest.approx(0.55)


def test_a_peak_for_each_cycle() -> None:
    """oViT's 120 epochs: 2e-4 for the first two cycles, 4e-4 for the last two."""
    rate = cyclic(2e-4, 1e-5, cycle_peaks=[2e-4, 2e-4, 4e-4])
    peaks = [learning_rate(rate, jump, 120, [0, 30, 60, 90]) for jump in (0, 30, 60, 90)]
    assert peaks == pytest.approx([2e-4, 2e-4, 4e-4, 4e-4])
    assert learning_rate(rate, 59.9999, 120, [0, 30, 60, 90]) == pytest.approx(1e-5, rel=1e-2)


def test_without_pruning_steps_a_cycle_is_the_whole_run() -> None:
    assert learning_rate(cyclic(1.0, 0.0), 2.5, 10) == pytest.approx(0.75)


def test_warm_up_leads_to_the_peak_and_then_the_cycle() -> None:
    rate = cyclic(1.0, 0.0, warmup_epochs=2)
    found = [learning_rate(rate, epoch, 10, [0, 5]) for epoch in (0, 1, 2, 5, 7.5)]
    assert found == pytest.approx([0.0, 0.5, 0.6, 1.0, 0.5], abs=1e-6)


@quick(300)
@given(
    st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["cosine", "cyclic"]),
            "peak": st.floats(1e-6, 1.0),
            "floor": st.floats(0.0, 1e-6),
            "warmup_epochs": st.floats(0.0, 5.0),
        }
    ),
    st.integers(1, 50),
    SHARE,
    st.sets(st.integers(0, 49)),
)
def test_rates_stay_between_floor_and_peak(
    content: dict[str, object], epochs: int, where: float, jumps: set[int]
) -> None:
    rate = LearningRate.model_validate(content)
    epoch = where * epochs
    inside = sorted(jump for jump in jumps if jump < epochs)
    found = learning_rate(rate, epoch, epochs, inside)
    assert found <= rate.peak * (1 + 1e-9)
    assert found >= (0.0 if epoch < rate.warmup_epochs else rate.floor * (1 - 1e-9))


@quick(100)
@given(st.sets(st.integers(1, 39), max_size=6), st.integers(0, 39), st.floats(0.001, 0.999))
def test_cycles_fall_and_jump_with_the_pruning(jumps: set[int], epoch: int, part: float) -> None:
    rate, steps = cyclic(1.0, 0.1), sorted({0, *jumps})
    here = learning_rate(rate, epoch + part, 40, steps)
    if epoch in steps:
        assert learning_rate(rate, epoch, 40, steps) == 1.0
    assert here < learning_rate(rate, epoch, 40, steps)
