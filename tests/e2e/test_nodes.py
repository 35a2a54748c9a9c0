"""Nodes that leave, by surprise or with notice: the run goes on with fewer workers, at the same batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import ELSEWHERE, MARK, Family
from training_runs import CPU, Log, make_files, make_job

from trainers.loop.gradual import run

DRIVE = Path(__file__).parents[1] / "faults" / "drive.py"
SECONDS = 300.0
pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(900)]


def start(folder: Path, address: str, training: dict[str, Any]) -> tuple[subprocess.Popen[str], Any]:
    """A driver with one to two workers of a processor each; and the job that it runs."""
    files = make_files(folder / "files", images=240)
    job = make_job(files, {"epochs": 4, "checkpoint_every": 100, **training}, {})
    (folder / "job.json").write_text(job.model_dump_json())
    environment = {key: value for key, value in os.environ.items() if key not in ELSEWHERE}
    environment |= {"RAY_ADDRESS": address, "OMP_NUM_THREADS": "1", MARK: folder.name}
    command = [sys.executable, str(DRIVE), str(folder / "job.json"), str(folder), "1-2", "3"]
    with (folder / "driver.log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True), job


def until(condition: Callable[[], bool], process: subprocess.Popen[str], folder: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None, (folder / "driver.log").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def epochs(folder: Path) -> dict[int, dict[str, Any]]:
    file = folder / "reports.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {row["epoch"]: row for row in rows if "epoch" in row}


def as_alone(reports: dict[int, dict[str, Any]], job: Any, folder: Path) -> None:
    """Nearly the losses of one process that nobody disturbed."""
    alone = Log(folder / "alone")
    run(job, alone, CPU)
    assert sorted(reports) == [row["epoch"] for row in alone.metrics]
    for row in alone.metrics:
        assert reports[row["epoch"]]["train_loss"] == pytest.approx(row["train_loss"], rel=1e-2)
        assert reports[row["epoch"]]["sparsity"] == row["sparsity"]


def test_nodes__a_node_is_lost(cluster: Any, tmp_path: Path) -> None:
    process, job = start(tmp_path, cluster.address, {"checkpoint_steps": 5})
    family = Family(process.pid, tmp_path, tmp_path.name)
    try:
        until(lambda: 1 in epochs(tmp_path), process, tmp_path)
        cluster.remove_node(cluster.other, allow_graceful=False)
        until(lambda: 4 in epochs(tmp_path), process, tmp_path)
        assert process.wait(60) == 0
    finally:
        family.end()
    as_alone(epochs(tmp_path), job, tmp_path)


def test_nodes__a_node_leaves_with_notice(cluster: Any, tmp_path: Path) -> None:
    """A checkpoint is written at once, in the middle of an epoch, though none was due."""
    process, job = start(tmp_path, cluster.address, {"checkpoint_minutes": None, "epochs": 6})
    family = Family(process.pid, tmp_path, tmp_path.name)
    try:
        until(lambda: 1 in epochs(tmp_path), process, tmp_path)
        assert not list((tmp_path / "run").glob("checkpoint_2*"))
        drain = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address]
        drain += ["--node-id", cluster.other.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        drain += ["--reason-message", "test", "--deadline-remaining-seconds", "30"]
        subprocess.run(drain, check=True, timeout=60)
        noticed = time.monotonic()
        until(lambda: bool(list((tmp_path / "run").glob("checkpoint_2*"))), process, tmp_path)
        assert time.monotonic() - noticed < 30
        assert max(epochs(tmp_path)) < 6
        until(lambda: 6 in epochs(tmp_path), process, tmp_path)
        assert process.wait(60) == 0
    finally:
        family.end()
    as_alone(epochs(tmp_path), job, tmp_path)
