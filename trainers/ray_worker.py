"""The Ray Train adapter: the only file here that knows Ray.

The processes of the trials import this module too, but need neither timm nor the models. A worker therefore
imports those only when it begins.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import ray.train
from pyarrow import fs
from ray.train import CheckpointUploadMode

from trainers.config.jobs import OrderJob, TrainJob

if TYPE_CHECKING:
    from trainers.loop.gradual import Progress

RUN = "run"
"""Key of a worker's configuration beside those of its job: the name under which it can be stopped."""

_stopped: set[str] = set()  # names of runs that this process was asked to stop


def stop_training(run: str) -> None:
    """Ask the run of this name in this process to stop at its next check; called on each worker."""
    _stopped.add(run)


def begin_again() -> None:
    """Prepare this process for another run; called on each worker after it has got the run.

    Ray has one pool of threads in a process that upload checkpoints, and ends it with the first run.
    """
    from ray.train.v2._internal.execution import context

    from trainers import distributed

    context.get_train_context().checkpoint_upload_threadpool = ThreadPoolExecutor(
        context.MAX_CHECKPOINT_UPLOAD_THREADS
    )
    distributed.forget_groups()


def train_worker(config: dict[str, Any]) -> None:
    """Train: the function that each Ray Train worker runs, for one run after the other.

    After a failure, or when the same run is started again, it resumes from the newest intact checkpoint. If
    there is none it starts from the job's ``origin``, if it has one. If it is asked to stop, it returns.

    Args:
        config: a :class:`TrainJob` as a dictionary, and :data:`RUN`.
    """
    import ray.train.torch

    from trainers.loop.gradual import Stopped, run

    name, job = config[RUN], TrainJob.model_validate({key: config[key] for key in config if key != RUN})
    device = ray.train.torch.get_device()
    with (
        suppress(Stopped),
        _newest_intact() as (folder, notes),
        _origin(job) if folder is None else nullcontext() as branch,
    ):
        run(
            job,
            _report,
            device,
            resume=folder,
            branch=branch,
            leaving=_leaving,
            stopping=lambda: name in _stopped,
            notes=notes,
            repeat=True,
        )
    gc.collect()  # a model and its gradients refer to each other


def order_worker(config: dict[str, Any]) -> None:
    """Compute an elimination order: the function that each Ray Train worker runs for an :class:`OrderJob`.

    Args:
        config: an :class:`OrderJob` as a dictionary.
    """
    import ray.train.torch

    from trainers.loop.elimination import write_order

    write_order(OrderJob.model_validate(config), ray.train.torch.get_device())


@contextmanager
def _newest_intact() -> Iterator[tuple[Path | None, list[str]]]:
    """A local copy of the newest intact checkpoint, and notes on damaged ones that are newer.

    Raises:
        RuntimeError: there are checkpoints, and none is intact.
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
    """A local copy of the checkpoint of another run that a job starts from; ``None`` where it names none.

    Raises:
        RuntimeError: it is damaged, or does not exist.
    """
    from trainers.checkpoint.trainer_state import damage
    from trainers.storage import exists, local_copy

    if job.origin is None:
        yield None
        return
    checkpoint = job.origin.checkpoint
    if not exists(checkpoint):
        raise RuntimeError(f"no checkpoint to begin from: {checkpoint} is not there")
    with local_copy(checkpoint) as folder:
        wrong = damage(folder)
        if wrong is not None:
            raise RuntimeError(f"no checkpoint to begin from: {wrong} in {checkpoint}")
        yield folder


def _up_to(latest: ray.train.Checkpoint) -> list[ray.train.Checkpoint]:
    """The run's checkpoints in the storage, the newest first (their names are times).

    Checkpoints that are newer than the newest that Ray knows were not completely uploaded when the run was
    interrupted; they are deleted.
    """
    parent = str(PurePosixPath(latest.path).parent)
    entries = latest.filesystem.get_file_info(fs.FileSelector(parent))
    paths = sorted(entry.path for entry in entries if entry.type == fs.FileType.Directory)
    checkpoints = [path for path in paths if PurePosixPath(path).name.startswith("checkpoint_")]
    kept = [path for path in checkpoints if PurePosixPath(path).name <= PurePosixPath(latest.path).name]
    if ray.train.get_context().get_world_rank() == 0:
        for path in set(checkpoints) - set(kept):
            latest.filesystem.delete_dir(path)
    return [ray.train.Checkpoint(path, latest.filesystem) for path in reversed(kept)]


def _leaving() -> str | None:
    """The ids of this run's nodes that will be preempted, the same on every worker; ``None``: none will."""
    preemption = ray.train.get_preemption_info()
    return None if preemption is None else " ".join(preemption.preempted_node_ids)


def _report(progress: Progress) -> None:
    """Report to Ray from every worker; rank 0 adds the checkpoint, which is uploaded in the background."""
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
