"""How long a model takes, by its sparse layers: times measured once on a machine, kept as JSON.

The table has the time of each shape of linear layer at some sparsities, and that of the whole model at a few.
A model's time is foretold as that of its layers at their sparsities, and of the rest as it was in whole
models as sparse: a sparse layer hands its results on in another order than a dense one, and what follows pays
for that. Times are what was measured: where zeros gain nothing, or lose, the table says that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

LATENCY_FORMAT = "espalier-latency-1"


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
    whole: seconds of the model for a batch, all its layers equally sparse.
    layers: shapes of the layers that are timed, by their weights' names.
    curves: the times of each shape.
    """

    about: Mapping[str, Any]
    whole: Curve
    layers: Mapping[str, LinearShape]
    curves: Mapping[LinearShape, Curve]

    @cached_property
    def rest(self) -> Curve:
        """Seconds of all that is not those layers; they alone may seem to take longer than the whole."""
        whole = zip(self.whole.sparsities, self.whole.seconds, strict=True)
        return Curve(
            self.whole.sparsities, tuple(max(0.0, took - self._alone(sparsity)) for sparsity, took in whole)
        )

    def at(self, pruned: Mapping[str, int]) -> float:
        """Seconds for a batch with so many weights pruned in each layer; of others zeros gain nothing."""
        counts = {name: pruned.get(name, 0) for name in self.layers}
        numel = sum(shape.numel for shape in self.layers.values())
        times = (self.curves[shape].at(counts[name] / shape.numel) for name, shape in self.layers.items())
        return self.rest.at(sum(counts.values()) / max(numel, 1)) + sum(times)

    def uniform(self, sparsity: float) -> float:
        """Seconds with the same sparsity in each layer."""
        return self.rest.at(sparsity) + self._alone(sparsity)

    def _alone(self, sparsity: float) -> float:
        """Seconds of the layers, each timed by itself."""
        return sum(self.curves[shape].at(sparsity) for shape in self.layers.values())

    def as_json(self) -> dict[str, Any]:
        return {
            "format": LATENCY_FORMAT,
            "about": dict(self.about),
            "whole": _points(self.whole),
            "layers": {name: _numbers(shape) for name, shape in self.layers.items()},
            "curves": [{"shape": _numbers(shape), **_points(curve)} for shape, curve in self.curves.items()],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> LatencyTable:
        """Raises:
        ValueError, KeyError, TypeError: it is no such table.
        """
        if content["format"] != LATENCY_FORMAT:
            raise ValueError(f"is no {LATENCY_FORMAT}")
        curves = {LinearShape(*one["shape"]): _curve(one) for one in content["curves"]}
        layers = {name: LinearShape(*shape) for name, shape in content["layers"].items()}
        if not set(layers.values()) <= curves.keys():
            raise ValueError("has layers without times")
        return cls(content["about"], _curve(content["whole"]), layers, curves)


def _points(curve: Curve) -> dict[str, list[float]]:
    return {"sparsities": list(curve.sparsities), "seconds": list(curve.seconds)}


def _curve(content: Mapping[str, Any]) -> Curve:
    return Curve(tuple(map(float, content["sparsities"])), tuple(map(float, content["seconds"])))


def _numbers(shape: LinearShape) -> Sequence[int]:
    return [shape.outputs, shape.inputs, shape.tokens]
