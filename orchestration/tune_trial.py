"""A dear trial: a Tune function around a whole Ray Train run.

It and the controller that it starts are processes of their own for every trial, so what this file imports is
paid for each time: timm and the model code are left to the workers.
"""

from __future__ import annotations

from typing import Any

from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from orchestration.config import Resources, digest
from trainers.config import OrderJob
from trainers.ray_worker import order_worker, train_worker
from trainers.storage import resolve


def training_trial(config: dict[str, Any], jobs: Any, resources: Resources, storage: str) -> None:
    """A Tune function around a Ray Train run; its workers take their resources in a group of their own.

    Args:
        config: the proposal, recipe keys and values.
        jobs: gives the job (a dictionary) of a proposal.
        storage: of the runs; one that was broken off is found again by its proposal, and goes on.
    """
    name = digest(config)
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
    job: dict[str, Any],
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
        train_loop_config=job | {"keep_folder": f"{storage}/{name}/kept"},
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
