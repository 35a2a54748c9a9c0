"""When to prune, how far, and the learning rate in step with it, against numbers by hand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from helpers import quick
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pruners.errors import InputError
from trainers.config.pruning import PruningSettings
from trainers.config.schedules import LearningRate, PruningSchedule
from trainers.loop.schedules import learning_rate, pruning_plan

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
def test_schedules__pruning_epochs(steps: int, last_at: float, epochs: int, expected: list[int]) -> None:
    assert list(pruning_plan(PruningSchedule(steps=steps, last_at=last_at), 0.9, epochs)) == expected


@pytest.mark.parametrize(
    ("steps", "last_at", "epochs", "says"),
    [(4, 0.2, 10, "3 of 10 epochs allow 3 steps"), (2, 0.0, 10, "1 of 10 epochs allow 1 steps")],
)
def test_schedules__steps_that_do_not_fit(steps: int, last_at: float, epochs: int, says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        pruning_plan(PruningSchedule(steps=steps, last_at=last_at), 0.9, epochs)
    assert (error.value.key, error.value.value) == ("pruning.schedule.steps", steps)


@pytest.mark.parametrize(
    ("start", "steps", "target", "expected"),
    [
        (0.5, 1, 0.75, [0.75]),
        (0.5, 2, 0.75, [0.5, 0.75]),
        (0.4, 4, 0.7, [0.4, 0.5, 0.6, 0.7]),
        (None, 3, 0.3, [0.3, 0.3, 0.3]),
        (None, 3, 0.9, [0.5, 0.7, 0.9]),
        (0.0, 3, 0.5, [0.0, 0.25, 0.5]),
    ],
)
def test_schedules__step_sparsities(
    start: float | None, steps: int, target: float, expected: list[float]
) -> None:
    values = list(pruning_plan(PruningSchedule(start=start, steps=steps), target, 100).values())
    assert values == pytest.approx(expected)
    assert values[-1] == target


@quick(200)
@given(
    st.sampled_from(["linear", "polynomial"]),
    st.integers(1, 12),
    SHARE,
    st.floats(0.0, 0.99),
    st.tuples(st.integers(1, 60), SHARE),
)
def test_schedules__sparsity_only_rises(
    kind: Any, steps: int, start: float, last_at: float, run: tuple[int, float]
) -> None:
    epochs, target = run
    schedule = PruningSchedule(kind=kind, steps=steps, start=min(start, target), last_at=last_at)
    try:
        plan = pruning_plan(schedule, target, epochs)
    except InputError:
        assert steps > min(round(last_at * epochs), epochs - 1) + 1
        return
    times, sparsities = list(plan), list(plan.values())
    assert len(plan) == steps
    assert times == sorted(times)
    assert times[0] == 0
    assert times[-1] < epochs
    assert all(left <= right + 1e-12 for left, right in pairwise(sparsities))
    assert sparsities[-1] == target
    assert all(0.0 <= sparsity <= 1.0 for sparsity in sparsities)


def test_schedules__polynomial_by_hand() -> None:
    """Zhu & Gupta: s_f + (s_0 − s_f)(1 − t/n)³."""
    schedule = PruningSchedule(kind="polynomial", start=0.1, steps=5, last_at=0.8)
    plan = pruning_plan(schedule, 0.9, 10)
    expected = {0: 0.1, 2: 0.9 - 0.8 * 0.421875, 4: 0.8, 6: 0.9 - 0.8 * 0.015625, 8: 0.9}
    assert plan == pytest.approx(expected)


def test_schedules__one_shot_and_constant() -> None:
    assert pruning_plan(PruningSchedule(kind="one_shot", first_at=0.2), 0.7, 10) == {2: 0.7}
    assert pruning_plan(PruningSchedule(kind="one_shot"), 0.7, 10) == {0: 0.7}
    assert pruning_plan(PruningSchedule(kind="constant"), 0.7, 10) == {}


def test_schedules__the_paper_s_300_epochs() -> None:
    """oViT: 40 % at 0, every 20 epochs, 60 % at 40, 75 % at 100, 90 % at 280, linear in between."""
    schedule = PruningSchedule.model_validate("ovit_300_90")
    plan = pruning_plan(schedule, 0.9, 300)
    assert list(plan) == list(range(0, 281, 20))
    expected = {0: 0.4, 20: 0.5, 40: 0.6, 60: 0.65, 80: 0.7, 100: 0.75, 160: 0.8, 280: 0.9}
    assert {time: plan[time] for time in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "target", "epochs", "steps"),
    [
        ("ovit_300_75", 0.75, 300, {0: 0.4, 20: 0.5, 40: 0.6, 60: 0.65, 80: 0.7, 100: 0.75}),
        ("ovit_300_50", 0.5, 300, {0: 0.4, 20: 0.5}),
        ("ovit_120_75", 0.75, 120, {0: 0.5, 30: 0.5 + 0.25 / 3, 60: 0.5 + 0.5 / 3, 90: 0.75}),
    ],
)
def test_schedules__published_schedules(
    name: str, target: float, epochs: int, steps: dict[int, float]
) -> None:
    assert pruning_plan(PruningSchedule.model_validate(name), target, epochs) == pytest.approx(steps)


def test_schedules__points_by_steps() -> None:
    schedule = PruningSchedule(kind="points", points={5: 0.5, 25: 0.9}, every=7, unit="steps")
    plan = pruning_plan(schedule, 0.9, 100)
    assert plan == pytest.approx({5: 0.5, 12: 0.64, 19: 0.78, 25: 0.9})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"kind": "points"}, "needs them"),
        ({"points": {0: 0.5}}, "kind: points"),
        ({"kind": "points", "points": {0: 0.5, 4: 0.5}}, "must rise"),
        ({"kind": "points", "points": {0: 0.6, 4: 0.5}}, "from 0.6 at 0 to 0.5 at 4"),
        ({"kind": "points", "points": {-1: 0.6}}, "begins at 0"),
        ({"every": 3}, "kind: points"),
        ({"first_at": 0.6}, "must not lie after last_at"),
        ("ovit_30", "must be one of ovit_300_90"),
    ],
)
def test_schedules__schedules_that_are_none(content: object, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        PruningSchedule.model_validate(content)


@pytest.mark.parametrize(
    ("schedule", "sparsity", "says"),
    [
        ({"start": 0.8}, 0.7, "go from 0.8 to 0.7"),
        (
            {"kind": "points", "points": {0: 0.5}},
            0.7,
            r"must end at the sparsity asked for \(0.7\), not at 0.5",
        ),
        ("ovit_300_90", 0.75, "not at 0.9"),
    ],
)
def test_schedules__schedules_that_do_not_reach_the_target(
    schedule: object, sparsity: float, says: str
) -> None:
    with pytest.raises(ValidationError, match=says):
        PruningSettings.model_validate({"sparsity": sparsity, "schedule": schedule})


@pytest.mark.parametrize(
    ("content", "length", "key"),
    [
        ({"points": {0: 0.5, 10: 0.9}}, 10, "pruning.schedule.points"),
        ({"points": {0: 0.5, 10: 0.9}, "every": 0.3}, 100, "pruning.schedule.every"),
    ],
)
def test_schedules__points_that_do_not_fit_the_run(content: dict[str, Any], length: int, key: str) -> None:
    with pytest.raises(InputError) as error:
        pruning_plan(PruningSchedule(kind="points", **content), 0.9, length)
    assert error.value.key == key


def test_schedules__learning_rates_by_name() -> None:
    """The papers' numbers, at their epochs."""

    def at(name: str, epochs: int, jumps: Sequence[int], *when: float) -> list[float]:
        rate = LearningRate.model_validate(name)
        return [learning_rate(rate, epoch, epochs, jumps) for epoch in when]

    jumps = list(range(0, 281, 20))
    assert at("ovit_300_90", 300, jumps, 20, 30, 40, 290) == pytest.approx([5e-4, 2.55e-4, 5e-4, 2.55e-4])
    assert at("ovit_300_90", 300, jumps, 0, 2.5, 5) == pytest.approx([0, 2.5e-4, 5e-4 - 4.9e-4 / 4], abs=1e-9)
    assert at("ovit_300_75", 300, [0, 20], 19.9999, 20) == pytest.approx([0.0, 5e-4], abs=1e-7)
    assert at("ovit_120_75", 120, [0, 30, 60, 90], 0, 30, 60, 90) == pytest.approx([2e-4, 2e-4, 4e-4, 4e-4])
    assert at("ovit_one_shot", 20, [0], 0, 10, 20) == pytest.approx([1e-4, 5.5e-5, 1e-5])
    assert at("ovit_2of4", 50, [0], 0, 25, 50) == pytest.approx([5e-4, 2.55e-4, 1e-5])
    assert at("ovit_cnn", 60, [0], 0, 10, 20, 39.9999) == pytest.approx([0.2, 0.1005, 0.2, 1e-3], rel=1e-2)
    assert at("dimap", 30, [0], 0, 7.5, 15, 30) == pytest.approx([2e-8, 1.001e-5, 2e-5, 2e-7], rel=1e-3)


