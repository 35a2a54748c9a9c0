"""What of a model is not prunable as its layers are chosen: how much, which weights, and how to name them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from pruners.model.layers import PrunableLayer, stem, weights_of

_NUMBER = re.compile(r"\d+")
_SHOWN = 4


@dataclass(frozen=True)
class Group:
    """Weights whose names differ in numbers alone; ``pattern`` is what ``layers`` would take them by."""

    pattern: str
    layers: int
    weights: int

    def __str__(self) -> str:
        layers = "1 layer" if self.layers == 1 else f"{self.layers} layers"
        return f"{self.pattern} ({layers}, {self.weights:,} weights)"


@dataclass(frozen=True)
class LeftDense:
    """The weights of a model that its chosen layers leave out.

    Attributes:
        parameters: that are in no prunable layer, of ``total``; biases, norms and tables too.
        groups: of weights that patterns could name, the largest first.
    """

    parameters: int
    total: int
    groups: tuple[Group, ...]

    @classmethod
    def of(cls, model: nn.Module, layers: Iterable[PrunableLayer]) -> LeftDense:
        """Of a model (on the meta device too) with these prunable layers."""
        taken = {layer.name: layer.numel for layer in layers}
        total = sum(parameter.numel() for parameter in model.parameters())
        groups: dict[str, tuple[int, int]] = {}
        for name, numel in weights_of(model).items():
            if name not in taken:
                pattern = _NUMBER.sub(r"\\d+", re.escape(stem(name)))
                count, weights = groups.get(pattern, (0, 0))
                groups[pattern] = count + 1, weights + numel
        found = (Group(pattern, *sizes) for pattern, sizes in groups.items())
        largest = tuple(sorted(found, key=lambda group: -group.weights))
        return cls(total - sum(taken.values()), total, largest)

    @property
    def share(self) -> float:
        return self.parameters / max(self.total, 1)

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.groups[:_SHOWN]))
        more = len(self.groups) - _SHOWN
        rest = f" and {more} more kinds" if more > 0 else ""
        return f"{100 * self.share:.1f} % of the parameters: {shown or 'biases, norms, tables'}{rest}"

    def as_json(self) -> dict[str, Any]:
        kinds = [
            {"pattern": one.pattern, "layers": one.layers, "weights": one.weights} for one in self.groups
        ]
        return {"parameters": self.parameters, "share": self.share, "kinds": kinds}
