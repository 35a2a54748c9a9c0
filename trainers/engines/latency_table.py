"""Predict the latency of a sparse model from times that were measured once on a machine, stored as JSON.

The table has the times of each shape of linear layer at several sparsities, and those of the whole model at a
few. The predicted time of a model is the sum of its layers' times at their sparsities and of the rest. The
rest is what whole models of the same sparsity took beyond their layers: it depends on the sparsity, because a
sparse layer writes its results in another memory order than a dense one, which slows down what follows. Times
are not smoothed: where zeros gain nothing, or cost time, the table shows that.
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
    """The shape of a linear layer's weight (outputs, inputs), and the number of tokens of an image."""

    outputs: int
    inputs: int
    tokens: int

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.outputs * self.inputs


@dataclass(frozen=True)
class Curve:
    """Seconds that a layer or a model takes for a batch, at ascending sparsities.

    Raises:
        ValueError: sparsities without times, or that do not ascend.
    """

    sparsities: tuple[float, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.sparsities) != len(self.seconds) or not self.sparsities:
            raise ValueError("a curve has a time for each sparsity")
        if any(low >= high for low, high in pairwise(self.sparsities)):
            raise ValueError("sparsities must ascend")

    def at(self, sparsity: float) -> float:
        """Seconds at a sparsity: interpolated linearly, and constant outside the measured range."""
        return float(np.interp(sparsity, self.sparsities, self.seconds))


@dataclass(frozen=True)
class LatencyTable:
    """The times of a model's linear layers and of the whole model, on one machine and engine.

    Attributes:
        about: the machine, the engine and its settings, and the model for which the times were measured.
        whole: seconds of the model for a batch, with all its layers equally sparse.
        layers: shapes of the timed layers, by the names of their weights.
        curves: the times of each shape.
    """

    about: Mapping[str, Any]
    whole: Curve
    layers: Mapping[str, LinearShape]
    curves: Mapping[LinearShape, Curve]

    @cached_property
    def rest(self) -> Curve:
        """Seconds of all but the timed layers, at least 0: layers alone may take longer than in a model."""
        whole = zip(self.whole.sparsities, self.whole.seconds, strict=True)
        return Curve(
            self.whole.sparsities, tuple(max(0.0, took - self._alone(sparsity)) for sparsity, took in whole)
        )

    def at(self, pruned: Mapping[str, int]) -> float:
        """Predict the seconds for a batch.

        Args:
            pruned: number of pruned weights by layer; layers that are not timed make no difference.
        """
        counts = {name: pruned.get(name, 0) for name in self.layers}
        numel = sum(shape.numel for shape in self.layers.values())
        times = (self.curves[shape].at(counts[name] / shape.numel) for name, shape in self.layers.items())
        return self.rest.at(sum(counts.values()) / max(numel, 1)) + sum(times)

    def uniform(self, sparsity: float) -> float:
        """Predict the seconds for a batch with the same sparsity (0…1) in each layer."""
        return self.rest.at(sparsity) + self._alone(sparsity)

    def _alone(self, sparsity: float) -> float:
        """Sum of the seconds of the layers, each timed alone."""
        return sum(self.curves[shape].at(sparsity) for shape in self.layers.values())

    def as_json(self) -> dict[str, Any]:
        """The table as JSON can hold it; :meth:`from_json` reads it."""
        return {
            "format": LATENCY_FORMAT,
            "about": dict(self.about),
            "whole": _points(self.whole),
            "layers": {name: _numbers(shape) for name, shape in self.layers.items()},
            "curves": [{"shape": _numbers(shape), **_points(curve)} for shape, curve in self.curves.items()],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> LatencyTable:
        """Read a table that :meth:`as_json` made.

        Raises:
            ValueError: another format, or layers without times.
            KeyError: a part is missing.
            TypeError: a part is of another type.
        """
        if content["format"] != LATENCY_FORMAT:
            raise ValueError(f"is no {LATENCY_FORMAT}")
        curves = {LinearShape(*entry["shape"]): _curve(entry) for entry in content["curves"]}
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
