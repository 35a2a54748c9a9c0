"""What the phases of a sweep share, and what each hands to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import ray

from orchestration.cluster.capacity import ClusterSize
from orchestration.recipe.loading import with_values
from orchestration.recipe.phases import WHOLE, Phase, Span
from orchestration.recipe.schema import Recipe, digest
from orchestration.reporting.display import Display
from orchestration.state.lock import in_turn
from orchestration.state.stored_recipe import folder_of
from orchestration.state.trial_log import TrialLog, TrialRecord
from orchestration.sweep.trial_runs import TrialRuns
from orchestration.tracking.datasets import Dataset, datasets
from orchestration.tracking.tracker import Tracker
from pruners.errors import InputError
from trainers import storage
from trainers.checkpoint.folder import weights_hash
from trainers.config.data import DataSettings

SCRATCH = "scratch"  # in a sweep's folder


@dataclass
class Sweep:
    """What all phases share; ``root`` is the sweep's folder, ``run`` its run in MLflow."""

    recipe: Recipe
    data: DataSettings
    data_hash: str
    size: ClusterSize
    tracker: Tracker
    display: Display
    run: str
    lineage: dict[str, Any] = field(default_factory=dict)
    span: Span = WHOLE

    @property
    def storage(self) -> str:
        return storage.absolute(self.recipe.storage)

    @property
    def root(self) -> str:
        return folder_of(self.recipe.storage, self.recipe.name)

    @cached_property
    def datasets(self) -> list[Dataset]:
        return datasets(self.data, self.data_hash, self.recipe.data.source)

    def task(self, function: Callable[..., Any], returns: int = 1) -> tuple[Any, str]:
        """A function as a Ray task of the sweep's own, and the device that it gets.

        It takes no processor, as nothing else of the sweep runs meanwhile, and a GPU where training has one.
        """
        gpus = min(self.recipe.resources.gpus_per_worker, 1.0)
        remote = ray.remote(num_cpus=0, num_gpus=gpus, num_returns=returns)(function)
        return remote, "cuda" if gpus else "cpu"

    def begin(self, phase: Phase, title: str) -> None:
        """Work of a phase is about to start.

        Raises:
            InputError: the command was to start with a later one.
        """
        if self.span.starts_after(phase):
            expected = f"the phase before it has no result yet ({title}); run that first, by --until {phase}"
            raise InputError("--from", self.span.first, expected)

    def phase(self, phase: Phase) -> Sweep:
        """The sweep with the phase's own resources."""
        own = self.recipe.resources.of(phase)
        same = own is self.recipe.resources
        return self if same else self.changed({"resources": own.model_dump(mode="json")})

    def changed(self, values: Mapping[str, Any]) -> Sweep:
        """The same sweep with other values of some recipe keys."""
        return replace(self, recipe=with_values(self.recipe, values)) if values else self

    def descending(self, facts: Mapping[str, Any]) -> Sweep:
        """The same sweep, whose models are said to come from others by ``facts``."""
        return replace(self, lineage={**self.lineage, **facts})

    @contextmanager
    def making(self, artefact: str, title: str) -> Iterator[None]:
        """Make something that all sweeps of the storage share, alone; look again whether it is there.

        A sweep that is at it is waited for, which is said. Hold one at a time.

        Args:
            artefact: its folder in the storage (``dense/KEY``).
            title: what the display calls it.
        """

        def wait(by: str) -> None:
            self.display.say(f"      {title}: another sweep is making it{by}; waiting for that")

        joined = len(self.size.nodes) != 1  # several machines may mean the same file by one lock, or not
        with in_turn(self.storage, artefact, wait, by_cluster=joined):
            yield

    @contextmanager
    def scratch(self, name: str) -> Iterator[str]:
        """Where Tune and Train keep their own state while they run; nobody reads it again.

        It is the sweep's own, as two that make the same would delete each other's.
        """
        uri = f"{self.root}/{SCRATCH}/{name}"
        storage.remove(uri)
        try:
            yield uri
        finally:
            storage.remove(uri)

    def tags(self, phase: str, method: str = "") -> dict[str, str]:
        found = {
            "espalier.sweep": self.recipe.name,
            "espalier.phase": phase,
            "espalier.data": self.data_hash[:12],
            "espalier.commit": str(self.lineage.get("git_commit") or "unknown"),
        }
        return found | ({"espalier.method": method} if method else {})

    def runs(
        self,
        log: TrialLog,
        phase: str,
        params: Mapping[str, Any],
        method: str = "",
        *,
        level: str = "",
        kind: type[TrialRuns] = TrialRuns,
        done: bool = False,
    ) -> TrialRuns:
        """The MLflow runs of a phase; ``level`` is a sparsity in percent, where a phase is for several."""
        made = kind(
            self.tracker,
            self.display,
            log,
            name="-".join(part for part in (method, phase, level) if part),
            parent=self.run,
            params=params,
            tags=self.tags(phase, method) | ({"espalier.sparsity": level} if level else {}),
            done=done,
        )
        if not done:  # test images are for the sweep's end
            self.tracker.inputs(made.run, [one for one in self.datasets if one.context != "test"])
        return made


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
        found: dict[str, int] = self.best.metrics["allocation"]
        return found

    @property
    def own(self) -> TrialRecord | None:
        """The trial of the method's own allocation: the first of those that were given."""
        given = [record for record in self.trials if record.given]
        return min(given, key=lambda record: record.number, default=None)

    @property
    def sparsity(self) -> float:
        """Of the model that was chosen."""
        found: float = self.best.metrics["sparsity"]
        return found

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
class Results:
    """What all phases of a sweep have found, by method; ``structured`` is the dense model cut in width."""

    dense: Dense
    structured: Dense | None
    allocated: Mapping[str, Allocated | None]
    recovered: Mapping[str, Recovered]
    quantized: Mapping[str, Quantized] = field(default_factory=dict)


def content_hash(checkpoint: str) -> str:
    """A hash of a checkpoint's weights: the same model is the same wherever it lies."""
    config = storage.read_bytes(f"{checkpoint}/config.json")
    return digest(config.hex(), weights_hash(checkpoint))
