"""What the phases of a sweep share, and what each hands to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray

from orchestration.cluster import ClusterSize
from orchestration.config import Recipe, digest
from orchestration.display import Display
from orchestration.stored_recipe import folder_of
from orchestration.tracking import Tracker
from orchestration.trial_log import TrialLog, TrialRecord
from orchestration.trial_runs import TrialRuns
from trainers import storage
from trainers.config import DataSettings


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

    @property
    def storage(self) -> str:
        return storage.absolute(self.recipe.storage)

    @property
    def root(self) -> str:
        return folder_of(self.recipe.storage, self.recipe.name)

    def task(self, function: Callable[..., Any], returns: int = 1) -> tuple[Any, str]:
        """A function as a Ray task of the sweep's own, and the device that it gets.

        It takes no processor, as nothing else of the sweep runs meanwhile, and a GPU where training has one.
        """
        gpus = min(self.recipe.resources.gpus_per_worker, 1.0)
        remote = ray.remote(num_cpus=0, num_gpus=gpus, num_returns=returns)(function)
        return remote, "cuda" if gpus else "cpu"

    def tags(self, phase: str, method: str = "") -> dict[str, str]:
        found = {
            "espalier.sweep": self.recipe.name,
            "espalier.phase": phase,
            "espalier.data": self.data_hash[:12],
            "espalier.commit": str(self.lineage.get("git_commit") or "unknown"),
        }
        return found | ({"espalier.method": method} if method else {})

    def runs(
        self, log: TrialLog, phase: str, params: Mapping[str, Any], method: str = "", *, done: bool = False
    ) -> TrialRuns:
        """The MLflow runs of a phase."""
        return TrialRuns(
            self.tracker,
            self.display,
            log,
            name=f"{method}-{phase}" if method else phase,
            parent=self.run,
            params=params,
            tags=self.tags(phase, method),
            done=done,
        )


@dataclass(frozen=True)
class Dense:
    """The dense model: its checkpoint and its validation top-1."""

    checkpoint: str
    top1: float


@dataclass(frozen=True)
class Allocated:
    """The best allocation of a method, and the one-shot model that it gives."""

    allocation: dict[str, int]
    name: str
    checkpoint: str
    trials: list[TrialRecord]


@dataclass(frozen=True)
class Kept:
    """The best model at a sparsity: its checkpoint, its top-1 on validation, its registered version."""

    checkpoint: str
    validation: float
    version: str


@dataclass(frozen=True)
class Recovered:
    """The best gradual run of a method, the model it ended with, and those kept on the way (``0.5`` …)."""

    record: TrialRecord
    end: Kept
    kept: dict[str, Kept]
    trials: list[TrialRecord]


def content_hash(checkpoint: str) -> str:
    """A hash of a checkpoint's weights: the same model is the same wherever it lies."""
    config = storage.read_bytes(f"{checkpoint}/config.json")
    return digest(config.hex(), storage.sha256(f"{checkpoint}/model.safetensors"))
