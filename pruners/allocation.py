"""How many weights each layer gives up: exact to one weight, by a threshold or by given sparsities.

Every method orders the weights of a layer (:class:`pruners.order.EliminationOrder`); an *allocation* says how
far each layer goes along its order. The budget is always met exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pruners.errors import InputError, did_you_mean
from pruners.layers import PrunableLayer

Allocation = dict[str, int]
"""Pruned weights of each layer, by parameter name."""

Bounds = Mapping[str, tuple[int, int]]
"""Least and most pruned weights of each layer, by parameter name."""

Scope = Literal["layer", "module", "stage", "global"]
"""What shares one threshold: each layer for itself, a DIMAP module, a stage, or the whole model."""

GROUP_OF: dict[Scope, Callable[[PrunableLayer], Hashable]] = {
    "layer": lambda layer: layer.name,
    "module": lambda layer: layer.module,
    "stage": lambda layer: layer.stage,
    "global": lambda layer: "model",
}


def budget(layers: Sequence[PrunableLayer], sparsity: float) -> int:
    """The number of weights that ``sparsity`` (0 to 1) of the prunable ones is.

    Raises:
        InputError: ``sparsity`` outside 0…1.
    """
    if not 0.0 <= sparsity <= 1.0:
        raise InputError("sparsity", sparsity, "must lie between 0 and 1")
    return round(sparsity * sum(layer.numel for layer in layers))


def project(
    desired: Sequence[float],
    sizes: Sequence[int],
    total: int,
    lower: Sequence[int] | None = None,
    upper: Sequence[int] | None = None,
) -> list[int]:
    """Integer counts that add up to ``total``, nearest to the ``desired`` sparsities of groups of ``sizes``.

    The same shift is added to every sparsity and the result clipped to its bounds: the projection in the
    norm weighted by group size. Rounding goes to the largest remainders. Sparsities that already meet the
    budget come back unchanged.

    Args:
        desired: sparsity of each group, any real number (clipped).
        sizes: weights of each group.
        total: weights to prune over all groups.
        lower: least count of each group (default 0).
        upper: largest count of each group (default its size).

    Raises:
        InputError: bounds that cannot meet ``total``, with the nearest total that can be met.
    """
    size = np.asarray(sizes, dtype=np.float64)
    low = np.zeros(len(size)) if lower is None else np.asarray(lower, dtype=np.float64)
    high = size.copy() if upper is None else np.asarray(upper, dtype=np.float64)
    check_feasible(total, low, high)
    wish = np.asarray(desired, dtype=np.float64) * size

    def counts(shift: float) -> np.ndarray:
        return np.asarray(np.clip(wish + shift * size, low, high))

    # wide enough for every group to reach either bound, however far its wish lies outside 0…1
    reach = 1.0 + float(np.max(np.abs(wish / np.maximum(size, 1.0)), initial=0.0))
    left, right = -reach, reach
    for _ in range(100):
        middle = (left + right) / 2
        if counts(middle).sum() < total:
            left = middle
        else:
            right = middle
    shift = 0.0 if abs(counts(0.0).sum() - total) < 1e-6 else right
    return _round_to(counts(shift), total, low, high)


def check_feasible(total: int, low: np.ndarray, high: np.ndarray) -> None:
    """Raise :class:`InputError`, with the nearest feasible budget, unless Σ low ≤ total ≤ Σ high."""
    if (low > high).any():
        raise InputError("floor", int(low[low > high][0]), "must not lie above the layer's ceiling")
    if not low.sum() <= total <= high.sum():
        nearest = int(low.sum() if total < low.sum() else high.sum())
        raise InputError(
            "budget",
            total,
            f"cannot be met within the floors and ceilings; nearest feasible: {nearest} weights",
        )


def _round_to(real: np.ndarray, total: int, low: np.ndarray, high: np.ndarray) -> list[int]:
    """Round so that the sum is ``total``; each result stays within one of its real value and its bounds."""
    whole = np.floor(real + 1e-9)
    missing = int(total - whole.sum())
    step = 1 if missing >= 0 else -1
    room = (whole < high) if step > 0 else (whole > low)
    ranked = np.argsort(-step * (real - whole), kind="stable")
    for index in [i for i in ranked if room[i]][: abs(missing)]:
        whole[index] += step
    assert int(whole.sum()) == total, "the rounding missed the budget"
    return [int(count) for count in whole]


def allocate(
    losses: Mapping[str, Tensor],
    layers: Sequence[PrunableLayer],
    total: int,
    scope: Scope,
    *,
    floor: float = 0.0,
    ceiling: float = 1.0,
    pruned: Mapping[str, int] | None = None,
) -> Allocation:
    """Share ``total`` by thresholds: every group of ``scope`` at the same sparsity, one threshold within it.

    Args:
        losses: for each layer the ascending losses of its weights in their order of falling.
        floor, ceiling: least and largest sparsity of every layer.
        pruned: weights that each layer has lost already, and never gets back.

    Raises:
        InputError: an unknown scope, or floors and ceilings that cannot meet ``total``.
    """
    if scope not in GROUP_OF:
        raise InputError(
            "scope", scope, f"must be one of {', '.join(GROUP_OF)}{did_you_mean(scope, GROUP_OF)}"
        )
    groups = group_layers(layers, GROUP_OF[scope])
    wanted = total / max(sum(layer.numel for layer in layers), 1)
    limits = bounds(layers, floor, ceiling, pruned)
    low, high = group_bounds(groups.values(), limits)
    sizes = [sum(layer.numel for layer in group) for group in groups.values()]
    totals = project([wanted] * len(sizes), sizes, total, low, high)
    allocation: Allocation = {}
    for group, count in zip(groups.values(), totals, strict=True):
        allocation.update(by_threshold(losses, group, count, limits))
    return {layer.name: allocation[layer.name] for layer in layers}


def by_threshold(
    losses: Mapping[str, Tensor],
    layers: Sequence[PrunableLayer],
    total: int,
    limits: Bounds | None = None,
) -> Allocation:
    """The ``total`` weights of lowest loss over ``layers`` together (ties: the earlier layer falls first)."""
    limits = bounds(layers) if limits is None else limits
    low = {layer.name: limits[layer.name][0] for layer in layers}
    high = {layer.name: limits[layer.name][1] for layer in layers}
    check_feasible(total, np.array(list(low.values())), np.array(list(high.values())))
    free = [losses[layer.name][low[layer.name] : high[layer.name]].double() for layer in layers]
    owner = torch.cat([torch.full((len(part),), i) for i, part in enumerate(free)])
    chosen = torch.sort(torch.cat(free).cpu(), stable=True).indices[: total - sum(low.values())]
    taken = torch.bincount(owner[chosen], minlength=len(layers)).tolist()
    return {layer.name: low[layer.name] + count for layer, count in zip(layers, taken, strict=True)}


def bounds(
    layers: Sequence[PrunableLayer],
    floor: float = 0.0,
    ceiling: float = 1.0,
    pruned: Mapping[str, int] | None = None,
) -> dict[str, tuple[int, int]]:
    """Least and most weights that each layer may give up.

    Args:
        floor, ceiling: least and largest sparsity (0.07 of 100 is 7, whatever binary fractions say).
        pruned: weights that are gone already: no layer gets any back.
    """
    found = {}
    for layer in layers:
        gone = 0 if pruned is None else pruned[layer.name]
        low = math.ceil(floor * layer.numel - 1e-6)
        high = math.floor(ceiling * layer.numel + 1e-6)
        found[layer.name] = (max(low, gone), max(high, gone))
    return found


def group_bounds(groups: Iterable[Sequence[PrunableLayer]], limits: Bounds) -> tuple[list[int], list[int]]:
    """Least and most weights of whole groups."""
    pairs = [[limits[layer.name] for layer in group] for group in groups]
    return [sum(low for low, _ in group) for group in pairs], [
        sum(high for _, high in group) for group in pairs
    ]


def group_layers(
    layers: Sequence[PrunableLayer], key: Callable[[PrunableLayer], Hashable]
) -> dict[Hashable, list[PrunableLayer]]:
    """Layers by group, groups in the order of their first layer."""
    groups: dict[Hashable, list[PrunableLayer]] = {}
    for layer in layers:
        groups.setdefault(key(layer), []).append(layer)
    return groups


def scale(
    allocation: Allocation, layers: Sequence[PrunableLayer], total: int, at_least: Allocation
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
    )
    return {layer.name: count for layer, count in zip(layers, counts, strict=True)}
