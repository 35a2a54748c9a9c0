"""The Tune function of a member of a population, around a Ray Train run as ``training_trial``.

Ray passes the path of a Train checkpoint to Tune as a metric, but population-based training needs Tune's own
checkpoints. The reports of the run are therefore reported again. For each Train checkpoint the report has a
Tune checkpoint: a folder with one JSON file that names the path, and the member that was trained.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from queue import Queue
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

from ray import tune
from ray.train import UserCallback

from orchestration.common.hashing import digest
from orchestration.recipe.population import job_key
from orchestration.recipe.schema import Resources
from orchestration.search.standing_workers import WorkerPool
from orchestration.search.training_trial import Jobs, train_run
from trainers import storage
from trainers.config.jobs import Origin, TrainJob

MEMBER = "pbt"  # key of the member in a report
_FILE = "member.json"
# Another member may take a checkpoint until its trial is compared again, one interval later. The run is ahead
# of Tune meanwhile: by the report that Tune handles, by the one in the queue, and by those not yet queued.
_AHEAD = 4


@dataclass(frozen=True)
class Member:
    """A trial's state in a population, from one exploit step to the next.

    Attributes:
        trial: Tune's name of the trial.
        values: the searched values with which it is trained.
        runs: folder of the Train runs.
        run: name of its own run there.
        origin: the checkpoint from which the run began; ``None`` if it began from the dense model.
        taken: origins of its weights, oldest first: the ``trial``, with its ``epoch`` and ``values`` then.
    """

    trial: str
    values: dict[str, float]
    runs: str
    run: str
    origin: str | None
    taken: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def at_start(
        cls,
        trial: str,
        values: Mapping[str, float],
        runs: str,
        checkpoint: Mapping[str, Any] | None,
        known: Mapping[str, Mapping[str, Any]],
    ) -> Member:
        """Make the member of a trial that starts.

        Args:
            trial: Tune's name of the trial.
            values: the searched values.
            runs: folder of the Train runs.
            checkpoint: content of the Tune checkpoint from which the trial starts: its own after a pause, or
                that of another member to continue from; ``None``: it starts without a checkpoint.
            known: members of interrupted trials, by the hash of their values.

        Returns:
            The member: the same one after a pause or an interruption, otherwise a new one.
        """
        run, own = uuid.uuid4().hex[:12], dict(values)
        if checkpoint is None:
            before = known.get(digest(own))
            return (
                cls(trial, own, runs, run, None, []) if before is None else cls(**{**before, "trial": trial})
            )
        theirs = cls(**checkpoint["member"])
        if theirs.trial == trial:
            return theirs
        step = {"trial": theirs.trial, "epoch": checkpoint["epoch"], "values": theirs.values}
        return cls(trial, own, runs, run, origin_of(runs, trial), [*theirs.taken, step])

    def branched(self, job: TrainJob) -> TrainJob:
        """Change a job so that it starts at the member's origin and saves a checkpoint every epoch."""
        every_epoch = {"checkpoint_every": 1, "checkpoint_minutes": None, "checkpoint_steps": None}
        differs = tuple(job_key(key) for key in self.values)
        origin = None if self.origin is None else Origin(checkpoint=self.origin, differs=differs)
        training = job.training.model_copy(update=every_epoch)
        return job.model_copy(update={"training": training, "origin": origin})


def origin_of(runs: str, trial: str) -> str:
    """Path of the copied checkpoint that a trial continues from."""
    return f"{runs}/origins/{trial}"


def read_member_checkpoint(checkpoint: tune.Checkpoint) -> dict[str, Any]:
    """Content of our Tune checkpoint: path of the Train ``checkpoint``, its ``epoch``, the ``member``."""
    with checkpoint.as_directory() as folder:
        content: dict[str, Any] = json.loads((Path(folder) / _FILE).read_text(encoding="utf-8"))
    return content


def population_trial(
    config: dict[str, Any],
    *,
    jobs: Jobs,
    resources: Resources,
    runs: str,
    known: Mapping[str, Mapping[str, Any]],
    every: int,
) -> None:
    """A Tune function around the Ray Train run of a member.

    Args:
        config: the searched values, recipe keys and numbers.
        jobs: makes the job of a proposal.
        resources: of the run.
        runs: folder or URI of the Train runs.
        known: see :meth:`Member.at_start`.
        every: epochs between two comparisons of a trial.

    Raises:
        ray.train.TrainingFailedError: the run failed.
        Exception: an error of Tune while a report was passed on.
    """
    given = tune.get_checkpoint()
    checkpoint = None if given is None else read_member_checkpoint(given)
    member = Member.at_start(tune.get_context().get_trial_id(), config, runs, checkpoint, known)
    queue: Queue[Any] = Queue(1)  # so short that the run waits for Tune
    relay = Relay(queue, member)
    relay.start()
    job = member.branched(jobs(member.values))
    pool = WorkerPool()
    try:
        train_run(job, resources, runs, member.run, Forward(queue), pool=pool, keep=every + _AHEAD).fit()
    finally:
        queue.put(None)
        relay.join()
        pool.close()
    if relay.error is not None:
        raise relay.error


class Forward(UserCallback):  # type: ignore[misc]
    """Passes the reports of the workers to the Tune function."""

    def __init__(self, queue: Queue[Any]) -> None:
        self._queue = queue

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any | None) -> None:
        self._queue.put((metrics[0], None if checkpoint is None else PurePosixPath(checkpoint.path).name))


class Relay(Thread):
    """Passes reports from a queue to Tune, until it reads ``None``.

    After an ``error`` it only empties the queue: the run would wait for ever otherwise.
    """

    def __init__(self, queue: Queue[Any], member: Member) -> None:
        super().__init__(daemon=True)
        self._queue, self._member = queue, member
        self._epoch, self._begun = 0, False
        self.error: Exception | None = None

    def run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self.error is not None:
                continue
            try:
                self._report(*item)
            except Exception as error:
                self.error = error

    def _report(self, metrics: dict[str, Any], name: str | None) -> None:
        member = self._member
        report = {**metrics, MEMBER: member.as_dict()}
        self._epoch = metrics.get("epoch", self._epoch)
        if name is None:
            tune.report(report)
            return
        train_checkpoint = f"{member.runs}/{member.run}/{name}"
        content = {"checkpoint": train_checkpoint, "epoch": self._epoch, "member": member.as_dict()}
        with TemporaryDirectory(prefix="espalier-") as folder:
            (Path(folder) / _FILE).write_text(json.dumps(content), encoding="utf-8")
            tune.report(report, checkpoint=tune.Checkpoint.from_directory(folder))
        if member.origin is not None and not self._begun:
            storage.remove(member.origin)  # the member has a checkpoint of its own now
        self._begun = True
