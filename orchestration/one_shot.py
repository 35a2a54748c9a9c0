"""A cheap trial: set the weights of a proposed allocation, evaluate, report; its actor is reused."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray import tune

from orchestration.search_space import AllocationSpace, summarise
from pruners.costs import CostModel
from pruners.order import EliminationOrder
from trainers import data, models
from trainers.checkpoint import load_checkpoint
from trainers.config import DataSettings
from trainers.evaluate import evaluate


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
        count = min(inputs.images, len(images))
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
