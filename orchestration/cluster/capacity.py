"""Capacity of a cluster: processors, memory and accelerators, and whether a recipe fits in it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import ray
import torch

from orchestration.cluster.ray_internals import resources_with_autoscaling
from orchestration.recipe.schema import Recipe, Resources
from orchestration.recipe.search import AllocationSearch
from pruners.errors import InputError


@dataclass(frozen=True)
class ClusterSize:
    """CPUs and GPUs of a cluster, with those that autoscaling may add.

    ``nodes`` holds the CPUs and GPUs of each node; it is empty if autoscaling may add nodes.
    """

    cpus: float
    gpus: float
    nodes: tuple[tuple[float, float], ...] = ()

    def _pieces(self, cpus: float, gpus: float) -> int:
        """Number of workers of this size that the nodes can hold; a worker lies on one node."""
        return sum(
            int(min(node[0] / cpus, node[1] / gpus if gpus else math.inf) + 1e-6) for node in self.nodes
        )

    def training_runs(self, resources: Resources) -> int:
        """Number of training runs that the cluster can run at once.

        Raises:
            InputError: not even one.
        """
        for key, each, available in (
            ("CPUs", resources.cpus_per_worker, self.cpus),
            ("GPUs", resources.gpus_per_worker, self.gpus),
        ):
            if each * resources.least > available + 1e-6:
                raise InputError(
                    "resources.workers",
                    resources.least,
                    f"need {each * resources.least:g} {key}, the cluster can give {available:g}",
                )
        fit = [self.cpus / (resources.cpus_per_worker * resources.most)]
        if resources.gpus_per_worker:
            fit.append(self.gpus / (resources.gpus_per_worker * resources.most))
        if self.nodes:
            placed = self._pieces(resources.cpus_per_worker, resources.gpus_per_worker)
            if placed < resources.least:
                size = f"{resources.cpus_per_worker:g} CPUs and {resources.gpus_per_worker:g} GPUs"
                expected = f"the nodes hold {placed} workers of {size} each"
                raise InputError("resources.workers", resources.least, expected)
            fit.append(placed / resources.most)
        return max(int(min(fit) + 1e-6), 1)

    def allocation_trials(self, search: AllocationSearch) -> int:
        """Number of one-shot trials that the cluster can run at once.

        Raises:
            InputError: not even one.
        """
        for key, each, available in (
            ("cpus_per_trial", search.cpus_per_trial, self.cpus),
            ("gpus_per_trial", search.gpus_per_trial, self.gpus),
        ):
            if each > available + 1e-6:
                raise InputError(f"allocation.{key}", each, f"the cluster can give {available:g}")
        if self.nodes and not self._pieces(search.cpus_per_trial, search.gpus_per_trial):
            size = f"{search.cpus_per_trial:g} CPUs and {search.gpus_per_trial:g} GPUs"
            raise InputError("allocation.cpus_per_trial", search.cpus_per_trial, f"no node has {size}")
        fit = [self.cpus / search.cpus_per_trial]
        if search.gpus_per_trial:
            fit.append(self.gpus / search.gpus_per_trial)
        return int(min(fit) + 1e-6)


def cluster_size() -> ClusterSize:
    """The capacity of the cluster that is joined, with what autoscaling may add."""
    resources = dict(ray.cluster_resources())
    # autoscaling adds nodes when they are asked for
    possible = resources_with_autoscaling()
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return ClusterSize(
        cpus=max(resources.get("CPU", 0.0), possible.get("CPU", 0.0)),
        gpus=max(resources.get("GPU", 0.0), possible.get("GPU", 0.0)),
        nodes=() if possible else tuple((node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in alive),
    )


def check_local(recipe: Recipe) -> None:
    """Check that this machine alone can run the recipe, before a local cluster is started.

    Where ``RAY_ADDRESS`` is set (as inside a Ray job) a cluster is joined, and its capacity counts instead.

    Raises:
        InputError: more workers than it has processors.
    """
    if os.environ.get("RAY_ADDRESS"):
        return
    size = ClusterSize(cpus=float(os.cpu_count() or 1), gpus=float(torch.cuda.device_count()))
    check_size(recipe, size)


def check_size(recipe: Recipe, size: ClusterSize) -> None:
    """Check that a recipe fits in a cluster.

    Raises:
        InputError: it asks for more than the cluster can ever give.
    """
    for phase in ("dense", "structured", "schedule", "long_run"):
        size.training_runs(recipe.resources.of(phase))
    if recipe.allocation.trials:
        size.allocation_trials(recipe.allocation)
