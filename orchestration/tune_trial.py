"""What runs in a trial: a cheap one-shot evaluation in a reused actor, or a whole Ray Train run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray import tune
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from orchestration.config import Resources
from orchestration.search_space import AllocationSpace, summarise
from pruners.costs import CostModel
from pruners.order import EliminationOrder
from trainers import data, models
from trainers.checkpoint import load_checkpoint
from trainers.config import DataSettings
from trainers.evaluate import evaluate
from trainers.ray_worker import train_worker
from trainers.storage import resolve


@dataclass(frozen=True)
class OneShotInputs:
    """What all allocation trials of a method share; the arrays lie in the object store."""

    checkpoint: str
    data: DataSettings
    seed: int
    images: int
    threads: int
    device: str
    space: AllocationSpace
    order: ray.ObjectRef
    costs: CostModel

    def elimination_order(self, device: str = "cpu") -> EliminationOrder:
        """The order, read from the object store without a copy."""
        arrays: Mapping[str, np.ndarray] = ray.get(self.order)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the arrays are read-only, and only read
            return EliminationOrder.from_arrays(
                {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
            )


class OneShotTrial(tune.Trainable):  # type: ignore[misc]
    """Set the weights of a proposed allocation, evaluate on validation, report; the actor is then reused."""

    def setup(self, config: dict[str, float], inputs: OneShotInputs) -> None:
        torch.set_num_threads(inputs.threads)
        self._values = config
        self._inputs = inputs
        self._order = inputs.elimination_order(inputs.device)
        self._model = load_checkpoint(inputs.checkpoint).model.eval().to(inputs.device)
        self._parameters = dict(self._model.named_parameters())
        self._dense = {name: self._parameters[name].detach().clone() for name in self._order}
        config_of_model = models.data_config(self._model)
        images = data.split(inputs.data, "validation", data.eval_transform(config_of_model), inputs.seed)
        count = min(inputs.images, len(images))  # type: ignore[arg-type]
        subset = torch.utils.data.Subset(images, range(count))
        # decoded once: a trial costs its evaluation alone
        self._batches = list(data.eval_loader(subset, 128))

    def reset_config(self, new_config: dict[str, float]) -> bool:
        self._values = new_config
        return True

    def step(self) -> dict[str, Any]:
        allocation = self._inputs.space.allocation(self._values, self._order.losses)
        weights, masks = self._order.weights_at(self._dense, allocation)
        with torch.no_grad():
            for name, weight in weights.items():
                self._parameters[name].copy_(weight)
        result = evaluate(self._model, self._batches)
        return {
            "score": result.score,
            "val_top1": result.top1,
            "val_loss": result.loss,
            "sparsity": masks.sparsity,
            **self._inputs.costs.at(allocation).as_dict(),
            "allocation": allocation,
            "shares": summarise(allocation, self._inputs.space.layers),
            "done": True,
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        return None

    def load_checkpoint(self, checkpoint: Any) -> None:
        return None


def training_trial(config: dict[str, Any], jobs: Any, resources: Resources, storage: str) -> None:
    """A Tune function around a Ray Train run; its workers take their resources in a group of their own.

    Args:
        config: the proposal, recipe keys and values.
        jobs: gives the job (a dictionary) of a proposal.
    """
    system, path = resolve(storage)
    trial = ray.tune.get_context().get_trial_id()
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=jobs(config),
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker={"CPU": resources.cpus_per_worker}
            | ({"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {}),
        ),
        run_config=RunConfig(
            name=str(trial),
            storage_path=path,
            storage_filesystem=system,
            callbacks=[TuneReportCallback()],
            # a start that can never succeed must end in an error, not be tried for ever
            failure_config=FailureConfig(max_failures=resources.retries, controller_failure_limit=3),
            checkpoint_config=CheckpointConfig(num_to_keep=2, checkpoint_score_attribute="score"),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    trainer.fit()
