"""The Ray Train adapter: the only file here that knows Ray."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch

from trainers import distributed
from trainers.config import TrainJob
from trainers.gradual import Progress, run


def train_worker(config: dict[str, Any]) -> None:
    """The function of one Ray Train worker; ``config`` is a :class:`TrainJob` as a dictionary.

    After a failure Ray starts it again with the last reported checkpoint, from which the run goes on.
    """
    job = TrainJob.model_validate(config)
    device = ray.train.torch.get_device()
    previous = ray.train.get_checkpoint()
    if previous is None:
        run(job, _report, device)
        return
    with previous.as_directory() as folder:
        run(job, _report, device, resume=Path(folder))


def _report(progress: Progress) -> None:
    """Every worker reports; the first one brings the checkpoint."""
    if progress.save is None or distributed.rank() != 0:
        ray.train.report(progress.metrics)
        return
    with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
        progress.save(Path(folder))
        ray.train.report(progress.metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
