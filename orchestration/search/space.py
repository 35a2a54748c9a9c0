"""Optuna's search spaces: sparsities of stages and modules (projected onto the budget), or recipe values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna

from orchestration.recipe.distribution import Distribution
from orchestration.recipe.search import AllocationSearch
from pruners.allocation.bounds import PerLayer, bounds, group_bounds
from pruners.allocation.projection import project
from pruners.allocation.sharing import Allocation, by_threshold, group_layers
from pruners.model.layers import PrunableLayer
from pruners.model.sparsity_pattern import Pattern
from trainers.config.pruning import PruningSettings

Space = dict[str, optuna.distributions.BaseDistribution]
Shares = dict[str, optuna.distributions.FloatDistribution]
_WHOLE = "sparsity"
FURTHEST = 0.75
"""Largest change of a group's sparsity, up or down, as a share of its remaining density (1 - sparsity).

At a sparsity of 0.95 the remaining density is 0.05, and a range of 0.15 would be three times as wide. Hardly
any proposal would then lie near the best allocation, whose distance from oViT's own is a tenth of the
remaining density (measured by ``experiments/benchmarks/allocation_directions.py``).
"""


@dataclass(frozen=True)
class AllocationSpace:
    """Sparsities of stages, modules, modules in stages or layers, each within ``range`` of the method's own.

    A proposal shifts the sparsity of each group (a module in a stage, or a layer) by the sum of the shifts of
    its stage, its module and so on. The result is projected onto the budget; one threshold in each group
    gives the count of each layer. Proposing the method's own sparsities reproduces its allocation exactly.

    Attributes:
        layers: the prunable layers.
        own: the method's own allocation, number of pruned weights by layer.
        by: the kinds of groups with a searched sparsity: ``stage``, ``module``, ``group``, ``layer``.
        range: the largest change of a sparsity, 0…1; at most :data:`FURTHEST` of the remaining density.
        floor: least sparsity of a layer.
        ceiling: largest sparsity of a layer.
        unit: number of weights that are pruned together.
        between: least and largest sparsity of the whole model, which is then searched too.
        pruned: weights of each layer that were zero before the search; they stay zero.
    """

    layers: Sequence[PrunableLayer]
    own: Allocation
    by: tuple[str, ...]
    range: float
    floor: PerLayer
    ceiling: PerLayer
    unit: int = 1
    between: tuple[float, float] | None = None
    pruned: Mapping[str, int] | None = None

    @classmethod
    def of(
        cls,
        search: AllocationSearch,
        pruning: PruningSettings,
        layers: Sequence[PrunableLayer],
        own: Allocation,
        pruned: Mapping[str, int] | None = None,
    ) -> AllocationSpace:
        """Make the space of a recipe's search.

        Args:
            search: the recipe's settings of the search.
            pruning: the recipe's pruning, with floor, ceiling and pattern.
            layers: the prunable layers of the model.
            own: the method's own allocation, number of pruned weights by layer.
            pruned: weights of each layer that are zero already.

        Returns:
            The space.
        """
        return cls(
            layers,
            own,
            search.by,
            search.range,
            pruning.floor,
            pruning.ceiling,
            Pattern.parse(pruning.pattern).unit,
            search.reach,
            pruned,
        )

    def own_values(self) -> dict[str, float]:
        """The method's own allocation as a proposal: the sparsity of each stage and module."""
        values = summarise(self.own, self.layers, self.by)
        if (reach := self._reach) is not None:
            low, high = reach
            values[_WHOLE] = min(max(sum(self.own.values()) / self._numel, low), high)
        return values

    @property
    def _numel(self) -> int:
        return sum(layer.numel for layer in self.layers)

    def distributions(self) -> Shares:
        floor = self.floor if isinstance(self.floor, float) else 0.0
        ceiling = self.ceiling if isinstance(self.ceiling, float) else 1.0
        domains = {}
        for key, own in self.own_values().items():
            furthest = min(self.range, FURTHEST * (1 - own))
            low, high = max(floor, own - furthest), min(ceiling, own + furthest)
            domains[key] = optuna.distributions.FloatDistribution(low, high)
        if (reach := self._reach) is not None:
            domains[_WHOLE] = optuna.distributions.FloatDistribution(*reach)
        return domains

    @property
    def _reach(self) -> tuple[float, float] | None:
        """Least and largest sparsity of the whole model to propose; never below its present sparsity."""
        if self.between is None:
            return None
        low, high = self.between
        return min(max(low, sum((self.pruned or {}).values()) / self._numel), high), high

    def allocation(self, values: Mapping[str, float], losses: Mapping[str, Any]) -> Allocation:
        """The exact allocation of a proposal.

        Args:
            values: the proposal, sparsities by the keys of :meth:`distributions`.
            losses: ascending losses (k,) of each layer's weights.

        Returns:
            Number of pruned weights by layer.

        Raises:
            InputError: floors and ceilings do not allow the budget.
        """
        own, total = self.own_values(), sum(self.own.values())
        groups = group_layers(self.layers, self._group)
        reach = {name: len(ascending) for name, ascending in losses.items()}
        limits = bounds(self.layers, self.floor, self.ceiling, self.pruned, reach=reach, unit=self.unit)
        low, high = group_bounds(groups.values(), limits)
        if self.between is not None:
            total = round(values[_WHOLE] * self._numel / self.unit) * self.unit
            total = min(max(total, sum(low)), sum(high))  # the ends may be rounded beyond the layers' bounds
        if all(values[key] == own[key] for key in own) and total == sum(self.own.values()):
            return dict(self.own)
        wishes, sizes = [], []
        for group in groups.values():
            size = sum(layer.numel for layer in group)
            keys = _keys(group[0], self.by)
            move = sum(values[key] - own[key] for key in keys)
            wishes.append(sum(self.own[layer.name] for layer in group) / size + move)
            sizes.append(size)
        counts = project(wishes, sizes, total, low, high, unit=self.unit)
        allocation: Allocation = {}
        for group, count in zip(groups.values(), counts, strict=True):
            allocation |= by_threshold(losses, group, count, limits, self.unit)
        return {layer.name: allocation[layer.name] for layer in self.layers}

    def _group(self, layer: PrunableLayer) -> tuple[Any, ...]:
        """The group of a layer: its layers share one threshold."""
        return (layer.name,) if "layer" in self.by else (layer.stage, layer.module)

    def moved(self, moves: Mapping[str, float]) -> dict[str, float]:
        """Change the method's own allocation as the best proposal at another sparsity did.

        Args:
            moves: differences of sparsity by key (:attr:`orchestration.sweep.artifacts.Study.moved`).

        Returns:
            The proposal, within the limits of the space.
        """
        limits = self.distributions()
        return {
            key: min(max(own + moves[key], limits[key].low), limits[key].high)
            for key, own in self.own_values().items()
        }