def test_schedules__other_curves_by_hand() -> None:
    line = LearningRate(kind="linear", peak=1.0, floor=0.2, warmup_epochs=2, warmup_from=0.5)
    values = [learning_rate(line, epoch, 10) for epoch in (0, 1, 2, 6, 10)]
    assert values == pytest.approx([0.5, 0.75, 1.0, 0.6, 0.2])
    flat = LearningRate(kind="constant", peak=0.3)
    assert [learning_rate(flat, epoch, 10) for epoch in (0, 5, 10)] == [0.3] * 3
    waves = cyclic(1.0, 0.0, shape="cosine", cycle_epochs=4)
    assert [learning_rate(waves, epoch, 10) for epoch in (0, 2, 4, 5)] == pytest.approx(
        [1.0, 0.5, 1.0, 0.8535534]
    )


def test_schedules__cosine_by_hand() -> None:
    rate = LearningRate(kind="cosine", peak=1.0, floor=0.2, warmup_epochs=2)
    expected = {0: 0.0, 1: 0.5, 2: 1.0, 4: 0.2 + 0.8 * 0.85355339, 6: 0.6, 10: 0.2}
    values = {epoch: learning_rate(rate, epoch, 10) for epoch in expected}
    assert values == pytest.approx(expected, abs=1e-6)


