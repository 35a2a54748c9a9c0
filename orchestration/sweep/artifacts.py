"""What each phase of a sweep hands to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestration.state.trial_log import TrialRecord


@dataclass(frozen=True)
class Dense:
    """The dense model: its checkpoint, its validation top-1, and the registered version that it was.

    ``weights`` is the hash of its content: the same model is the same wherever it lies.
    """

    checkpoint: str
    top1: float
    weights: str
    version: str | None = None


@dataclass(frozen=True)
class Study:
    """The allocation search at one sparsity: its best trial, and the one-shot model that it gives."""

    best: TrialRecord
    checkpoint: str
    trials: list[TrialRecord]

    @property
    def allocation(self) -> dict[str, int]:
        allocation: dict[str, int] = self.best.metrics["allocation"]
        return allocation

    @property
    def own(self) -> TrialRecord | None:
        """The trial of the method's own allocation: the first of those that were given."""
        given = [record for record in self.trials if record.given]
        return min(given, key=lambda record: record.number, default=None)

    @property
    def sparsity(self) -> float:
        """Sparsity of the chosen model."""
        sparsity: float = self.best.metrics["sparsity"]
        return sparsity

    @property
    def name(self) -> str:
        return "own" if self.own is not None and self.best.values == self.own.values else "searched"

    @property
    def moved(self) -> dict[str, float] | None:
        """How far the best proposal lies from the method's own."""
        own = self.own
        return None if own is None else {key: self.best.values[key] - own.values[key] for key in own.values}


@dataclass(frozen=True)
class Allocated:
    """The studies of a method by their sparsities; ``goal`` is the one that gradual runs go by."""

    studies: dict[float, Study]
    goal: Study


@dataclass(frozen=True)
class Kept:
    """The best model at a sparsity: its checkpoint, its top-1 on validation, its registered version."""

    checkpoint: str
    validation: float
    version: str


@dataclass(frozen=True)
class Recovered:
    """The best gradual run of a method, the model it ended with, and those kept on the way (``0.5`` …)."""

    sparsity: float
    record: TrialRecord
    end: Kept
    kept: dict[str, Kept]
    trials: list[TrialRecord]


@dataclass(frozen=True)
class Quantized:
    """The INT8 form of a method's model: its folder, its top-1 on validation, its bytes, its version."""

    folder: str
    validation: float
    bytes: int
    version: str


@dataclass(frozen=True)
class Exported:
    """A method's model as an engine takes it: its folder, and the bytes of its files."""

    folder: str
    bytes: int


@dataclass(frozen=True)
class Results:
    """What all phases of a sweep have found, by method; ``structured`` is the dense model cut in width.

    ``exported`` are a method's folders for engines, by format.
    """

    dense: Dense
    structured: Dense | None
    allocated: Mapping[str, Allocated | None]
    recovered: Mapping[str, Recovered]
    quantized: Mapping[str, Quantized] = field(default_factory=dict)
    exported: Mapping[str, Mapping[str, Exported]] = field(default_factory=dict)
