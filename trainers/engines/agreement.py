"""How far an engine's answers lie from torch's, and how far they may."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

TOLERANCE: Mapping[str, float] = MappingProxyType(
    {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.05, "int8": 0.1, "int8-bfloat16": 0.1}
)
"""By data type, the largest :attr:`Agreement.relative` of an answer that counts as the model's.

Measured on a ViT and a Swin: 3e-7 in float32, 4e-3 in bfloat16, 0.01 to 0.04 in INT8. Quantisation that went
wrong gave 0.15 and 0.42, with hardly another top-1: accuracy alone would not show it.
"""


@dataclass(frozen=True)
class Agreement:
    """``largest``: of the differences of two logits. ``relative``: the root of their mean square, over that
    of torch's logits. ``top1``: share of the images to which both give the same class."""

    largest: float
    relative: float
    top1: float

    @classmethod
    def of(cls, found: NDArray[np.float32], expected: NDArray[np.float32]) -> Agreement:
        """Two answers to the same images, (N, classes); what is not finite, or of another shape, is apart."""
        if found.shape != expected.shape or not np.isfinite(found).all():
            return cls(np.inf, np.inf, 0.0)
        apart = found.astype(np.float64) - expected
        size = float(np.sqrt(np.mean(np.square(expected, dtype=np.float64))))
        return cls(
            largest=float(np.abs(apart).max()),
            relative=float(np.sqrt(np.mean(apart**2))) / max(size, float(np.finfo(np.float32).tiny)),
            top1=float(np.mean(found.argmax(1) == expected.argmax(1))),
        )

    def holds(self, kind: str) -> bool:
        """Whether it is small enough for a data type."""
        return self.relative <= TOLERANCE[kind]

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.largest:.1e} at most, {self.relative:.1e} relative, same class {100 * self.top1:.1f} %"