def summarise(
    allocation: Allocation, layers: Sequence[PrunableLayer], by: Sequence[str] = ("stage", "module")
) -> dict[str, float]:
    """The sparsity of each group of layers: of stages (``stage.0``) and modules (``module.QKV``) by default.

    Args:
        allocation: number of pruned weights by layer.
        layers: the prunable layers.
        by: the kinds of groups: ``stage``, ``module``, ``group``, ``layer``.

    Returns:
        Sparsities, 0…1, by the groups' keys.
    """
    pruned: dict[str, int] = {}
    total: dict[str, int] = {}
    for layer in layers:
        for key in _keys(layer, by):
            pruned[key] = pruned.get(key, 0) + allocation[layer.name]
            total[key] = total.get(key, 0) + layer.numel
    return {key: pruned[key] / total[key] for key in sorted(total)}


def recipe_space(space: Mapping[str, Distribution]) -> Space:
    """Optuna's distributions for recipe keys."""
    return {key: _distribution(distribution) for key, distribution in space.items()}


def contains(space: Space, values: Mapping[str, Any]) -> bool:
    """Return whether a proposal lies in the space."""
    return len(inside(space, values)) == len(space)


def inside(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that lie in the space."""
    return {
        key: values[key] for key, domain in space.items() if key in values and _holds(domain, values[key])
    }


class WrittenChoice(optuna.distributions.CategoricalDistribution):  # type: ignore[misc]
    """A choice among mappings or lists, given to Optuna as JSON, because Optuna takes plain values only."""


def to_optuna(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values in the form that Optuna takes."""
    return {key: _written(space[key], value) for key, value in values.items() if key in space}


def from_optuna(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """Optuna's values, in the order of the space."""
    return {key: _read(domain, values[key]) for key, domain in space.items()}


def _holds(distribution: optuna.distributions.BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, optuna.distributions.CategoricalDistribution):
        return _written(distribution, value) in distribution.choices
    return isinstance(value, int | float) and distribution._contains(distribution.to_internal_repr(value))


def _written(distribution: optuna.distributions.BaseDistribution, value: Any) -> Any:
    return json.dumps(value, sort_keys=True) if isinstance(distribution, WrittenChoice) else value


def _read(distribution: optuna.distributions.BaseDistribution, value: Any) -> Any:
    return json.loads(value) if isinstance(distribution, WrittenChoice) else value


def _keys(layer: PrunableLayer, by: Sequence[str]) -> list[str]:
    names = {
        "stage": f"stage.{layer.stage}",
        "module": f"module.{layer.module}",
        "group": f"group.{layer.stage}.{layer.module}",
        "layer": f"layer.{layer.name}",
    }
    return [names[kind] for kind in by]


def _distribution(given: Distribution) -> optuna.distributions.BaseDistribution:
    if given.uniform is not None:
        return optuna.distributions.FloatDistribution(*given.uniform)
    if given.log is not None:
        return optuna.distributions.FloatDistribution(*given.log, log=True)
    if given.integer is not None:
        return optuna.distributions.IntDistribution(*given.integer)
    assert given.choice is not None, "a distribution has exactly one form"
    if any(isinstance(value, dict | list) for value in given.choice):
        return WrittenChoice([json.dumps(value, sort_keys=True) for value in given.choice])
    return optuna.distributions.CategoricalDistribution(given.choice)
