"""The results of each phase of a sweep, which the next phases use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestration.state.trial_log import TrialRecord


@dataclass(frozen=True)
class Dense:
    """The dense model.

    Attributes:
        checkpoint: folder or URI.
        top1: top-1 on validation, 0…1.
        weights: hash of its configuration and weights, wherever the folder lies.
        version: the registered version that it comes from, ``models:/NAME/VERSION``; ``None`` if from none.
    """

    checkpoint: str
    top1: float
    weights: str
    version: str | None = None


@dataclass(frozen=True)
class Study:
    """The result of the allocation search at one sparsity.

    Attributes:
        best: the best trial.
        checkpoint: folder or URI of the one-shot model with its allocation.
        trials: all trials that have not failed.
    """

    best: TrialRecord
    checkpoint: str
    trials: list[TrialRecord]

    @property
    def allocation(self) -> dict[str, int]:
        allocation: dict[str, int] = self.best.metrics["allocation"]
        return allocation

    @property
    def own(self) -> TrialRecord | None:
        """The trial of the method's own allocation, which is the first of the enqueued ones."""
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
        """Difference of each sparsity between the best proposal and the method's own allocation."""
        own = self.own
        return None if own is None else {key: self.best.values[key] - own.values[key] for key in own.values}


@dataclass(frozen=True)
class Allocated:
    """The allocation searches of a method.

    Attributes:
        studies: by the sparsity of their model.
        goal: the study whose allocation gradual runs use.
    """

    studies: dict[float, Study]
    goal: Study


@dataclass(frozen=True)
class Kept:
    """The best model at a sparsity.

    Attributes:
        checkpoint: folder or URI.
        validation: top-1 on validation, 0…1.
        version: the registered version.
    """

    checkpoint: str
    validation: float
    version: str


@dataclass(frozen=True)
class Recovered:
    """The best gradual run of a method.

    Attributes:
        sparsity: at the end of the run.
        record: the record of the run.
        end: the model at the end.
        kept: the models kept at lower sparsities, by the sparsity as text (``0.5``).
        trials: all gradual runs of the method that have not failed.
    """

    sparsity: float
    record: TrialRecord
    end: Kept
    kept: dict[str, Kept]
    trials: list[TrialRecord]


@dataclass(frozen=True)
class Quantized:
    """The INT8 form of a method's model.

    Attributes:
        folder: path or URI of the INT8 folder.
        validation: top-1 on validation, 0…1, by the engine that runs it.
        bytes: size of the model's file.
        version: the registered version.
    """

    folder: str
    validation: float
    bytes: int
    version: str


@dataclass(frozen=True)
class Exported:
    """A method's model as a file for an engine.

    Attributes:
        folder: path or URI.
        bytes: size of its files.
    """

    folder: str
    bytes: int


@dataclass(frozen=True)
class Results:
    """The results of all phases of a sweep.

    Attributes:
        dense: the dense model.
        structured: the dense model cut in width, if the recipe has a structured step.
        allocated: by method; ``None``: the recipe has no allocation search.
        recovered: by method.
        quantized: by method, if the recipe asks for INT8.
        exported: by method, then by format, if the recipe asks for files for engines.
    """

    dense: Dense
    structured: Dense | None
    allocated: Mapping[str, Allocated | None]
    recovered: Mapping[str, Recovered]
    quantized: Mapping[str, Quantized] = field(default_factory=dict)
    exported: Mapping[str, Mapping[str, Exported]] = field(default_factory=dict)
