"""A training trial: a process of Tune's that runs whole Ray Train runs, one after the other.

What this file imports is paid for at the start of each such process: timm and the model code are left to the
workers.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from threading import Thread
from typing import Any

from ray import tune
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer
from ray.tune.experiment import Trial
from ray.tune.result import RESULT_DUPLICATE

from orchestration.common.hashing import digest
from orchestration.recipe.schema import Resources
from orchestration.search.standing_workers import StandingTrainer, WorkerPool
from trainers.config.jobs import OrderJob, TrainJob
from trainers.ray_worker import RUN, order_worker, train_worker
from trainers.storage import resolve

_CLEANUP_SECONDS = 10.0  # for a run to end in order before its process ends, and its workers with that


class RunNames:
    """Names the trials of a search and their Train runs by the digest of their proposals.

    A proposal that was broken off is found again so, and one that is made again after its run has come to its
    end takes over what that run reported. Of trials proposed alike that are at work at once, or one while the
    workers of another that was stopped are still ending, the later get a number: two runs in one folder would
    overwrite each other. Which of them goes on later in which folder is all the same, as the runs are.
    """

    def __init__(self, complete: Callable[[Mapping[str, Any]], bool] = lambda metrics: False) -> None:
        """Begin without any trial; ``complete`` tells whether metrics are the last ones of a run."""
        self._complete = complete
        self._trials: dict[str, list[Trial]] = {}

    def __call__(self, trial: Trial) -> str:
        name = digest(trial.config)
        taken = self._trials.setdefault(name, [])
        free = (
            number for number, other in enumerate(taken) if other.is_finished() and self._is_complete(other)
        )
        number = next(free, len(taken))
        taken[number : number + 1] = [trial]
        return name if number == 0 else f"{name}-{number + 1}"

    def __deepcopy__(self, memo: Any) -> RunNames:
        return self  # Tune copies it for each trial, and they must know of each other

    def __reduce__(self) -> Any:  # Tune keeps it with each trial, for an experiment that it restores
        return RunNames, ()

    def _is_complete(self, trial: Trial) -> bool:
        return self._complete(trial.last_result or {})


Jobs = Callable[[Mapping[str, Any]], TrainJob]
"""Makes the job of a proposal (recipe keys and values)."""


class TrainingTrial(tune.Trainable):  # type: ignore[misc]
    """A trial around a Ray Train run; its process and its workers take one trial after the other.

    The workers take their resources in a group of their own. A run that was broken off is found again by its
    proposal, and goes on.
    """

    def setup(self, config: dict[str, Any], jobs: Jobs, resources: Resources, storage: str) -> None:
        """Begin the first run.

        Args:
            config: the proposal, recipe keys and values.
            jobs: makes its job.
            resources: of the run.
            storage: of the runs.
        """
        self._jobs, self._resources, self._storage_of_runs = jobs, resources, storage
        self._pool = WorkerPool()
        self._begin(config)

    def step(self) -> dict[str, Any]:
        """The next report of the run; after the last one, that it has ended.

        Raises:
            ray.train.TrainingFailedError: it failed.
        """
        report = self._run.next_report()
        return {RESULT_DUPLICATE: True} if report is None else report

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._run.stop()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        self._run.stop(_CLEANUP_SECONDS)
        self._pool.close()

    def _begin(self, config: dict[str, Any]) -> None:
        # of trials of one proposal each has a run of its own, see RunNames
        job, name = self._jobs(config), self.trial_name
        reports = Reports()
        trainer = train_run(job, self._resources, self._storage_of_runs, name, reports, pool=self._pool)
        self._run = BackgroundRun(trainer, reports)


class Reports(UserCallback):  # type: ignore[misc]
    """The figures that a run reports, in a queue."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[dict[str, Any] | None] = SimpleQueue()

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any | None) -> None:
        self.queue.put(dict(metrics[0]))  # Tune adds to it, and Train keeps its own


class BackgroundRun(Thread):
    """A Ray Train run in a thread, and what it has reported."""

    def __init__(self, trainer: StandingTrainer, reports: Reports) -> None:
        super().__init__(daemon=True)
        self._trainer, self._reports = trainer, reports
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:
            self._error = error
        finally:
            self._reports.queue.put(None)

    def next_report(self) -> dict[str, Any] | None:
        """Wait for the next report; ``None``: the run has ended.

        Raises:
            ray.train.TrainingFailedError: it failed.
        """
        report = self._reports.queue.get()
        if report is None and self._error is not None:
            raise self._error
        return report

    def stop(self, seconds: float | None = None) -> None:
        """End the run, if it has not, and wait so long at most until its workers are at rest.

        One that is starting its workers hears of it when they are there.
        """
        self._trainer.stop()
        self.join(seconds)


def order_run(job: OrderJob, resources: Resources, storage: str) -> None:
    """One elimination by a worker group."""
    system, path = resolve(storage)
    TorchTrainer(
        order_worker,
        train_loop_config=job.model_dump(mode="json"),
        scaling_config=_scaling(resources),
        run_config=RunConfig(
            name="order",
            storage_path=path,
            storage_filesystem=system,
            failure_config=FailureConfig(max_failures=resources.retries, controller_failure_limit=3),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    ).fit()


def _scaling(resources: Resources) -> ScalingConfig:
    elastic = resources.least < resources.most
    return ScalingConfig(
        num_workers=(resources.least, resources.most) if elastic else resources.most,
        use_gpu=resources.gpus_per_worker > 0,
        resources_per_worker={"CPU": resources.cpus_per_worker}
        | ({"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {}),
    )


def train_run(
    job: TrainJob,
    resources: Resources,
    storage: str,
    name: str,
    callback: UserCallback,
    *,
    pool: WorkerPool,
    keep: int = 2,
) -> StandingTrainer:
    """A Ray Train run of a job; one of the same name and storage goes on from its last checkpoint.

    Args:
        storage: folder or URI of runs; the best models lie in ``NAME/kept`` there.
        callback: is called in this process with what the workers report.
        pool: the workers come from there, and go back when the run has ended.
        keep: how many checkpoints to go on from.
    """
    system, path = resolve(storage)
    return StandingTrainer(
        train_worker,
        train_loop_config=job.model_dump(mode="json")
        | {"keep_folder": f"{storage}/{name}/kept", RUN: uuid.uuid4().hex},
        scaling_config=_scaling(resources),
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=system,
            # a start that can never succeed must end in an error, not be tried for ever
            failure_config=FailureConfig(max_failures=resources.retries, controller_failure_limit=3),
            checkpoint_config=CheckpointConfig(num_to_keep=keep),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
        pool=pool,
        callback=callback,
    )
