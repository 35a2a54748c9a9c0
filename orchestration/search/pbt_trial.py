"""The Tune function of a member of a population, around a Ray Train run as ``training_trial``.

Ray tells Tune the place of a Train checkpoint as a figure; population-based training wants checkpoints of
Tune's own. So what the run reports is reported again, with each Train checkpoint a folder of one JSON file
that says where it is and what it was trained with.
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

MEMBER = "pbt"  # the figure that a member is reported as
_FILE = "member.json"
# A checkpoint may be taken until its trial is looked at again, an interval later. The run is then ahead by
# what is being looked at, what waits for it, and what could not even wait.
_AHEAD = 4


@dataclass(frozen=True)
class Member:
    """A trial's state in a population, from one exploit step to the next.

    Attributes:
        trial: Tune's name of it.
        values: it is trained with.
        runs: folder of the Train runs; ``run`` is its own.
        origin: the checkpoint that the run began from; None of a run that began anew.
        taken: where its weights came from: the ``trial``, its ``epoch`` and ``values`` then, oldest first.
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
        """The member that a starting trial is.

        Args:
            checkpoint: the Tune checkpoint it is given: its own where it was paused, another's to go on from.
            known: of trials that an interruption broke off, by the digest of their values.
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
        """The job of the member's values, with a checkpoint every epoch, begun at the member's origin."""
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
    """A Tune function around the Ray Train run of the member that the trial starts as.

    Args:
        config: its values, recipe keys and numbers.
        runs: folder or URI of the Train runs.
        known: see :meth:`Member.at_start`.
        every: epochs between two looks at it.
    """
    given = tune.get_checkpoint()
    checkpoint = None if given is None else read_member_checkpoint(given)
    member = Member.at_start(tune.get_context().get_trial_id(), config, runs, checkpoint, known)
    queue: Queue[Any] = Queue(1)  # the run waits for Tune to look
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
    """Hands what workers report to the Tune function."""

    def __init__(self, queue: Queue[Any]) -> None:
        self._queue = queue

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any | None) -> None:
        self._queue.put((metrics[0], None if checkpoint is None else PurePosixPath(checkpoint.path).name))


class Relay(Thread):
    """Reports to Tune what it reads from a queue, until it reads ``None``.

    After an ``error`` it only empties the queue, as the run would else wait for ever.
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
            storage.remove(member.origin)  # it has a checkpoint of its own
        self._begun = True