def test_schedules__cyclic_by_hand() -> None:
    """oViT's 75 % run: 2e-4 → 1e-5 in 30 epochs, again and again."""
    values = {
        epoch: learning_rate(cyclic(2e-4, 1e-5), epoch, 120, [0, 30, 60, 90])
        for epoch in (0, 15, 29.999, 30, 45, 60, 90, 105, 119.999)
    }
    middle = (2e-4 + 1e-5) / 2
    expected = [2e-4, middle, 1e-5, 2e-4, middle, 2e-4, 2e-4, middle, 1e-5]
    assert list(values.values()) == pytest.approx(expected, rel=1e-3)


def test_schedules__cycles_of_unlike_length() -> None:
    """Each cycle ends at the floor just before the next jump, the last with the run."""
    jumps = [0, 2, 6]
    for jump, end in ((0, 2), (2, 6), (6, 10)):
        assert learning_rate(cyclic(1.0, 0.1), jump, 10, jumps) == pytest.approx(1.0)
        assert learning_rate(cyclic(1.0, 0.1), end - 1e-9, 10, jumps) == pytest.approx(0.1)
        assert learning_rate(cyclic(1.0, 0.1), (jump + end) / 2, 10, jumps) == pytest.approx(0.55)


def test_schedules__a_peak_for_each_cycle() -> None:
    """oViT's 120 epochs: 2e-4 for the first two cycles, 4e-4 for the last two."""
    rate = cyclic(2e-4, 1e-5, cycle_peaks=[2e-4, 2e-4, 4e-4])
    peaks = [learning_rate(rate, jump, 120, [0, 30, 60, 90]) for jump in (0, 30, 60, 90)]
    assert peaks == pytest.approx([2e-4, 2e-4, 4e-4, 4e-4])
    assert learning_rate(rate, 59.9999, 120, [0, 30, 60, 90]) == pytest.approx(1e-5, rel=1e-2)


def test_schedules__without_pruning_steps_a_cycle_is_the_whole_run() -> None:
    assert learning_rate(cyclic(1.0, 0.0), 2.5, 10) == pytest.approx(0.75)


def test_schedules__warm_up_leads_to_the_peak_and_then_the_cycle() -> None:
    rate = cyclic(1.0, 0.0, warmup_epochs=2)
    values = [learning_rate(rate, epoch, 10, [0, 5]) for epoch in (0, 1, 2, 5, 7.5)]
    assert values == pytest.approx([0.0, 0.5, 0.6, 1.0, 0.5], abs=1e-6)


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
def test_schedules__rates_stay_between_floor_and_peak(
    content: dict[str, object], epochs: int, where: float, jumps: set[int]
) -> None:
    rate = LearningRate.model_validate(content)
    epoch = where * epochs
    inside = sorted(jump for jump in jumps if jump < epochs)
    values = learning_rate(rate, epoch, epochs, inside)
    assert values <= rate.peak * (1 + 1e-9)
    assert values >= (0.0 if epoch < rate.warmup_epochs else rate.floor * (1 - 1e-9))


@quick(100)
@given(st.sets(st.integers(1, 39), max_size=6), st.integers(0, 39), st.floats(0.001, 0.999))
def test_schedules__cycles_fall_and_jump_with_the_pruning(jumps: set[int], epoch: int, part: float) -> None:
    rate, steps = cyclic(1.0, 0.1), sorted({0, *jumps})
    here = learning_rate(rate, epoch + part, 40, steps)
    if epoch in steps:
        assert learning_rate(rate, epoch, 40, steps) == 1.0
    assert here < learning_rate(rate, epoch, 40, steps)
