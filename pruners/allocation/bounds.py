"""Bounds on the sparsity of each layer: floors and ceilings, for all layers or by their names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from pruners.errors import InputError, check_share, did_you_mean
from pruners.model.layers import PrunableLayer, matching, stem

Bounds = Mapping[str, tuple[int, int]]
"""Least and largest number of pruned weights in each layer, by parameter name."""

PerLayer = float | Mapping[str, float]
"""One sparsity for all layers, or sparsities by patterns on their names (see :func:`per_layer`)."""


def bounds(
    layers: Sequence[PrunableLayer],
    floor: PerLayer = 0.0,
    ceiling: PerLayer = 1.0,
    pruned: Mapping[str, int] | None = None,
    *,
    reach: Mapping[str, int] | None = None,
    unit: int = 1,
) -> dict[str, tuple[int, int]]:
    """Turn floors and ceilings into numbers of weights.

    The rounding to whole weights forgives binary fractions: 0.07 of 100 weights are 7.

    Args:
        layers: the prunable layers.
        floor: least sparsity of a layer.
        ceiling: largest sparsity of a layer.
        pruned: number of weights that are pruned already in each layer; none of them comes back.
        reach: number of weights of each layer that can be pruned at all; default all.
        unit: number of weights that are pruned together; bounds are multiples of it.

    Returns:
        Least and largest number of pruned weights in each layer, by parameter name.

    Raises:
        InputError: a floor above its ceiling, or one of the errors of :func:`per_layer`.
    """
    least, most = per_layer("floor", floor, layers, 0.0), per_layer("ceiling", ceiling, layers, 1.0)
    limits = {}
    for layer in layers:
        gone = 0 if pruned is None else pruned[layer.name]
        low = math.ceil(least[layer.name] * layer.numel / unit - 1e-6) * unit
        high = math.floor(most[layer.name] * layer.numel / unit + 1e-6) * unit
        if least[layer.name] > most[layer.name]:
            expected = f"must not lie above the ceiling of {layer.name}, {most[layer.name]}"
            raise InputError("floor", least[layer.name], expected)
        low = min(low, high)  # there may be no whole number between two almost equal bounds
        if reach is not None:
            high = min(high, reach[layer.name])
        limits[layer.name] = (max(low, gone), max(high, gone))
    return limits


def group_bounds(groups: Iterable[Sequence[PrunableLayer]], limits: Bounds) -> tuple[list[int], list[int]]:
    """Add up bounds over groups of layers: the least, and the largest number of each group."""
    pairs = [[limits[layer.name] for layer in group] for group in groups]
    return [sum(low for low, _ in group) for group in pairs], [
        sum(high for _, high in group) for group in pairs
    ]


def per_layer(
    key: str, values: PerLayer, layers: Sequence[PrunableLayer], default: float | None
) -> dict[str, float]:
    """Assign a sparsity to each layer, by patterns on its name.

    Args:
        key: what to call ``values`` in an error.
        values: one sparsity for all layers, or sparsities by regular expressions on the end of a layer's
            name, without ``.weight`` or ``_weight``; the last expression that matches counts.
        layers: the prunable layers.
        default: the sparsity of layers that no expression matches; ``None`` makes that an error.

    Returns:
        The sparsity of each layer, by parameter name.

    Raises:
        InputError: a sparsity outside 0…1, an expression that matches no layer or is none, or a layer
            without a sparsity.
    """
    if not isinstance(values, Mapping):
        check_share(key, values)
        return {layer.name: values for layer in layers}
    sparsities: dict[str, float] = {}
    for expression, value in values.items():
        check_share(f"{key}.{expression}", value)
        matched = matching(key, expression, [layer.name for layer in layers])
        if not matched:
            close = did_you_mean(expression, [stem(layer.name) for layer in layers])
            raise InputError(key, expression, f"matches none of the prunable layers{close}")
        sparsities |= dict.fromkeys(matched, value)
    for layer in layers:
        if layer.name not in sparsities:
            if default is None:
                raise InputError(key, dict(values), f"says nothing about {layer.name}")
            sparsities[layer.name] = default
    return sparsities
