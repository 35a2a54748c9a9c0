"""The Ray Train adapter: the only file here that knows Ray.

The trial and the controller that start a worker load this file too, and have no need of timm and the models:
those are imported when a worker begins.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train

from trainers.config import TrainJob

if TYPE_CHECKING:
    from trainers.gradual import Progress


def train_worker(config: dict[str, Any]) -> None:
    """The function of one Ray Train worker; ``config`` is a :class:`TrainJob` as a dictionary.

    After a failure Ray starts it again with the last reported checkpoint, from which the run goes on.
    """
    import ray.train.torch

    from trainers.gradual import run

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
    if progress.save is None or ray.train.get_context().get_world_rank() != 0:
        ray.train.report(progress.metrics)
        return
    with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
        progress.save(Path(folder))
        ray.train.report(progress.metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
