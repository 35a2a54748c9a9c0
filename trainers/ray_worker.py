"""The Ray Train adapter: the only file here that knows Ray.

The trial and the controller that start a worker load this file too, and have no need of timm and the models:
those are imported when a worker begins.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import ray.train
from pyarrow import fs
from ray.train import CheckpointUploadMode

from trainers.config.jobs import OrderJob, TrainJob

if TYPE_CHECKING:
    from trainers.loop.gradual import Progress


def train_worker(config: dict[str, Any]) -> None:
    """The function of one Ray Train worker; ``config`` is a :class:`TrainJob` as a dictionary.

    After a failure, or when the same run is started again, it goes on from the newest checkpoint that is as
    it was written; without one it begins from its job's origin, if that has one.
    """
    import ray.train.torch

    from trainers.loop.gradual import run

    job = TrainJob.model_validate(config)
    device = ray.train.torch.get_device()
    with _newest_intact() as (folder, notes), _origin(job) if folder is None else nullcontext() as branch:
        run(job, _report, device, resume=folder, branch=branch, leaving=_leaving, notes=notes, repeat=True)


def order_worker(config: dict[str, Any]) -> None:
    """The same for an elimination alone; ``config`` is an :class:`OrderJob` as a dictionary."""
    import ray.train.torch

    from trainers.loop.elimination import write_order

    write_order(OrderJob.model_validate(config), ray.train.torch.get_device())


@contextmanager
def _newest_intact() -> Iterator[tuple[Path | None, list[str]]]:
    """The checkpoint to go on from, on this machine, and what is wrong with those after it.

    Raises:
        RuntimeError: none of those there can be used.
    """
    from trainers.checkpoint.trainer_state import damage

    latest = ray.train.get_checkpoint()
    notes: list[str] = []
    for checkpoint in _up_to(latest) if latest is not None else []:
        with checkpoint.as_directory() as folder:
            wrong = damage(Path(folder))
            if wrong is None:
                yield Path(folder), notes
                return
            notes.append(f"checkpoint {PurePosixPath(checkpoint.path).name} is left aside: {wrong}")
    if notes:
        raise RuntimeError(f"no checkpoint to go on from: {'; '.join(notes)}")
    yield None, notes


@contextmanager
def _origin(job: TrainJob) -> Iterator[Path | None]:
    """The checkpoint of another run that a job begins from, on this machine; nothing where there is none.

    Raises:
        RuntimeError: it is not as it was written, or gone.
    """
    from trainers.checkpoint.trainer_state import damage
    from trainers.storage import exists, local_copy

    if job.origin is None:
        yield None
        return
    place = job.origin.checkpoint
    if not exists(place):
        raise RuntimeError(f"no checkpoint to begin from: {place} is not there")
    with local_copy(place) as folder:
        wrong = damage(folder)
        if wrong is not None:
            raise RuntimeError(f"no checkpoint to begin from: {wrong} in {place}")
        yield folder


def _up_to(latest: ray.train.Checkpoint) -> list[ray.train.Checkpoint]:
    """The run's checkpoints that are still there, the newest first (their names are times).

    Later ones than the latest that Ray knows of were on their way when the run was broken off; they go.
    """
    parent = str(PurePosixPath(latest.path).parent)
    entries = latest.filesystem.get_file_info(fs.FileSelector(parent))
    paths = sorted(entry.path for entry in entries if entry.type == fs.FileType.Directory)
    found = [path for path in paths if PurePosixPath(path).name.startswith("checkpoint_")]
    known = [path for path in found if PurePosixPath(path).name <= PurePosixPath(latest.path).name]
    if ray.train.get_context().get_world_rank() == 0:
        for path in set(found) - set(known):
            latest.filesystem.delete_dir(path)
    return [ray.train.Checkpoint(path, latest.filesystem) for path in reversed(known)]


def _leaving() -> str | None:
    """The nodes of this run that the cluster is about to take away; the same answer on every worker."""
    found = ray.train.get_preemption_info()
    return None if found is None else " ".join(found.preempted_node_ids)


def _report(progress: Progress) -> None:
    """Every worker reports; the first one brings the checkpoint, which is copied to the storage meanwhile."""
    if progress.save is None or ray.train.get_context().get_world_rank() != 0:
        ray.train.report(progress.metrics)
        return
    folder = tempfile.mkdtemp(prefix="espalier-")
    try:
        progress.save(Path(folder))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    ray.train.report(
        progress.metrics,
        checkpoint=ray.train.Checkpoint.from_directory(folder),
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
    )
