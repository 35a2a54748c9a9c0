"""The same command on a cluster of two raylets that somebody else started: one worker on each."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlflow
import pytest
from commands import SMALL, Family, espalier, parent
from swept import Swept

pytestmark = [pytest.mark.cluster, pytest.mark.long]


def test_cluster__a_sweep_on_a_cluster_puts_a_worker_on_each_node(
    swept: Swept, cluster: Any, tmp_path: Path
) -> None:
    (dense,) = swept.storage.glob("dense/*/model")
    shared = tmp_path / "shared"
    arguments = (
        "sweep",
        str(SMALL),
        f"model={{checkpoint: 'file://{dense}', classes: 10}}",
        "dense=null",
        f"storage=file://{shared}",
        "pruning.methods=[ovit]",
        "allocation.trials=2",
        "schedule.trials=1",
        "--address",
        cluster.address,
    )
    nodes: set[int] = set()
    everything = Family(os.getpid(), tmp_path, "none")

    def ended() -> bool:
        workers = [pid for pid, line in everything.look().items() if "RayTrainWorker" in line]
        if len(workers) == 2:
            nodes.update({parent(pid) for pid in workers})
        return command.process.poll() is not None

    with espalier(*arguments, cwd=tmp_path) as command:
        command.until(ended, what="its end")
        assert command.wait() == 0, command.err
        assert command.left() == {}
    assert len(nodes) == 2, "workers of one raylet, or of none that was seen"
    assert not any(node.dead_processes() for node in cluster.list_all_nodes()), "it is not ours to end"

    (log,) = shared.glob("sweeps/small/schedule-ovit-*/trials.json")
    (trial,) = json.loads(log.read_text(encoding="utf-8"))["trials"]
    assert trial["state"] == "finished"
    assert Path(trial["checkpoint"].removeprefix("file://")).is_dir()
    (recovered,) = shared.glob("sweeps/small/schedule-ovit-*/recovered")
    assert json.loads((recovered / "pruning.json").read_text())["method"] == "ovit"
    assert f"'local-dir:{recovered}'" in command.out
    assert "│ ovit " in command.out
    client = mlflow.MlflowClient(f"sqlite:///{shared}/mlflow/mlflow.db")
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    assert {entry.info.status for entry in client.search_runs(ids)} == {"FINISHED"}
    assert client.get_model_version_by_alias("espalier-small", "champion").tags["method"] == "ovit"
