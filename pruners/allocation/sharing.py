"""How many weights each layer gives up: exact to one weight, by a threshold or by given sparsities.

Every method orders the weights of a layer (:class:`pruners.elimination.order.EliminationOrder`); an
*allocation* says how far each layer goes along its order. The budget is always met exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pruners.allocation.bounds import Bounds, PerLayer, bounds, group_bounds, per_layer
from pruners.allocation.projection import check_feasible, project
from pruners.errors import InputError, did_you_mean
from pruners.model.layers import PrunableLayer

Allocation = dict[str, int]
"""Pruned weights of each layer, by parameter name."""

Scope = Literal["layer", "module", "stage", "global"]
"""What shares one threshold: each layer for itself, a DIMAP module, a stage, or the whole model."""

GROUP_OF: dict[Scope, Callable[[PrunableLayer], Hashable]] = {
    "layer": lambda layer: layer.name,
    "module": lambda layer: layer.module,
    "stage": lambda layer: layer.stage,
    "global": lambda layer: "model",
}


@dataclass(frozen=True)
class Sharing:
    """How a budget is shared out among layers, between their floors and ceilings.

    Args:
        scope: what shares one threshold, every such group at the same sparsity.
        floor, ceiling: least and largest sparsity of a layer: one for all, or by patterns on layer names
            (the last that matches counts; without a match 0 and 1).
        table: a sparsity for each layer by patterns on its name, in place of thresholds; it is projected
            onto the budget, and taken as it is if it meets it.
    """

    scope: Scope = "global"
    floor: PerLayer = 0.0
    ceiling: PerLayer = 1.0
    table: Mapping[str, float] | None = None

    def limits(
        self,
        layers: Sequence[PrunableLayer],
        pruned: Mapping[str, int] | None = None,
        reach: Mapping[str, int] | None = None,
        unit: int = 1,
    ) -> dict[str, tuple[int, int]]:
        """Least and most weights that each layer may give up, in whole units (see :func:`bounds`)."""
        return bounds(layers, self.floor, self.ceiling, pruned, reach=reach, unit=unit)

    def allocate(
        self,
        losses: Mapping[str, Tensor],
        layers: Sequence[PrunableLayer],
        total: int,
        *,
        pruned: Mapping[str, int] | None = None,
        unit: int = 1,
    ) -> Allocation:
        """Pruned weights of each layer, ``total`` in all.

        Args:
            losses: for each layer the ascending losses of its weights in their order of falling, as far as
                they may fall.
            pruned: weights that each layer has lost already, and never gets back.
            unit: weights that fall together; ``total`` is a multiple of it.

        Raises:
            InputError: an unknown scope, a table without one of the layers, or floors and ceilings that
                cannot meet ``total``.
        """
        limits = self.limits(layers, pruned, {name: len(found) for name, found in losses.items()}, unit)
        if self.table is not None:
            return by_table(self.table, layers, total, limits, unit)
        if self.scope not in GROUP_OF:
            known = f"must be one of {', '.join(GROUP_OF)}{did_you_mean(self.scope, GROUP_OF)}"
            raise InputError("scope", self.scope, known)
        groups = group_layers(layers, GROUP_OF[self.scope])
        wanted = total / max(sum(layer.numel for layer in layers), 1)
        low, high = group_bounds(groups.values(), limits)
        sizes = [sum(layer.numel for layer in group) for group in groups.values()]
        totals = project([wanted] * len(sizes), sizes, total, low, high, unit=unit)
        allocation: Allocation = {}
        for group, count in zip(groups.values(), totals, strict=True):
            allocation.update(by_threshold(losses, group, count, limits, unit))
        return {layer.name: allocation[layer.name] for layer in layers}


def allocate(
    losses: Mapping[str, Tensor],
    layers: Sequence[PrunableLayer],
    total: int,
    scope: Scope,
    *,
    floor: PerLayer = 0.0,
    ceiling: PerLayer = 1.0,
    pruned: Mapping[str, int] | None = None,
) -> Allocation:
    """Share ``total`` by thresholds: every group of ``scope`` at the same sparsity (see :class:`Sharing`)."""
    return Sharing(scope, floor, ceiling).allocate(losses, layers, total, pruned=pruned)


def by_table(
    table: Mapping[str, float], layers: Sequence[PrunableLayer], total: int, limits: Bounds, unit: int = 1
) -> Allocation:
    """The sparsities of a table, projected onto the budget.

    Raises:
        InputError: a pattern that matches nothing, a layer that none matches, a sparsity outside 0…1.
    """
    wanted = per_layer("table", table, layers, None)
    counts = project(
        [wanted[layer.name] for layer in layers],
        [layer.numel for layer in layers],
        total,
        [limits[layer.name][0] for layer in layers],
        [limits[layer.name][1] for layer in layers],
        unit=unit,
    )
    return {layer.name: count for layer, count in zip(layers, counts, strict=True)}


def by_threshold(
    losses: Mapping[str, Tensor],
    layers: Sequence[PrunableLayer],
    total: int,
    limits: Bounds | None = None,
    unit: int = 1,
) -> Allocation:
    """The ``total`` weights of lowest loss over ``layers`` together (ties: the earlier layer falls first).

    With ``unit`` above 1 so many fall at once, at the loss of the last of them.
    """
    limits = bounds(layers) if limits is None else limits
    low = {layer.name: limits[layer.name][0] for layer in layers}
    high = {layer.name: limits[layer.name][1] for layer in layers}
    check_feasible(total, np.array(list(low.values())), np.array(list(high.values())))
    if unit > 1:
        whole = [replace(layer, shape=(1, layer.numel // unit)) for layer in layers]
        smaller = {name: (least // unit, high[name] // unit) for name, least in low.items()}
        ends = {layer.name: losses[layer.name][unit - 1 :: unit] for layer in layers}
        found = by_threshold(ends, whole, total // unit, smaller)
        return {name: count * unit for name, count in found.items()}
    free = [losses[layer.name][low[layer.name] : high[layer.name]].double().contiguous() for layer in layers]
    taken = _below_threshold(free, total - sum(low.values()))
    return {layer.name: low[layer.name] + count for layer, count in zip(layers, taken, strict=True)}


def _below_threshold(ascending: Sequence[Tensor], total: int) -> list[int]:
    """How many of the ``total`` smallest numbers each of some ascending lists holds (ties: the earlier list).

    The threshold is found by bisection: each list is asked how many it has below, and none is sorted again.
    """

    def up_to(bits: int, *, right: bool) -> list[int]:
        value = np.int64(bits).view(np.float64)
        return [int(torch.searchsorted(one, float(value), right=right)) for one in ascending]

    # non-negative numbers are ordered as their bits are
    low, high = -1, int(np.float64(np.inf).view(np.int64))
    while high - low > 1:
        middle = (low + high) // 2
        if sum(up_to(middle, right=True)) >= total:
            high = middle
        else:
            low = middle
    taken = up_to(high, right=False)
    left = total - sum(taken)
    for number, most in enumerate(up_to(high, right=True)):
        more = min(left, most - taken[number])
        taken[number] += more
        left -= more
    return taken


def group_layers(
    layers: Sequence[PrunableLayer], key: Callable[[PrunableLayer], Hashable]
) -> dict[Hashable, list[PrunableLayer]]:
    """Layers by group, groups in the order of their first layer."""
    groups: dict[Hashable, list[PrunableLayer]] = {}
    for layer in layers:
        groups.setdefault(key(layer), []).append(layer)
    return groups


def scale(
    allocation: Allocation,
    layers: Sequence[PrunableLayer],
    total: int,
    at_least: Allocation,
    unit: int = 1,
) -> Allocation:
    """An allocation for an earlier ``total`` of a gradual run: ``allocation``'s sparsities scaled down.

    Never more than ``allocation`` gives a layer, never less than ``at_least`` (what is pruned already),
    so that zeros stay zeros up to the last step, which is ``allocation`` itself.
    """
    share = total / max(sum(allocation.values()), 1)
    counts = project(
        [share * allocation[layer.name] / layer.numel for layer in layers],
        [layer.numel for layer in layers],
        total,
        [at_least[layer.name] for layer in layers],
        [max(allocation[layer.name], at_least[layer.name]) for layer in layers],
        unit=unit,
    )
    return {layer.name: count for layer, count in zip(layers, counts, strict=True)}
