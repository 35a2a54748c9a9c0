"""Allocation: how many weights each layer loses, by thresholds on the losses or by given sparsities.

Every method puts the weights of a layer in an order (:class:`pruners.elimination.order.EliminationOrder`). An
*allocation* says how many weights are pruned from the beginning of that order. The budget is always met
exactly.
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
"""Number of pruned weights in each layer, by parameter name."""

Scope = Literal["layer", "module", "stage", "global"]
"""Which layers share one threshold: none, those of a DIMAP module or of a stage, or all."""

GROUP_OF: dict[Scope, Callable[[PrunableLayer], Hashable]] = {
    "layer": lambda layer: layer.name,
    "module": lambda layer: layer.module,
    "stage": lambda layer: layer.stage,
    "global": lambda layer: "model",
}


@dataclass(frozen=True)
class Sharing:
    """The way in which a budget is divided among layers.

    >>> sharing = Sharing("global", floor=0.25, ceiling={r"fc\\d": 0.5})
    >>> order = pruners.prune(model, "magnitude", 0.25).order
    >>> sum(sharing.allocate(order.losses, layers, total=2000).values())
    2000

    Args:
        scope: which layers share one threshold; every such group gets the same sparsity.
        floor: least sparsity of a layer: one for all layers, or by patterns on their names (the last
            pattern that matches counts; without a match 0).
        ceiling: largest sparsity of a layer, in the same way (without a match 1).
        table: a sparsity for each layer by patterns on its name, instead of thresholds. It is projected
            onto the budget, and not changed if it meets the budget already.
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
        """Turn floor and ceiling into numbers of weights (see :func:`pruners.allocation.bounds.bounds`).

        Args:
            layers: the prunable layers.
            pruned: number of weights that are pruned already in each layer.
            reach: number of weights of each layer that can be pruned at all; default all.
            unit: number of weights that are pruned together.

        Returns:
            Least and largest number of pruned weights in each layer, by parameter name.
        """
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
        """Divide a budget among layers.

        Args:
            losses: for each layer the losses (k,) of its weights in their elimination order, ascending, as
                far as the order goes.
            layers: the prunable layers.
            total: number of weights to prune over all layers.
            pruned: number of weights that are pruned already in each layer; none of them comes back.
            unit: number of weights that are pruned together; ``total`` is a multiple of it.

        Returns:
            Number of pruned weights in each layer; the sum is ``total``.

        Raises:
            InputError: an unknown scope, a table without one of the layers, or floors and ceilings that
                do not allow ``total``.
        """
        reach = {name: len(ascending) for name, ascending in losses.items()}
        limits = self.limits(layers, pruned, reach, unit)
        if self.table is not None:
            return by_table(self.table, layers, total, limits, unit)
        if self.scope not in GROUP_OF:
            known = f"must be one of {', '.join(GROUP_OF)}{did_you_mean(self.scope, GROUP_OF)}"
            raise InputError("scope", self.scope, known)
        groups = group_layers(layers, GROUP_OF[self.scope])
        sparsity = total / max(sum(layer.numel for layer in layers), 1)
        low, high = group_bounds(groups.values(), limits)
        sizes = [sum(layer.numel for layer in group) for group in groups.values()]
        totals = project([sparsity] * len(sizes), sizes, total, low, high, unit=unit)
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
    """Divide a budget by thresholds, with the same sparsity for every group of ``scope``.

    >>> order = pruners.prune(model, "dimap", 0.25).order
    >>> allocation = allocate(order.losses, layers, 3000, "module")
    >>> sum(allocation.values())
    3000

    Args:
        losses: for each layer the losses of its weights in their elimination order, ascending.
        layers: the prunable layers.
        total: number of weights to prune over all layers.
        scope: which layers share one threshold.
        floor: least sparsity of a layer, or sparsities by patterns on layer names.
        ceiling: largest sparsity of a layer, in the same way.
        pruned: number of weights that are pruned already in each layer.

    Returns:
        Number of pruned weights in each layer; the sum is ``total``.

    Raises:
        InputError: see :meth:`Sharing.allocate`.
    """
    return Sharing(scope, floor, ceiling).allocate(losses, layers, total, pruned=pruned)


def by_table(
    table: Mapping[str, float], layers: Sequence[PrunableLayer], total: int, limits: Bounds, unit: int = 1
) -> Allocation:
    """Project the sparsities of a table onto a budget.

    Args:
        table: a sparsity for each layer by patterns on its name.
        layers: the prunable layers.
        total: number of weights to prune over all layers.
        limits: least and largest number of pruned weights in each layer.
        unit: number of weights that are pruned together.

    Returns:
        Number of pruned weights in each layer; the sum is ``total``.

    Raises:
        InputError: a pattern that matches nothing, a layer that none matches, a sparsity outside 0…1.
    """
    sparsities = per_layer("table", table, layers, None)
    counts = project(
        [sparsities[layer.name] for layer in layers],
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
    """Count in each layer the ``total`` weights of lowest loss over all layers together.

    Of equal losses those of the earlier layer come first.

    Args:
        losses: for each layer the losses of its weights in their elimination order, ascending.
        layers: the layers that share the threshold.
        total: number of weights to prune over these layers.
        limits: least and largest number of pruned weights in each layer; default 0 and all.
        unit: number of weights that are pruned together, at the loss of the last of them.

    Returns:
        Number of pruned weights in each layer; the sum is ``total``.

    Raises:
        InputError: ``limits`` do not allow ``total``.
    """
    limits = bounds(layers) if limits is None else limits
    low = {layer.name: limits[layer.name][0] for layer in layers}
    high = {layer.name: limits[layer.name][1] for layer in layers}
    check_feasible(total, np.array(list(low.values())), np.array(list(high.values())))
    if unit > 1:
        whole = [replace(layer, shape=(1, layer.numel // unit)) for layer in layers]
        smaller = {name: (least // unit, high[name] // unit) for name, least in low.items()}
        ends = {layer.name: losses[layer.name][unit - 1 :: unit] for layer in layers}
        units = by_threshold(ends, whole, total // unit, smaller)
        return {name: count * unit for name, count in units.items()}
    free = [losses[layer.name][low[layer.name] : high[layer.name]].double().contiguous() for layer in layers]
    taken = _below_threshold(free, total - sum(low.values()))
    return {layer.name: low[layer.name] + count for layer, count in zip(layers, taken, strict=True)}


def _below_threshold(ascending: Sequence[Tensor], total: int) -> list[int]:
    """Count in each of some ascending lists those of its numbers that are among the ``total`` smallest.

    Of equal numbers those of the earlier list come first. The threshold is found by bisection, so that no
    list is sorted again.
    """

    def up_to(bits: int, *, right: bool) -> list[int]:
        value = np.int64(bits).view(np.float64)
        return [int(torch.searchsorted(numbers, float(value), right=right)) for numbers in ascending]

    # the bits of non-negative floats, read as integers, are in the same order as the floats
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
    """Collect layers by a key; groups come in the order of their first layer."""
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
    """Scale an allocation down to the smaller budget of an earlier step of a gradual run.

    No layer gets more than ``allocation`` gives it, and none less than ``at_least``. Zeros therefore stay
    zeros up to the last step, which is ``allocation`` itself.

    Args:
        allocation: number of pruned weights in each layer at the end.
        layers: the prunable layers.
        total: number of weights to prune at this step.
        at_least: number of weights that are pruned already in each layer.
        unit: number of weights that are pruned together.

    Returns:
        Number of pruned weights in each layer; the sum is ``total``.
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
