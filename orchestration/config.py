"""The recipe: everything a user asks for, typed. Reading it needs neither torch nor ray."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from trainers.config import (
    DataSettings,
    ModelSettings,
    Name,
    PruningSettings,
    Settings,
    Share,
    TrainingSettings,
)

Sampler = Literal["tpe", "random", "cmaes", "gp", "nsga2"]


class Distribution(Settings):
    """Where a searched value comes from; exactly one of the four, and ``when`` it is searched at all."""

    uniform: tuple[float, float] | None = None
    log: tuple[float, float] | None = Field(None, description="log-uniform")
    integer: tuple[int, int] | None = Field(None, description="both ends included")
    choice: tuple[float | int | str, ...] | None = Field(None, min_length=1)
    when: dict[str, Any] = Field({}, description="other searched keys -> the value that each must have")

    @model_validator(mode="after")
    def _one(self) -> Distribution:
        given = [value for value in (self.uniform, self.log, self.integer, self.choice) if value is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of uniform, log, integer, choice")
        for bounds in (self.uniform, self.log, self.integer):
            if bounds is not None and not bounds[0] <= bounds[1]:
                raise ValueError(f"the lower bound {bounds[0]} lies above the upper one {bounds[1]}")
        if self.log is not None and self.log[0] <= 0:
            raise ValueError("log needs positive bounds")
        return self

    def values(self) -> tuple[Any, ...]:
        """Of a choice or an integer: all that it can be."""
        if self.integer is not None:
            return tuple(range(self.integer[0], self.integer[1] + 1))
        return self.choice or ()


class AllocationSearch(Settings):
    """Cheap one-shot trials over the sparsity of parts of the model; 0 trials keep the method's own.

    A trial is evaluated on ``first_images``, then on ``reduction`` times as many and so on up to ``images``;
    of the trials that come to each of these ends one in ``reduction`` goes on.
    """

    trials: int = Field(30, ge=0, description="for each sparsity")
    sparsities: tuple[Share, ...] = Field(
        (), description="besides pruning.sparsity; each a study, begun with what was best at the one before"
    )
    by: tuple[Literal["stage", "module", "group", "layer"], ...] = Field(
        ("stage", "module"), min_length=1, description="what has a sparsity; group: a module in a stage"
    )
    range: float = Field(0.15, gt=0.0, le=1.0, description="how far from the method's own sparsities")
    sampler: Sampler = "tpe"
    images: int = Field(2000, ge=1, description="validation images of a trial, at most")
    first_images: int | None = Field(None, ge=1, description="default: all at once")
    reduction: int = Field(2, ge=2)
    cpus_per_trial: float = Field(1.0, gt=0.0)
    gpus_per_trial: float = Field(0.0, ge=0.0)

    def rungs(self, images: int) -> list[int]:
        """How many of ``images`` a trial has seen at each of its ends."""
        most = min(self.images, images)
        ends, end = [], self.first_images or most
        while end < most:
            ends.append(end)
            end *= self.reduction
        return [*ends, most]


class ScheduleSearch(Settings):
    """Dear trials: gradual runs over schedule hyper-parameters; 1 trial runs the recipe's own values."""

    trials: int = Field(4, ge=1)
    space: dict[str, Distribution] = Field({}, description="recipe key -> distribution")
    sampler: Literal[Sampler, "grid"] = Field("tpe", description="grid: every combination, at most trials")
    scheduler: Literal["asha", "hyperband", "median", "none"] = Field(
        "asha", description="what stops trials early, by their epochs at the final sparsity"
    )
    grace_epochs: int = Field(
        1, ge=1, description="epochs at the final sparsity before a trial may be stopped"
    )
    reduction: int = Field(2, ge=2, description="one in so many goes on")

    @property
    def runs(self) -> int:
        """Gradual runs of a method: without a space they would all be the same one."""
        if not self.space:
            return 1
        return min(self.trials, len(self.grid())) if self.sampler == "grid" else self.trials

    def grid(self) -> list[dict[str, Any]]:
        """Every combination of the space's values."""
        combinations = itertools.product(*(one.values() for one in self.space.values()))
        return [dict(zip(self.space, values, strict=True)) for values in combinations]

    @model_validator(mode="after")
    def _space_of_keys(self) -> ScheduleSearch:
        for key in self.space:
            if key.split(".")[0] not in {"recovery", "pruning"}:
                raise ValueError(f"space.{key}: only keys of recovery and pruning can be searched")
        for key, one in self.space.items():
            if self.sampler == "grid" and one.choice is None and one.integer is None:
                raise ValueError(f"space.{key}: sampler grid takes choice and integer only")
            for other in one.when:
                if other not in self.space or other == key:
                    raise ValueError(f"space.{key}: when names {other}, which must be another searched key")
        return self

    def active(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What of a proposal is meant: keys whose conditions are not met keep the recipe's value."""
        return {
            key: value
            for key, value in values.items()
            if all(values.get(other, wanted) == wanted for other, wanted in self.space[key].when.items())
        }


class WorkerRange(Settings):
    """A run that goes on with fewer workers when a node leaves, at the same global batch."""

    min: int = Field(1, ge=1)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> WorkerRange:
        if self.min > self.max:
            raise ValueError(f"min: must not lie above max ({self.max})")
        return self


class Resources(Settings):
    """What a training run takes from the cluster."""

    workers: Annotated[int, Field(ge=1)] | WorkerRange = Field(
        1, description="data-parallel workers of a run, or {min, max} of them as nodes come and go"
    )
    cpus_per_worker: float = Field(1.0, gt=0.0)
    gpus_per_worker: float = Field(0.0, ge=0.0)
    retries: int = Field(1, ge=0, description="restarts of a worker group after a failure")

    @property
    def least(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers.min

    @property
    def most(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers.max


class Promotion(Settings):
    """Which version becomes champion: the best on validation of those sparse enough, on the same data."""

    sparsity: Share | None = Field(None, description="least sparsity; default pruning.sparsity")
    tolerance: Share | None = Field(
        0.0, description="how far below the champion's top-1 a newer one may lie; null: it must be better"
    )


class Tracking(Settings):
    """Where MLflow is; without a URI a server of our own is started on loopback."""

    uri: Name | None = None
    experiment: Name = "espalier"
    registered_model: Name | None = Field(None, description="default espalier-<name>")
    promotion: Promotion = Promotion()


class Recipe(Settings):
    """One sweep or run. YAML keys are the names below; ``extends:`` inherits from another recipe."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    seed: int = Field(0, ge=0)
    storage: Name = Field("runs", description="folder or pyarrow URI that every node reaches")
    model: ModelSettings
    data: DataSettings
    dense: TrainingSettings | None = Field(
        None, description="how the dense model is trained, or fine-tuned from pretrained weights"
    )
    pruning: PruningSettings = PruningSettings()
    recovery: TrainingSettings = TrainingSettings()
    allocation: AllocationSearch = AllocationSearch()
    schedule: ScheduleSearch = ScheduleSearch()
    resources: Resources = Resources()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _dense_model_comes_from_somewhere(self) -> Recipe:
        if not self.model.ready_made and self.dense is None:
            raise ValueError("dense: needed, as the model has neither pretrained weights nor a checkpoint")
        if self.model.checkpoint is not None and self.dense is not None:
            raise ValueError("dense: not needed, as the checkpoint is the dense model; drop one of the two")
        for sparsity in self.allocation.sparsities:
            self.pruning.check_reach(sparsity, "allocation.sparsities")
        for key, settings in (("dense", self.dense), ("recovery", self.recovery)):
            if settings is not None and settings.batch_size < self.resources.most:
                raise ValueError(
                    f"{key}.batch_size: {settings.batch_size} must be an image at least for each of "
                    f"resources.workers ({self.resources.most})"
                )
        return self

    @model_validator(mode="after")
    def _champion_can_be(self) -> Recipe:
        asked, most = self.tracking.promotion.sparsity, max(self._sparsities)
        if asked is not None and asked > most:
            raise ValueError(
                f"tracking.promotion.sparsity: no model of this recipe has so many zeros; at most {most:g}"
            )
        return self

    @property
    def _sparsities(self) -> tuple[float, ...]:
        """Those that gradual runs end at, the least and the largest at least."""
        found = self.schedule.space.get("pruning.sparsity")
        ends = found and (found.uniform or found.log or found.integer or found.choice)
        return tuple(map(float, ends or (self.pruning.sparsity,)))

    @property
    def promotion(self) -> Promotion:
        """The champion's rule, with the sparsity that it asks for."""
        rule = self.tracking.promotion
        least = min(self._sparsities) if rule.sparsity is None else rule.sparsity
        return rule.model_copy(update={"sparsity": least})

    @property
    def allocated_sparsities(self) -> list[float]:
        """Those that an allocation is searched for, ascending."""
        if not self.allocation.trials:
            return []
        return sorted({self.pruning.sparsity, *self.allocation.sparsities})

    @property
    def registered_model(self) -> str:
        return self.tracking.registered_model or f"espalier-{self.name}"


def digest(*parts: Any) -> str:
    """Twelve hexadecimal digits of the content of JSON-like parts."""
    content = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


__all__ = [
    "AllocationSearch",
    "DataSettings",
    "Distribution",
    "ModelSettings",
    "Promotion",
    "PruningSettings",
    "Recipe",
    "Resources",
    "ScheduleSearch",
    "Share",
    "Tracking",
    "TrainingSettings",
    "digest",
]
