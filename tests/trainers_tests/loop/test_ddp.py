"""N workers at a global batch train as one worker does at it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import CPU, Log, make_files, make_job, train_as_worker
from workers import start_workers

from trainers.loop.gradual import run

# 56 steps, the last of each epoch with fewer images than four workers: 50 images by 8 leave 2
TRAINING = {"epochs": 8, "batch_size": 8, "augment": {"shift": 1, "flip": 0.5}}
FISHER = {"gradients": 4, "batch_size": 4, "block_size": 16, "damp": 1e-3}
JOBS: dict[str, dict[str, Any]] = {
    "dense": {},
    "pruned": {"pruning": {"fisher": FISHER}},
    "pruned in rounds and solved again": {
        "pruning": {"fisher": {**FISHER, "gradients": 8, "rounds": 2}, "reconstruct": 21}
    },
}


def job(kind: str, files: dict[str, str]) -> Any:
    pruning = JOBS[kind].get("pruning")
    method = {"method": "ovit"} if pruning else {}
    return make_job(files, TRAINING, pruning, **method)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize("kind", JOBS)
def test_ddp__workers_train_as_one(kind: str, files: dict[str, str], tmp_path: Path) -> None:
    alone = Log(tmp_path / "alone")
    run(job(kind, files), alone, CPU)
    expected = torch.tensor([loss for row in alone.metrics for loss in row["step_loss"]])
    assert len(expected) == 56
    for world in (2, 4):
        arguments = (world, str(tmp_path), job(kind, files).model_dump(mode="json"))
        start_workers(train_as_worker, arguments, world)
        reported = [
            json.loads((tmp_path / f"metrics-{world}-{rank}.json").read_text()) for rank in range(world)
        ]
        losses = torch.tensor([loss for row in reported[0] for loss in row["step_loss"]])
        torch.testing.assert_close(losses, expected, rtol=2e-3, atol=2e-3)
        rates = [[row["step_lr"] for row in rows] for rows in (reported[0], alone.metrics)]
        assert rates[0] == rates[1]
        for rows in reported[1:]:  # all workers are told the same
            assert rows == reported[0]
