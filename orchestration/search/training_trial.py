"""A training trial: a Tune function around a whole Ray Train run.

It and the controller that it starts are processes of their own for every trial, so what this file imports is
paid for each time: timm and the model code are left to the workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ray import tune
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer
from ray.tune.experiment import Trial
from ray.tune.integration.ray_train import TuneReportCallback

from orchestration.common.hashing import digest
from orchestration.recipe.schema import Resources
from trainers.config.jobs import OrderJob, TrainJob
from trainers.ray_worker import order_worker, train_worker
from trainers.storage import resolve


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


def training_trial(config: dict[str, Any], jobs: Jobs, resources: Resources, storage: str) -> None:
    """A Tune function around a Ray Train run; its workers take their resources in a group of their own.

    Args:
        config: the proposal, recipe keys and values.
        storage: of the runs; one that was broken off is found again by its proposal, and goes on.
    """
    # of trials of one proposal each has a run of its own, see RunNames
    name = tune.get_context().get_trial_name()
    train_run(jobs(config), resources, storage, name, [TuneReportCallback()]).fit()


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
    callbacks: list[UserCallback],
    *,
    keep: int = 2,
) -> TorchTrainer:
    """A Ray Train run of a job; one of the same name and storage goes on from its last checkpoint.

    Args:
        storage: folder or URI of runs; the best models lie in ``NAME/kept`` there.
        keep: how many checkpoints to go on from.
    """
    system, path = resolve(storage)
    return TorchTrainer(
        train_worker,
        train_loop_config=job.model_dump(mode="json") | {"keep_folder": f"{storage}/{name}/kept"},
        scaling_config=_scaling(resources),
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=system,
            callbacks=callbacks,
            # a start that can never succeed must end in an error, not be tried for ever
            failure_config=FailureConfig(max_failures=resources.retries, controller_failure_limit=3),
            checkpoint_config=CheckpointConfig(num_to_keep=keep),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
