"""Schedules as pure functions: when to prune, how far, and the learning rate in step with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from pruners.errors import InputError
from trainers.config.schedules import LearningRate, PruningSchedule


def pruning_plan(schedule: PruningSchedule, target: float, length: int) -> dict[int, float]:
    """Expand a schedule to the pruning steps of a run.

    A polynomial schedule has s(t) = target + (start - target) · (1 - t)^power, where t is 0 at the first
    step and 1 at the last one (Zhu & Gupta, 2017; their power is 3).

    Args:
        schedule: the recipe's schedule.
        target: sparsity of the last step, 0…1.
        length: length of the run, in epochs or steps as the schedule's ``unit``.

    Returns:
        The sparsity that is reached at each time (epoch or step), ascending in both.

    Raises:
        InputError: more steps than times up to the last one, or a step after the end of the run.
    """
    if schedule.kind == "constant":
        return {}
    if schedule.kind == "points":
        return _through_points(schedule, length)
    first = min(round(schedule.first_at * length), length - 1)
    steps = 1 if schedule.kind == "one_shot" else schedule.steps
    if steps == 1:
        return {first: target}
    last = min(round(schedule.last_at * length), length - 1)
    times = [first + round(step * (last - first) / (steps - 1)) for step in range(steps)]
    if len(set(times)) < steps:
        room = last - first + 1
        raise InputError(
            "pruning.schedule.steps",
            steps,
            f"needs as many {schedule.unit} up to the last step; {room} of {length} {schedule.unit} "
            f"allow {room} steps",
        )
    start = min(0.5, target) if schedule.start is None else schedule.start
    power = schedule.power if schedule.kind == "polynomial" else 1.0
    left = [(1 - step / (steps - 1)) ** power for step in range(steps)]
    return {time: target + (start - target) * share for time, share in zip(times, left, strict=True)}


def _through_points(schedule: PruningSchedule, length: int) -> dict[int, float]:
    """The steps of a schedule through points: at the points, and between them, where it is linear."""
    points = sorted(schedule.points.items())
    end = points[-1][0]
    if round(end) >= length:
        raise InputError(
            "pruning.schedule.points", end, f"must lie before the end of the run ({length} {schedule.unit})"
        )
    sparsity_at = dict(points)
    for (before, low), (after, high) in pairwise(points):
        between = 1 if schedule.every is None else math.ceil((after - before) / schedule.every - 1e-9)
        if between > length:  # before the loop: a tiny ``every`` would make it endless
            raise _too_close(schedule)
        for number in range(1, between):
            time = before + number * (schedule.every or 0.0)
            sparsity_at[time] = low + (high - low) * (time - before) / (after - before)
    plan = {round(time): sparsity_at[time] for time in sorted(sparsity_at)}
    if len(plan) < len(sparsity_at):
        raise _too_close(schedule)
    return plan


def _too_close(schedule: PruningSchedule) -> InputError:
    return InputError(
        "pruning.schedule.every",
        schedule.every,
        f"two steps fall on the same of the {schedule.unit}; steps must lie at least 1 apart",
    )


def learning_rate(lr: LearningRate, epoch: float, epochs: float, jumps: Sequence[float] = ()) -> float:
    """The learning rate at a point of the run.

    Args:
        lr: the recipe's learning rate.
        epoch: epochs done, with fractions.
        epochs: length of the run.
        jumps: epochs that begin with a pruning step, with fractions: a cyclic rate jumps to its peak there.

    Returns:
        The rate, before any layer-wise decay.
    """
    if epoch < lr.warmup_epochs:
        peak = lr.cycle_peaks[0] if lr.cycle_peaks else lr.peak
        return lr.warmup_from + (peak - lr.warmup_from) * min((epoch + 1e-9) / lr.warmup_epochs, 1.0)
    if lr.kind == "constant":
        return lr.peak
    if lr.kind == "cyclic":
        begin, end, cycle = _cycle(lr, epoch, epochs, jumps)
        peak = lr.cycle_peaks[min(cycle, len(lr.cycle_peaks) - 1)] if lr.cycle_peaks else lr.peak
        return _fall(peak, lr.floor, (epoch - begin) / (end - begin), lr.shape)
    done = (epoch - lr.warmup_epochs) / max(epochs - lr.warmup_epochs, 1e-9)
    return _fall(lr.peak, lr.floor, min(done, 1.0), lr.kind)


def _cycle(lr: LearningRate, epoch: float, epochs: float, jumps: Sequence[float]) -> tuple[float, float, int]:
    """Begin, end and number of the cycle at ``epoch``."""
    if lr.cycle_epochs is not None:
        cycle = math.floor(epoch / lr.cycle_epochs + 1e-9)
        return cycle * lr.cycle_epochs, (cycle + 1) * lr.cycle_epochs, cycle
    edges = sorted({0.0, *jumps, epochs})
    begin = max(edge for edge in edges if edge <= epoch)
    end = min((edge for edge in edges if edge > epoch), default=epochs + 1)
    return begin, end, edges.index(begin)


def _fall(peak: float, floor: float, done: float, shape: str) -> float:
    left = 0.5 * (1 + math.cos(math.pi * done)) if shape == "cosine" else 1.0 - done
    return floor + (peak - floor) * left
