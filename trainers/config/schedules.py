"""Settings of schedules: the sparsity over a run, and the learning rate."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from trainers.config.base import Rate, Settings, Share, Steps
from trainers.config.presets import LEARNING_RATE, SPARSITY, named

Peak = Annotated[Rate, Field(gt=0.0)]


class LearningRate(Settings):
    """The learning rate: a warm-up, then one of four curves from the peak to the floor.

    ``cyclic`` jumps to the peak at each pruning step (or every ``cycle_epochs``) and falls to the floor until
    the next one, as in oViT. The name of a preset (:data:`trainers.config.presets.LEARNING_RATE`) stands for
    a published schedule.
    """

    kind: Literal["cosine", "linear", "constant", "cyclic"] = Field(
        "cosine",
        description="curve from peak to floor after the warm-up; cyclic: a new one at each pruning step; "
        "constant: stays at peak",
    )
    peak: Peak = Field(1e-3, description="learning rate at the end of the warm-up, above 0")
    floor: Rate = Field(
        0.0, description="learning rate at the end of the curve (cyclic: of each cycle), at most peak"
    )
    warmup_epochs: float = Field(
        0.0, ge=0.0, le=1e5, description="length of the linear warm-up, in epochs, at most epochs"
    )
    warmup_from: Rate = Field(0.0, description="rate at the start of the warm-up")
    shape: Literal["linear", "cosine"] = Field("linear", description="cyclic: how each cycle falls")
    cycle_peaks: tuple[Peak, ...] = Field(
        (),
        description="cyclic: a peak for each cycle in place of one for all; the last for all that follow",
    )
    cycle_epochs: float | None = Field(
        None,
        ge=1e-3,
        le=1e5,
        description="cyclic: cycles of so many epochs, in place of one for each pruning step",
    )

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return named(value, LEARNING_RATE)

    @model_validator(mode="after")
    def _floor_below_peak(self) -> LearningRate:
        if self.floor > self.peak:
            raise ValueError(f"floor: must not lie above peak ({self.peak})")
        if self.warmup_from > self.peak:
            raise ValueError(f"warmup_from: must not lie above peak ({self.peak})")
        if self.kind != "cyclic":
            for key in ("cycle_peaks", "cycle_epochs"):
                if getattr(self, key):
                    raise ValueError(f"{key}: only a cyclic rate has cycles (kind is {self.kind})")
        return self


class PruningSchedule(Settings):
    """The sparsity over a run of gradual pruning.

    ``linear`` and ``polynomial`` rise in ``steps`` from ``start`` to the target. A polynomial of power 3 is
    the cubic schedule of Zhu & Gupta, "To prune, or not to prune" (2017): fast first, then slower. ``points``
    goes through given sparsities; ``one_shot`` prunes once; ``constant`` prunes no more and keeps the zeros
    of a checkpoint. The name of a preset stands for a published schedule.
    """

    kind: Literal["linear", "polynomial", "points", "one_shot", "constant"] = Field(
        "linear",
        description="how sparsity rises: in steps, linear or polynomial; through points; at once; not at all "
        "(constant keeps a checkpoint's zeros)",
    )
    start: Share | None = Field(
        None, description="sparsity of the first of several steps; default 0.5, or the target if that is less"
    )
    steps: Steps = Field(4, description="linear, polynomial: number of pruning steps, 1 to 100,000")
    power: float = Field(3.0, ge=1.0, le=100.0, description="polynomial: its power")
    first_at: float = Field(0.0, ge=0.0, lt=1.0, description="share of the run at which the first step falls")
    last_at: float = Field(
        0.5, ge=0.0, lt=1.0, description="share of the epochs at which the last step falls"
    )
    points: dict[float, Share] = Field({}, description="points: time -> sparsity, as {0: 0.4, 40: 0.6}")
    every: float | None = Field(
        None, gt=0.0, le=1e9, description="points: steps between them too, linear, this far apart"
    )
    unit: Literal["epochs", "steps"] = Field("epochs", description="what times count, and steps fall on")

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return named(value, SPARSITY)

    @model_validator(mode="after")
    def _points(self) -> PruningSchedule:
        if (self.kind == "points") != bool(self.points):
            raise ValueError("points: go with kind: points, and it needs them")
        if self.every is not None and self.kind != "points":
            raise ValueError(f"every: goes with kind: points (kind is {self.kind})")
        if self.first_at > self.last_at and self.kind in ("linear", "polynomial") and self.steps > 1:
            raise ValueError(f"first_at: must not lie after last_at ({self.last_at})")
        ordered = sorted(self.points.items())
        if ordered and ordered[0][0] < 0:
            raise ValueError(f"points: the run begins at 0 ({ordered[0][0]:g} given)")
        for (before, low), (after, high) in pairwise(ordered):
            if high <= low:
                raise ValueError(
                    f"points: sparsity must rise; it goes from {low:g} at {before:g} to {high:g} at {after:g}"
                )
        return self

    def check(self, target: float) -> None:
        """Check that the schedule rises to the sparsity ``target`` (0…1).

        Raises:
            ValueError: it starts above the target, or ends elsewhere.
        """
        if self.start is not None and self.start > target and self.kind in ("linear", "polynomial"):
            raise ValueError(
                f"schedule.start: sparsity must rise; it would go from {self.start:g} to {target:g}"
            )
        if self.kind == "points":
            last = max(self.points.values())
            if abs(last - target) > 1e-9:
                raise ValueError(
                    f"schedule.points: must end at the sparsity asked for ({target:g}), not at {last:g}"
                )
