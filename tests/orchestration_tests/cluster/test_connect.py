"""What a cluster can give, by its totals and by its nodes."""

from __future__ import annotations

import os
from typing import Any

import pytest

from orchestration.cluster import connect
from orchestration.cluster.capacity import ClusterSize
from orchestration.recipe.schema import Resources
from orchestration.recipe.search import AllocationSearch
from pruners.errors import InputError


def size(*nodes: tuple[float, float]) -> ClusterSize:
    return ClusterSize(sum(node[0] for node in nodes), sum(node[1] for node in nodes), nodes)


@pytest.mark.parametrize(
    ("nodes", "resources", "runs"),
    [
        ([(4, 0)], {"workers": 2}, 2),
        ([(3, 0), (3, 0)], {"workers": 1, "cpus_per_worker": 2}, 2),  # six CPUs, but a pair on each node
        ([(8, 2), (8, 2)], {"workers": 2, "gpus_per_worker": 1}, 2),
        ([(8, 0), (48, 4)], {"workers": 4, "cpus_per_worker": 8, "gpus_per_worker": 1}, 1),
        ([(1, 0), (1, 0), (1, 0)], {"workers": {"min": 2, "max": 8}}, 1),
        ([(4, 1)], {"workers": 2, "gpus_per_worker": 0.5}, 1),
    ],
)
def test_connect__runs_at_once(
    nodes: list[tuple[float, float]], resources: dict[str, Any], runs: int
) -> None:
    assert size(*nodes).training_runs(Resources.model_validate(resources)) == runs


@pytest.mark.parametrize(
    ("nodes", "resources", "says"),
    [
        ([(1, 0), (1, 0)], {"workers": 1, "cpus_per_worker": 2}, "hold 0 workers of 2 CPUs and 0 GPUs each"),
        ([(2, 0), (2, 1)], {"workers": 2, "gpus_per_worker": 1}, "need 2 GPUs, the cluster can give 1"),
        # enough CPUs and GPUs, but not on the same node
        ([(8, 0), (1, 4)], {"workers": 4, "cpus_per_worker": 2, "gpus_per_worker": 1}, "hold 0 workers"),
    ],
)
def test_connect__what_no_node_holds_is_refused(
    nodes: list[tuple[float, float]], resources: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        size(*nodes).training_runs(Resources.model_validate(resources))


def test_connect__where_nodes_may_come_the_totals_count() -> None:
    assert ClusterSize(4, 0).training_runs(Resources(workers=1, cpus_per_worker=4)) == 1


def test_connect__a_cheap_trial_needs_one_node() -> None:
    search = AllocationSearch(cpus_per_trial=2)
    assert size((2, 0), (1, 0)).allocation_trials(search) == 1
    with pytest.raises(InputError, match="no node has 2 CPUs"):
        size((1, 0), (1, 0)).allocation_trials(search)


def test_connect__two_that_start_together_have_dashboards_at_ports_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A cluster takes seconds to listen, and its start fails after a minute where another has the port."""
    taken = []

    def init(**options: Any) -> None:
        taken.append(options["dashboard_port"])
        if len(taken) == 1:
            connect._start_at_free_port()

    monkeypatch.setattr(connect.ray, "init", init)
    monkeypatch.setenv(connect._STATE_API, "")
    connect._start_at_free_port()
    assert len(set(taken)) == 2


def test_connect__a_busy_machine_has_time_to_start_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own half minute is over before its servers have begun where others are at work."""
    waits = []

    def init(**_: Any) -> None:
        waits.append([os.environ[key] for key in connect._START_SECONDS])

    monkeypatch.setattr(connect.ray, "init", init)
    monkeypatch.setenv(connect._STATE_API, "")
    for key in connect._START_SECONDS:
        monkeypatch.delenv(key, raising=False)
    connect._start_at_free_port()
    assert not [key for key in connect._START_SECONDS if key in os.environ]
    key = "RAY_raylet_start_wait_time_s"
    monkeypatch.setenv(key, "7")
    connect._start_at_free_port()
    assert waits == [["120", "120"], ["7", "120"]]
    assert os.environ[key] == "7"
