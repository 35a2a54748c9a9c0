"""What each layer may give up at least and at most: floors and ceilings, for all layers or by their names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from pruners.errors import InputError, did_you_mean
from pruners.model.layers import PrunableLayer, stem

Bounds = Mapping[str, tuple[int, int]]
"""Least and most pruned weights of each layer, by parameter name."""

PerLayer = float | Mapping[str, float]
"""A sparsity for all layers, or one by patterns on their names."""


def bounds(
    layers: Sequence[PrunableLayer],
    floor: PerLayer = 0.0,
    ceiling: PerLayer = 1.0,
    pruned: Mapping[str, int] | None = None,
    *,
    reach: Mapping[str, int] | None = None,
    unit: int = 1,
) -> dict[str, tuple[int, int]]:
    """Least and most weights that each layer may give up.

    Args:
        floor, ceiling: least and largest sparsity (0.07 of 100 is 7, whatever binary fractions say).
        pruned: weights that are gone already: no layer gets any back.
        reach: how many weights of each layer can fall at all.
        unit: weights that fall together.

    Raises:
        InputError: a floor above its ceiling, and see :func:`per_layer`.
    """
    least, most = per_layer("floor", floor, layers, 0.0), per_layer("ceiling", ceiling, layers, 1.0)
    found = {}
    for layer in layers:
        gone = 0 if pruned is None else pruned[layer.name]
        low = math.ceil(least[layer.name] * layer.numel / unit - 1e-6) * unit
        high = math.floor(most[layer.name] * layer.numel / unit + 1e-6) * unit
        if least[layer.name] > most[layer.name]:
            expected = f"must not lie above the ceiling of {layer.name}, {most[layer.name]}"
            raise InputError("floor", least[layer.name], expected)
        low = min(low, high)  # no whole number may lie between two that are almost equal
        if reach is not None:
            high = min(high, reach[layer.name])
        found[layer.name] = (max(low, gone), max(high, gone))
    return found


def group_bounds(groups: Iterable[Sequence[PrunableLayer]], limits: Bounds) -> tuple[list[int], list[int]]:
    """Least and most weights of whole groups."""
    pairs = [[limits[layer.name] for layer in group] for group in groups]
    return [sum(low for low, _ in group) for group in pairs], [
        sum(high for _, high in group) for group in pairs
    ]


def per_layer(
    key: str, values: PerLayer, layers: Sequence[PrunableLayer], default: float | None
) -> dict[str, float]:
    """A sparsity for each layer, by parameter name.

    Args:
        values: one for all, or regular expressions on the trailing part of a layer's name (without
            ``.weight`` or ``_weight``); the last that matches counts.
        default: for a layer that none matches; ``None``: there must be one.

    Raises:
        InputError: see :func:`by_table`.
    """
    if not isinstance(values, Mapping):
        _check_share(key, values)
        return {layer.name: values for layer in layers}
    found: dict[str, float] = {}
    for expression, value in values.items():
        _check_share(f"{key}.{expression}", value)
        try:
            compiled = re.compile(rf"(?:^|\.)(?:{expression})$")
        except re.error as error:
            raise InputError(key, expression, f"must be a regular expression ({error})") from None
        matched = [layer.name for layer in layers if compiled.search(stem(layer.name))]
        if not matched:
            close = did_you_mean(expression, [stem(layer.name) for layer in layers])
            raise InputError(key, expression, f"matches none of the prunable layers{close}")
        found |= dict.fromkeys(matched, value)
    for layer in layers:
        if layer.name not in found:
            if default is None:
                raise InputError(key, dict(values), f"says nothing about {layer.name}")
            found[layer.name] = default
    return found


def _check_share(key: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise InputError(key, value, "must lie between 0 and 1")
