"""The part of a recipe about searches: space, sampler, scheduler, objectives and limits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from orchestration.recipe.distribution import Distribution
from orchestration.recipe.population import check_population
from trainers.config.base import Amount, Count, Distinct, Images, ImagesToSolveOn, Settings, Share, Steps
from trainers.config.latency import LatencyTarget

Sampler = Literal["tpe", "random", "cmaes", "gp", "nsga2"]
Inner = Annotated[Share, Field(gt=0.0, lt=1.0)]
_MOST_COMBINATIONS = 100_000


class SearchLimits(Settings):
    """Limits at which a search is given up; trials that ended stay, and count when it is started again."""

    failures: float = Field(
        0.5, ge=0.0, le=1.0, description="share of the trials that may fail; one more ends the search"
    )
    trial_minutes: float | None = Field(
        None, gt=0.0, le=1e6, description="a trial that takes longer counts as failed; default: none does"
    )


LIMITS = set(SearchLimits.model_fields)  # no trial's result depends on them


class Pareto(Settings):
    """Two objectives, top-1 and a cost: what counts as cost, and which model of the front is taken.

    Either the cheapest that is at most ``tolerance`` (of top-1, 0…1) below the most accurate, or the most
    accurate whose cost is ``at_most`` a share of the dense model's.
    """

    against: Literal["macs", "size"] = Field(
        "macs", description="macs: of multiplications whose weight is not zero; size: parameters not zero"
    )
    between: tuple[Share, Share] | None = Field(
        None, description="sparsities to look between, in place of pruning.sparsity alone"
    )
    tolerance: Share | None = Field(
        None, description="rule: the cheapest model at most so much top-1 (0 to 1) below the best"
    )
    at_most: Share | None = Field(
        None, description="rule: the best model whose cost is at most this share of the dense model's"
    )

    @field_validator("against", mode="before")
    @classmethod
    def _counted(cls, value: Any) -> Any:
        if value == "latency":
            raise ValueError("must be 'macs' or 'size'; measured times are asked for by objective: latency")
        return value

    @model_validator(mode="after")
    def _one_rule(self) -> Pareto:
        if (self.tolerance is None) == (self.at_most is None):
            raise ValueError("give exactly one of tolerance and at_most")
        _check_ascending(self.between)
        if self.against == "size" and self.between is None:
            raise ValueError("between: needed, as all models of one sparsity have the same size")
        return self

    @property
    def cost(self) -> str:
        """The metric that trials report."""
        return {"macs": "macs_sparse", "size": "parameters_sparse"}[self.against]


def _check_ascending(between: tuple[float, float] | None) -> None:
    if between is not None and not between[0] < between[1]:
        raise ValueError(f"between: {between[0]} must lie below {between[1]}")


@dataclass(frozen=True)
class Fastest:
    """Two objectives, top-1 and measured time: the fastest model at most ``loss`` less accurate than dense.

    Attributes:
        loss: a share of the dense model's top-1.
    """

    loss: float
    between: tuple[float, float]
    target: LatencyTarget

    against = "latency"
    cost = "latency"


Rule = Pareto | Fastest
LOSS = 0.01


class AllocationSearch(SearchLimits):
    """One-shot trials over the sparsity of parts of the model; with 0 trials the method's own is kept.

    A trial is evaluated on ``first_images``, then on ``reduction`` times as many and so on up to ``images``;
    of the trials that come to each of these ends one in ``reduction`` goes on.
    """

    trials: int = Field(
        30, ge=0, le=10**6, description="one-shot trials for each sparsity; 0: the method's own allocation"
    )
    sparsities: Annotated[tuple[Inner, ...], Distinct] = Field(
        (), description="besides pruning.sparsity; each a study, begun with what was best at the one before"
    )
    by: Annotated[tuple[Literal["stage", "module", "group", "layer"], ...], Distinct] = Field(
        ("stage", "module"), min_length=1, description="what has a sparsity; group: a module in a stage"
    )
    range: float = Field(
        0.15,
        gt=0.0,
        le=1.0,
        description="how far from the method's own sparsities; at most three quarters of what is left",
    )
    sampler: Sampler = Field("tpe", description="what proposes allocations: Optuna's sampler of this name")
    images: Images = Field(2000, description="validation images of a trial, at most")
    first_images: Images | None = Field(
        None,
        description="validation images that a trial sees before its first comparison; default: all",
    )
    reduction: int = Field(
        2,
        ge=2,
        le=10**6,
        description="with first_images: one in so many of the trials continues, on as many times the images",
    )
    reconstruct: ImagesToSolveOn = Field(
        0,
        description="training images on which the weights of each trial are solved again before it is "
        "evaluated; 0: trials are compared as they are pruned",
    )
    pareto: Pareto | None = Field(None, description="top-1 against a cost; default: top-1 alone")
    objective: Literal["top1", "cross_entropy", "latency"] = Field(
        "top1",
        description="cross_entropy: the least loss on validation, which tells models apart that top-1 on few "
        "images cannot; latency: the fastest model that loses little, by times measured on an engine",
    )
    loss: Share | None = Field(
        None, description="of latency: how much of the dense model's top-1 may be lost; default 0.01, 1 %"
    )
    between: tuple[Share, Share] | None = Field(None, description="of latency: sparsities to look between")
    target: LatencyTarget | None = Field(None, description="of latency: what is to be fast; default csr")
    cpus_per_trial: Amount = Field(
        1.0, gt=0.0, description="processors of a trial, and its threads; parts as 0.5 too"
    )
    gpus_per_trial: Amount = Field(0.0, description="GPUs of a trial, parts as 0.25 too; 0: on the processor")

    @model_validator(mode="after")
    def _of_latency(self) -> AllocationSearch:
        if self.objective == "latency":
            if self.pareto is not None:
                raise ValueError("pareto: objective: latency is a rule of its own; drop one of the two")
            if self.between is None:
                raise ValueError("between: needed, as [0.5, 0.95]: sparsities to look between")
            _check_ascending(self.between)
            return self
        for key in ("loss", "between", "target"):
            if getattr(self, key) is not None:
                own = "; beside pareto it is pareto.between" if key == "between" and self.pareto else ""
                raise ValueError(f"{key}: is for objective: latency alone{own}")
        return self

    @model_validator(mode="after")
    def _front(self) -> AllocationSearch:
        rule = self.rule
        if rule is None:
            return self
        name = "pareto" if isinstance(rule, Pareto) else "objective: latency"
        if self.sampler == "cmaes":
            raise ValueError(f"sampler: cmaes knows one objective; with {name} take nsga2, tpe, gp or random")
        if self.first_images is not None:
            raise ValueError(f"first_images: with {name} every trial sees all images; drop it")
        if self.sparsities and rule.between is not None:
            key = self.between_key
            raise ValueError(f"sparsities: {key} is one search over all of them; drop one of the two")
        if self.objective == "cross_entropy":
            raise ValueError("pareto: weighs top-1 against a cost; drop objective: cross_entropy")
        return self

    @property
    def rule(self) -> Rule | None:
        """The second objective, and which model of the front is taken; nothing where top-1 is all."""
        if self.objective != "latency":
            return self.pareto
        assert self.between is not None, "checked when it was read"
        return Fastest(LOSS if self.loss is None else self.loss, self.between, self.target or LatencyTarget())

    @property
    def between_key(self) -> str:
        return "pareto.between" if self.pareto is not None else "between"

    @property
    def reach(self) -> tuple[float, float] | None:
        """The sparsities to choose from, where the search says how sparse the models are to be."""
        return None if self.rule is None or not self.trials else self.rule.between

    def decides(self) -> dict[str, Any]:
        """The settings that a study's trials depend on, for its hash."""
        rest = {"trials", "sparsities", *LIMITS}
        if self.objective != "latency":
            rest |= {"loss", "between", "target"}
        if self.objective == "top1":
            rest |= {"objective"}
        return self.model_dump(mode="json", exclude=rest)

    def rungs(self, images: int) -> list[int]:
        """How many of ``images`` a trial has seen at each of its ends."""
        most = min(self.images, images)
        ends, end = [], self.first_images or most
        while end < most:
            ends.append(end)
            end *= self.reduction
        return [*ends, most]


