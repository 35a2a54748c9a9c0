"""How long a model takes, by its sparse layers: times measured once on a machine, kept as JSON.

The table has the time of each shape of linear layer at some sparsities, and that of the whole dense model.
A model's time is foretold as that of its layers at their sparsities, and of the rest as it is in the dense
model. Times are what was measured: where zeros gain nothing, or lose, the table says that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

FORMAT = "espalier-latency-1"


@dataclass(frozen=True, order=True)
class LinearShape:
    """A linear layer as an engine sees it: so many outputs and inputs, for so many tokens of an image."""

    outputs: int
    inputs: int
    tokens: int

    @property
    def numel(self) -> int:
        return self.outputs * self.inputs


@dataclass(frozen=True)
class Curve:
    """Seconds that a layer takes for a batch, at ascending sparsities."""

    sparsities: tuple[float, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.sparsities) != len(self.seconds) or not self.sparsities:
            raise ValueError("a curve has a time for each sparsity")
        if any(one >= other for one, other in pairwise(self.sparsities)):
            raise ValueError("sparsities must ascend")

    def at(self, sparsity: float) -> float:
        """Between two measured sparsities on the line between them; outside as at the nearest."""
        return float(np.interp(sparsity, self.sparsities, self.seconds))


@dataclass(frozen=True)
class LatencyTable:
    """Attributes:
    about: the machine, the engine and how it was run, and the model: what the times hold for.
    whole: seconds of the dense model for a batch.
    layers: shapes of the layers that are timed, by their weights' names.
    curves: the times of each shape.
    """

    about: Mapping[str, Any]
    whole: float
    layers: Mapping[str, LinearShape]
    curves: Mapping[LinearShape, Curve]

    @cached_property
    def rest(self) -> float:
        """Seconds of all that is not those layers; they alone may seem to take longer than the whole."""
        return max(0.0, self.whole - sum(self.curves[shape].at(0.0) for shape in self.layers.values()))

    def at(self, pruned: Mapping[str, int]) -> float:
        """Seconds for a batch with so many weights pruned in each layer; of others zeros gain nothing."""
        return self.rest + sum(
            self.curves[shape].at(pruned.get(name, 0) / shape.numel) for name, shape in self.layers.items()
        )

    def uniform(self, sparsity: float) -> float:
        """Seconds with the same sparsity in each layer."""
        return self.rest + sum(self.curves[shape].at(sparsity) for shape in self.layers.values())

    def as_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "about": dict(self.about),
            "whole": self.whole,
            "layers": {name: _numbers(shape) for name, shape in self.layers.items()},
            "curves": [
                {
                    "shape": _numbers(shape),
                    "sparsities": list(curve.sparsities),
                    "seconds": list(curve.seconds),
                }
                for shape, curve in self.curves.items()
            ],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> LatencyTable:
        """Raises:
        ValueError, KeyError, TypeError: it is no such table.
        """
        if content["format"] != FORMAT:
            raise ValueError(f"is no {FORMAT}")
        curves = {
            LinearShape(*one["shape"]): Curve(tuple(one["sparsities"]), tuple(one["seconds"]))
            for one in content["curves"]
        }
        layers = {name: LinearShape(*shape) for name, shape in content["layers"].items()}
        if not set(layers.values()) <= curves.keys():
            raise ValueError("has layers without times")
        return cls(content["about"], float(content["whole"]), layers, curves)


def _numbers(shape: LinearShape) -> Sequence[int]:
    return [shape.outputs, shape.inputs, shape.tokens]
