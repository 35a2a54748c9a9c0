"""Compare the logits of an engine with those of torch, within a tolerance for each data type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

TOLERANCE: Mapping[str, float] = MappingProxyType(
    {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.05, "int8": 0.1, "int8-bfloat16": 0.1}
)
"""By data type, the largest :attr:`Agreement.relative` that is accepted.

Measured on a ViT and a Swin: 3e-7 in float32, 4e-3 in bfloat16, 0.01 to 0.04 in INT8. Faulty quantization
gave 0.15 and 0.42 with almost the same top-1: accuracy alone would not show it.
"""
_OF_ENGINES: Mapping[tuple[str, str], float] = MappingProxyType({("sparse", "float32"): 1e-4})
"""Smaller tolerances for some engines: the kernels of ``sparse`` are our own."""


def tolerance_of(engine: str, kind: str) -> float:
    """The largest :attr:`Agreement.relative` that is accepted of an engine in a data type."""
    return _OF_ENGINES.get((engine, kind), TOLERANCE[kind])


@dataclass(frozen=True)
class Agreement:
    """The difference between the logits of an engine and torch's, over a set of images.

    Attributes:
        largest: the largest absolute difference.
        relative: the root mean square of the differences, divided by that of torch's logits.
        top1: share of the images for which both predict the same class.
    """

    largest: float
    relative: float
    top1: float

    @classmethod
    def of(cls, answers: NDArray[np.float32], expected: NDArray[np.float32]) -> Agreement:
        """Compare logits (N, classes) of the same images.

        Logits that are not finite, or of another shape, are infinitely far apart.

        Args:
            answers: of the engine.
            expected: of torch.
        """
        if answers.shape != expected.shape or not np.isfinite(answers).all():
            return cls(np.inf, np.inf, 0.0)
        difference = answers.astype(np.float64) - expected
        size = float(np.sqrt(np.mean(np.square(expected, dtype=np.float64))))
        return cls(
            largest=float(np.abs(difference).max()),
            relative=float(np.sqrt(np.mean(difference**2))) / max(size, float(np.finfo(np.float32).tiny)),
            top1=float(np.mean(answers.argmax(1) == expected.argmax(1))),
        )

    def holds(self, kind: str, engine: str = "") -> bool:
        """Return whether the difference is within the tolerance of the data type, or that of the engine."""
        return self.relative <= tolerance_of(engine, kind)

    def as_dict(self) -> dict[str, float]:
        """The figures by their names, for a record."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.largest:.1e} at most, {self.relative:.1e} relative, same class {100 * self.top1:.1f} %"
