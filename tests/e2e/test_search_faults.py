"""A node, the storage or MLflow fails in an allocation search: no finished trial is lost or repeated."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
from commands import SMALL, Family, espalier
from swept import Swept

from orchestration.state.trial_log import TrialLog

pytestmark = [pytest.mark.long, pytest.mark.cluster, pytest.mark.timeout(900)]
FAULTS = Path(__file__).parents[1] / "faults"
TRIALS = 24


def sweep(swept: Swept, *more: str) -> tuple[str, ...]:
    """A sweep of DIMAP alone, from the dense model that another one has trained."""
    (dense,) = swept.storage.glob("dense/*/model")
    return (
        "sweep",
        str(SMALL),
        f"model={{checkpoint: 'file://{dense}', classes: 10}}",
        "dense=null",
        "pruning.methods=[dimap]",
        f"allocation.trials={TRIALS}",
        "schedule.trials=1",
        *more,
    )


@contextmanager
def head() -> Iterator[Any]:
    """A cluster of one node with two processors; its processes end with it."""
    from ray.cluster_utils import Cluster

    from orchestration.common.network import LOOPBACK, free_port

    port = {"dashboard_port": free_port(8265), "dashboard_host": LOOPBACK, "include_dashboard": True}
    before = set(Family(os.getpid(), FAULTS, "none").look())
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, **port})
    family = Family(os.getpid(), FAULTS, "none")
    try:
        family.look()
        yield made
    finally:
        made.shutdown()
        family.end(but=before)


def log_of(storage: Path) -> TrialLog | None:
    files = list(storage.glob("sweeps/small/allocation-*/trials.json"))
    return TrialLog(f"{files[0].parent}/trials.json", one_shot=True) if files else None


def ended(storage: Path) -> int:
    log = log_of(storage)
    return 0 if log is None else len(log.trials)


def agrees(storage: Path) -> TrialLog:
    """MLflow knows the trials of the log, each once, and the registry one version."""
    log = log_of(storage)
    assert log is not None
    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow/mlflow.db")
    ids = [one.experiment_id for one in client.search_experiments()]
    below = f"tags.`mlflow.parentRunId` = '{log.run_id}'"
    runs = client.search_runs(ids, below, max_results=1000)
    assert sorted(int(run.data.tags["espalier.number"]) for run in runs) == sorted(
        trial.number for trial in log.trials
    )
    assert len({trial.number for trial in log.trials}) == len(log.trials)
    proposals = [tuple(sorted(trial.values.items())) for trial in log.ended]
    assert len(set(proposals)) == len(proposals)
    assert len(client.search_model_versions("name='espalier-small'")) == 1
    return log


def test_search_faults__a_node_is_lost_with_its_trials(swept: Swept, cluster: Any, tmp_path: Path) -> None:
    storage = tmp_path / "shared"
    arguments = sweep(swept, f"storage=file://{storage}", "resources.workers=1", "--address", cluster.address)
    with espalier(*arguments, cwd=tmp_path) as command:
        command.until(lambda: ended(storage) > 3, what="some trials")
        cluster.remove_node(cluster.other, allow_graceful=False)
        assert command.wait() == 0, command.err
    log = agrees(storage)
    failed = [trial for trial in log.trials if trial.state == "failed"]
    assert len(failed) <= 1  # it had one processor
    assert len(log.ended) >= TRIALS - 1


def fault(name: str, folder: object = "") -> dict[str, str]:
    """Environment of a command that a fault of tests/faults befalls."""
    path = os.pathsep.join(filter(None, (str(FAULTS), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, "ESPALIER_FAULT": f"{name}:0:{folder}"}


@pytest.mark.parametrize(
    ("name", "says"),
    [("search full", "No space left on device"), ("search read-only", "Read-only file system")],
)
def test_search_faults__a_storage_that_takes_no_more_ends_the_sweep_with_one_line(
    name: str, says: str, swept: Swept, tmp_path: Path
) -> None:
    storage = tmp_path / "runs"
    arguments = sweep(swept, f"storage={storage}")
    with espalier(*arguments, cwd=tmp_path, **fault(name)) as command:
        assert command.wait() == 1, command.err
        assert command.left() == {}
    assert "Traceback" not in command.err
    (line,) = [line for line in command.err.splitlines() if line.startswith("espalier: ")]
    assert "small broke off" in line
    assert says in line
    before = log_of(storage)
    assert before is not None
    assert before.trials

    with espalier(*arguments, cwd=tmp_path) as command:
        assert command.wait() == 0, command.err
    after = agrees(storage).trials
    assert [trial.metrics for trial in after[: len(before.trials)]] == [one.metrics for one in before.trials]


def test_search_faults__an_actor_out_of_memory_costs_its_trial(swept: Swept, tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    memory = psutil.virtual_memory()
    if memory.available < 10e9:
        pytest.skip("needs 10 GB of free memory")
    most = (memory.total - memory.available + 8e9) / memory.total  # of this machine's, for Ray's monitor
    limit = {"RAY_memory_usage_threshold": f"{most:.3f}", "RAY_memory_monitor_refresh_ms": "100"}
    with espalier(
        *sweep(swept, f"storage={storage}"), cwd=tmp_path, **limit, **fault("hungry", tmp_path / "struck")
    ) as command:
        assert command.wait() == 0, command.err
    log = agrees(storage)
    failed = [trial for trial in log.trials if trial.state == "failed"]
    assert 1 <= len(failed) <= 2  # the monitor may take the other one first: it knows no culprit
    assert all("memory" in (trial.error or "") for trial in failed)
    assert len(log.ended) == TRIALS - len(failed)


def test_search_faults__the_head_is_restarted(swept: Swept, tmp_path: Path) -> None:
    """Ray ends a driver that has lost its cluster, in its own words; on a new one the sweep goes on."""
    storage = tmp_path / "shared"
    arguments = sweep(swept, f"storage=file://{storage}", "resources.workers=1", "--address")
    before = []
    for seconds in (120.0, None):
        with head() as made, espalier(*arguments, made.address, cwd=tmp_path) as command:
            if seconds is None:
                assert command.wait() == 0, command.err
                break
            command.until(lambda: ended(storage) > 3, what="some trials")
            made.remove_node(made.head_node, allow_graceful=False)
            assert command.wait(seconds) != 0, command.err
            before = (log_of(storage) or pytest.fail("no log")).trials
    after = agrees(storage).trials
    assert [trial.metrics for trial in after[: len(before)]] == [trial.metrics for trial in before]


def test_search_faults__the_server_of_ours_is_killed(swept: Swept, tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    with espalier(*sweep(swept, f"storage={storage}"), cwd=tmp_path) as command:
        command.until(lambda: ended(storage) > 3, what="some trials")
        for pid, line in command.family.look().items():
            if "mlflow" in line and "server" in line:
                os.kill(pid, signal.SIGKILL)
        assert command.wait() == 0, command.err
    assert len(agrees(storage).ended) == TRIALS