class ScheduleSearch(SearchLimits):
    """Gradual runs over schedule hyper-parameters; 1 trial runs the recipe's own values."""

    trials: Count = Field(4, description="gradual runs of the search; without space there is one")
    space: dict[str, Distribution] = Field(
        {},
        description="key of recovery or pruning -> one of {uniform: [a, b]}, {log: [a, b]}, "
        "{integer: [a, b]}, {choice: [a, b, c]}; beside it when: {other searched key: value}",
    )
    sampler: Literal[Sampler, "grid"] = Field("tpe", description="grid: every combination, at most trials")
    scheduler: Literal["asha", "hyperband", "median", "none", "pbt"] = Field(
        "asha",
        description="what stops trials early, by their epochs at the final sparsity; pbt stops none: "
        "the worse continue from the better ones' models",
    )
    grace_epochs: Steps = Field(
        1, description="epochs at the final sparsity before a trial may be stopped; pbt: between looks"
    )
    reduction: int = Field(
        2, ge=2, le=10**6, description="one in so many continues; pbt: one in so many is exchanged"
    )

    @property
    def runs(self) -> int:
        """Gradual runs of a method: without a space they would all be the same one."""
        if not self.space:
            return 1
        return min(self.trials, self._combinations) if self.sampler == "grid" else self.trials

    @property
    def alone(self) -> dict[str, Any]:
        """The values that make one run of the search."""
        return {"trials": 1, "space": {}} | ({"scheduler": "none"} if self.scheduler == "pbt" else {})

    @property
    def _combinations(self) -> int:
        """How many combinations the space's values have, for a grid."""
        return math.prod(distribution.size for distribution in self.space.values())

    def grid(self) -> list[dict[str, Any]]:
        """Every combination of the space's values."""
        combinations = itertools.product(*(distribution.values() for distribution in self.space.values()))
        return [dict(zip(self.space, values, strict=True)) for values in combinations]

    @model_validator(mode="after")
    def _population(self) -> ScheduleSearch:
        if self.scheduler == "pbt":
            check_population(self.trials, self.sampler, self.space)
        return self

    @model_validator(mode="after")
    def _space_of_keys(self) -> ScheduleSearch:
        for key in self.space:
            if key.split(".")[0] not in {"recovery", "pruning"}:
                raise ValueError(f"space.{key}: only keys of recovery and pruning can be searched")
            if key.startswith("pruning.methods"):
                raise ValueError(
                    f"space.{key}: each method has a search of its own; list them in pruning.methods"
                )
        if self.sampler == "grid" and self._combinations > _MOST_COMBINATIONS:
            raise ValueError(
                f"space: sampler grid takes at most {_MOST_COMBINATIONS:,} combinations; "
                f"these are {self._combinations:,}"
            )
        for key, distribution in self.space.items():
            if self.sampler == "grid" and distribution.choice is None and distribution.integer is None:
                raise ValueError(f"space.{key}: sampler grid takes choice and integer only")
            if self.sampler == "cmaes" and distribution.choice is not None:
                raise ValueError(
                    f"space.{key}: sampler cmaes searches numbers and would draw a choice at random; "
                    "take tpe, gp, nsga2 or random"
                )
            for other in distribution.when:
                if other not in self.space or other == key:
                    raise ValueError(f"space.{key}: when names {other}, which must be another searched key")
        return self

    def active(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a proposal whose conditions are met; other keys keep the recipe's value."""
        return {
            key: value
            for key, value in values.items()
            if all(values.get(other, wanted) == wanted for other, wanted in self.space[key].when.items())
        }
