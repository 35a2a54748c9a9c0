"""What the phases of a sweep share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import ray

from orchestration.cluster.capacity import ClusterSize
from orchestration.recipe.loading import with_values
from orchestration.recipe.phases import ALL_PHASES, Phase, PhaseRange
from orchestration.recipe.schema import Recipe, Resources
from orchestration.reporting.display import Display
from orchestration.state.lock import artifact_lock
from orchestration.state.stored_recipe import folder_of
from orchestration.state.trial_log import TrialLog
from orchestration.sweep.trial_runs import TrialRuns
from orchestration.tracking.datasets import Dataset, datasets
from orchestration.tracking.tracker import Tracker
from pruners.errors import InputError
from trainers import storage
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
    phase_range: PhaseRange = ALL_PHASES

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
        """:func:`task_of` with the resources of this phase."""
        return task_of(self.recipe.resources, function, returns)

    def begin(self, phase: Phase, title: str) -> None:
        """Announce that work of a phase starts.

        Raises:
            InputError: the command was to start with a later one.
        """
        if self.phase_range.starts_after(phase):
            expected = f"the phase before it has no result yet ({title}); run that first, by --until {phase}"
            raise InputError("--from", self.phase_range.first, expected)

    def phase(self, phase: Phase) -> Sweep:
        """The sweep with the phase's own resources."""
        own = self.recipe.resources.of(phase)
        same = own is self.recipe.resources
        return self if same else self.changed({"resources": own.model_dump(mode="json")})

    def changed(self, values: Mapping[str, Any]) -> Sweep:
        """The same sweep with other values of some recipe keys."""
        return replace(self, recipe=with_values(self.recipe, values)) if values else self

    def descending(self, facts: Mapping[str, Any]) -> Sweep:
        """Copy of the sweep with ``facts`` added to the lineage recorded in checkpoints."""
        return replace(self, lineage={**self.lineage, **facts})

    @contextmanager
    def making(self, artefact: str, title: str) -> Iterator[None]:
        """Hold the lock of an artefact that all sweeps of the storage share; check again whether it exists.

        A sweep that is at it is waited for, which is said. Hold one at a time.

        Args:
            artefact: its folder in the storage (``dense/KEY``).
            title: what the display calls it.
        """

        def wait(by: str) -> None:
            self.display.say(f"      {title}: another sweep is making it{by}; waiting for that")

        joined = len(self.size.nodes) != 1  # several machines may mean the same file by one lock, or not
        with artifact_lock(self.storage, artefact, wait, by_cluster=joined):
            yield

    @contextmanager
    def scratch(self, name: str) -> Iterator[str]:
        """Folder of Tune's and Train's own state while they run; it is removed at the end.

        It is the sweep's own, as two that make the same would delete each other's.
        """
        uri = f"{self.root}/{SCRATCH}/{name}"
        storage.remove(uri)
        try:
            yield uri
        finally:
            storage.remove(uri)

    def tags(self, phase: str, method: str = "") -> dict[str, str]:
        tags = {
            "espalier.sweep": self.recipe.name,
            "espalier.phase": phase,
            "espalier.data": self.data_hash[:12],
            "espalier.commit": str(self.lineage.get("git_commit") or "unknown"),
        }
        return tags | ({"espalier.method": method} if method else {})

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
            self.tracker.inputs(made.run, [dataset for dataset in self.datasets if dataset.context != "test"])
        return made


def task_of(resources: Resources, function: Callable[..., Any], returns: int = 1) -> tuple[Any, str]:
    """Make a Ray task of a function; returns the task and the device it will have.

    It takes no processor, as nothing else of the sweep runs meanwhile, and a GPU where training has one.
    """
    gpus = min(resources.gpus_per_worker, 1.0)
    remote = ray.remote(num_cpus=0, num_gpus=gpus, num_returns=returns)(function)
    return remote, "cuda" if gpus else "cpu"
