"""The parameters that a choice of prunable layers leaves dense: their share, and patterns that name them."""

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
    """Weights whose names differ in numbers only.

    Attributes:
        pattern: a regular expression that matches them, for the setting ``layers``.
        layers: how many weight tensors they are.
        weights: how many weights they have together.
    """

    pattern: str
    layers: int
    weights: int

    def __str__(self) -> str:
        layers = "1 layer" if self.layers == 1 else f"{self.layers} layers"
        return f"{self.pattern} ({layers}, {self.weights:,} weights)"


@dataclass(frozen=True)
class LeftDense:
    """The parameters of a model that are in no prunable layer.

    Attributes:
        parameters: how many there are, biases, norms and tables included.
        total: all parameters of the model.
        groups: the weights among them that patterns can name, the largest group first.
    """

    parameters: int
    total: int
    groups: tuple[Group, ...]

    @classmethod
    def of(cls, model: nn.Module, layers: Iterable[PrunableLayer]) -> LeftDense:
        """Find the parameters outside the prunable ``layers`` of a model, on any device, meta included."""
        taken = {layer.name: layer.numel for layer in layers}
        total = sum(parameter.numel() for parameter in model.parameters())
        groups: dict[str, tuple[int, int]] = {}
        for name, numel in weights_of(model).items():
            if name not in taken:
                pattern = _NUMBER.sub(r"\\d+", re.escape(stem(name)))
                count, weights = groups.get(pattern, (0, 0))
                groups[pattern] = count + 1, weights + numel
        largest_first = sorted(
            (Group(pattern, *sizes) for pattern, sizes in groups.items()), key=lambda group: -group.weights
        )
        return cls(total - sum(taken.values()), total, tuple(largest_first))

    @property
    def share(self) -> float:
        """Dense share of all parameters, 0 to 1."""
        return self.parameters / max(self.total, 1)

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.groups[:_SHOWN]))
        more = len(self.groups) - _SHOWN
        rest = f" and {more} more kinds" if more > 0 else ""
        return f"{100 * self.share:.1f} % of the parameters: {shown or 'biases, norms, tables'}{rest}"

    def as_json(self) -> dict[str, Any]:
        """The same as a record for JSON."""
        kinds = [
            {"pattern": group.pattern, "layers": group.layers, "weights": group.weights}
            for group in self.groups
        ]
        return {"parameters": self.parameters, "share": self.share, "kinds": kinds}
