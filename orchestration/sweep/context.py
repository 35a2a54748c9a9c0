"""The context of a sweep: what all its phases share."""

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
    """The context of a sweep, which all its phases share.

    Attributes:
        recipe: the recipe, checked.
        data: its images, with whole addresses.
        data_hash: hash of all images that results depend on.
        size: capacity of the cluster.
        tracker: logs to MLflow.
        display: shows progress.
        run: id of the sweep's run in MLflow.
        lineage: recorded in every checkpoint: recipe, data, commit and parents.
        phase_range: the phases to run.
    """

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
        """Make a Ray task by :func:`task_of`, with the resources of this phase."""
        return task_of(self.recipe.resources, function, returns)

    def begin(self, phase: Phase, title: str) -> None:
        """Announce that work of a phase starts.

        Raises:
            InputError: the command starts with a later phase (``--from``), and this one has no result yet.
        """
        if self.phase_range.starts_after(phase):
            expected = f"the phase before it has no result yet ({title}); run that first, by last = {phase}"
            raise InputError("first", self.phase_range.first, expected)

    def phase(self, phase: Phase) -> Sweep:
        """The sweep with the phase's own resources."""
        return replace(self, recipe=self.recipe.in_phase(phase))

    def changed(self, values: Mapping[str, Any]) -> Sweep:
        """The same sweep with other values of some recipe keys."""
        return replace(self, recipe=with_values(self.recipe, values))

    def with_lineage(self, facts: Mapping[str, Any]) -> Sweep:
        """Copy of the sweep with ``facts`` added to the lineage recorded in checkpoints."""
        return replace(self, lineage={**self.lineage, **facts})

    @contextmanager
    def making(self, artifact: str, title: str) -> Iterator[None]:
        """Lock a shared artifact while it is made, in a ``with`` block that checks again whether it exists.

        If another sweep is making it, print that and wait. Never hold two locks.

        Args:
            artifact: its folder in the storage (``dense/KEY``).
            title: its name on the display.
        """

        def wait(by: str) -> None:
            self.display.say(f"      {title}: another sweep is making it{by}; waiting for that")

        joined = len(self.size.nodes) != 1  # a lock on a file may not hold between machines: ask Ray too
        with artifact_lock(self.storage, artifact, wait, by_cluster=joined):
            yield

    @contextmanager
    def scratch(self, name: str) -> Iterator[str]:
        """Folder of Tune's and Train's own state while they run; it is removed at the end.

        It belongs to this sweep: two sweeps that make the same artifact would delete each other's state.
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
        """Open the MLflow runs of a phase.

        Args:
            log: the trial log of the phase.
            phase: name of the phase.
            params: parameters that all trials of the phase share.
            method: of pruning, if the phase belongs to one.
            level: the sparsity in percent, as text, if the method has several such phases.
            kind: when the trials are logged (:class:`TrialRuns` or a subclass).
            done: the phase has ended before; its run is left as it is.

        Returns:
            The runs, an observer of the trials.
        """
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
    """Make a Ray task of a function.

    The task reserves no processor, as nothing else of the sweep runs meanwhile. It reserves a GPU if training
    does.

    Args:
        resources: of a training run.
        function: importable on the nodes.
        returns: number of values that the function returns.

    Returns:
        The task, and the device that it will have, ``cpu`` or ``cuda``.
    """
    gpus = min(resources.gpus_per_worker, 1.0)
    remote = ray.remote(num_cpus=0, num_gpus=gpus, num_returns=returns)(function)
    return remote, "cuda" if gpus else "cpu"
