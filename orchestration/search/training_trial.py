"""A training trial: a process of Tune's that runs whole Ray Train runs, one after the other.

Each such process imports this file when it starts. It therefore imports neither timm nor the models; the
workers do.
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

_CLEANUP_SECONDS = 10.0  # for a run to end in order; then its process ends, and its workers with it


class RunNames:
    """Names trials and their Train runs by a hash of their proposal: an interrupted run is found again by it.

    A trial with the same proposal as an earlier trial gets a number after its name, because two runs must not
    share a folder: the earlier one may still run, or its workers may still be stopping. If the earlier run is
    complete, the new trial takes its name, and so its reports. It does not matter which of several trials
    with the same proposal resumes in which folder.
    """

    def __init__(self, complete: Callable[[Mapping[str, Any]], bool] = lambda metrics: False) -> None:
        """Begin without any trial; ``complete`` takes the last metrics of a run: is the run complete?"""
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

    The workers reserve their resources in a placement group of their own. An interrupted run is found again
    by its proposal, and resumes.
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
        """Wait for the next report of the run; after the last one, report that the run has ended.

        Raises:
            ray.train.TrainingFailedError: the run failed.
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
        # trials with the same proposal have different names (RunNames), and so different runs
        job, name = self._jobs(config), self.trial_name
        reports = Reports()
        trainer = train_run(job, self._resources, self._storage_of_runs, name, reports, pool=self._pool)
        self._run = BackgroundRun(trainer, reports)


class Reports(UserCallback):  # type: ignore[misc]
    """Collects the metrics that a run reports, in a queue."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[dict[str, Any] | None] = SimpleQueue()

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any | None) -> None:
        self.queue.put(dict(metrics[0]))  # Tune adds to it, and Train keeps its own


class BackgroundRun(Thread):
    """A Ray Train run in a thread, and its reports."""

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
        """End the run if it has not ended, and wait until its workers are idle, for a limited time.

        A run that is just starting its workers stops only when they have started.
        """
        self._trainer.stop()
        self.join(seconds)


def order_run(job: OrderJob, resources: Resources, storage: str) -> None:
    """Compute an elimination order by a group of workers.

    Args:
        job: the job of each worker, with the folder for the order.
        resources: of the workers.
        storage: folder or URI for Ray Train's own state.

    Raises:
        ray.train.TrainingFailedError: it failed.
    """
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
    """Make the Ray Train run of a job; a run with the same name and storage resumes from its last checkpoint.

    Args:
        job: what the run does.
        resources: of the run.
        storage: folder or URI of runs; the best models are kept in ``NAME/kept`` there.
        name: of the run.
        callback: is called in this process with the reports of the workers.
        pool: gives the workers, and takes them back when the run has ended.
        keep: number of checkpoints that are kept, to resume from.

    Returns:
        The run, not yet started.
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
            # a start that can never succeed must raise an error; Ray would retry for ever
            failure_config=FailureConfig(max_failures=resources.retries, controller_failure_limit=3),
            checkpoint_config=CheckpointConfig(num_to_keep=keep),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
        pool=pool,
        callback=callback,
    )
