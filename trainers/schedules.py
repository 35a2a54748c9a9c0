"""Schedules as pure functions: when to prune, how far, and the learning rate in step with it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pruners.errors import InputError
from trainers.config import LearningRate, PruningSchedule


def pruning_epochs(schedule: PruningSchedule, epochs: int) -> list[int]:
    """The epochs that begin with a pruning step, evenly spaced, the last at ``last_at``·epochs.

    Raises:
        InputError: more steps than epochs up to there.
    """
    if schedule.steps == 1:
        return [0]
    last = min(round(schedule.last_at * epochs), epochs - 1)
    found = [round(step * last / (schedule.steps - 1)) for step in range(schedule.steps)]
    if len(set(found)) < len(found):
        raise InputError(
            "pruning.schedule.steps",
            schedule.steps,
            f"needs as many epochs up to the last step; {last + 1} of {epochs} epochs allow {last + 1} steps",
        )
    return found


def step_sparsities(schedule: PruningSchedule, target: float) -> list[float]:
    """Sparsity of each pruning step: linear from ``start`` (at most the target) to the target."""
    if schedule.steps == 1:
        return [target]
    start = min(schedule.start, target)
    return [start + (target - start) * step / (schedule.steps - 1) for step in range(schedule.steps)]


def learning_rate(lr: LearningRate, epoch: float, epochs: int, jumps: Sequence[int] = ()) -> float:
    """The learning rate at a point of the run.

    Args:
        epoch: epochs done, with fractions.
        epochs: length of the run.
        jumps: epochs that begin with a pruning step: a cyclic rate jumps to its peak there.
    """
    if epoch < lr.warmup_epochs:
        return lr.peak * min((epoch + 1e-9) / lr.warmup_epochs, 1.0)
    if lr.kind == "cosine":
        done = (epoch - lr.warmup_epochs) / max(epochs - lr.warmup_epochs, 1e-9)
        return lr.floor + (lr.peak - lr.floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    edges = sorted({0, *jumps, epochs})
    begin = max(edge for edge in edges if edge <= epoch)
    end = min((edge for edge in edges if edge > epoch), default=epochs + 1)
    cycle = edges.index(begin)
    peak = lr.cycle_peaks[min(cycle, len(lr.cycle_peaks) - 1)] if lr.cycle_peaks else lr.peak
    return peak + (lr.floor - peak) * (epoch - begin) / (end - begin)
