"""A one-shot trial: set the weights of a proposed allocation, evaluate, report; its actor is reused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from ray import tune
from torch import nn

from orchestration.recipe.search import AllocationSearch
from orchestration.search.space import AllocationSpace, summarise
from orchestration.state.order_store import StoredOrder
from pruners.model.costs import CostModel
from pruners.model.layers import PrunableLayer
from pruners.model.masks import MaskSet
from pruners.order_builder import write_weights
from pruners.reconstruction.reconstruct import Reconstruction, reconstruct
from trainers.checkpoint.folder import load_checkpoint
from trainers.config.data import DataSettings
from trainers.data import datasets as data
from trainers.data.node_cache import Pixels
from trainers.engines.latency_table import LatencyTable
from trainers.loop.evaluation import Evaluation, evaluate
from trainers.loop.report import EpochReport, Figures
from trainers.models import factory as models

_BATCH = 128


@dataclass(frozen=True)
class Speed:
    """For a search for speed: a latency table, and the dense model's top-1 on the trials' images."""

    table: LatencyTable
    dense_top1: float

    def at(self, pruned: Mapping[str, int]) -> Figures:
        """Seconds of an image batch by the latency table, as a trial reports them."""
        return {
            "latency": self.table.at(pruned),
            "latency_dense": self.table.at({}),
            "dense_top1": self.dense_top1,
        }


@dataclass(frozen=True)
class OneShotInputs:
    """The inputs that all allocation trials of a study share.

    Attributes:
        checkpoint: the model whose weights are ordered: the dense one, or the result of the round before.
        data: the images; trials are evaluated on validation.
        seed: decides which training images a reconstruction takes.
        search: the recipe's settings of the search.
        space: the searched sparsities.
        order: the elimination order of the weights.
        costs: parameters and multiply-accumulates at any allocation.
        dense: the model whose outputs a reconstruction must match.
        reconstruct: number of training images for the reconstruction of the best model; 0: there is none.
        speed: of a search for speed.
    """

    checkpoint: str
    data: DataSettings
    seed: int
    search: AllocationSearch
    space: AllocationSpace
    order: StoredOrder
    costs: CostModel
    dense: str
    reconstruct: int = 0
    speed: Speed | None = None

    @property
    def device(self) -> str:
        return "cuda" if self.search.gpus_per_trial else "cpu"

    @property
    def threads(self) -> int:
        return max(1, int(self.search.cpus_per_trial))


class Solver:
    """Recomputes the kept weights of a one-shot model by least squares, so that its layers' outputs match the
    dense model's.

    Args:
        dense: checkpoint of the dense model.
        images: the data, of which training images are used.
        seed: decides which images.
        count: number of images, at most.
        device: of the models.
    """

    def __init__(self, dense: str, images: DataSettings, seed: int, count: int, device: str) -> None:
        self._dense = load_checkpoint(dense, shared=True).model.eval().to(device)
        train = data.split(images, "train", data.eval_transform(models.data_config(self._dense)), seed)
        self._images = data.first_images(train, count, rank=0, world=1, seed=seed)

    def solve(self, model: nn.Module, layers: Sequence[PrunableLayer], masks: MaskSet) -> Reconstruction:
        """Solve the kept weights of a model, in place (:func:`pruners.reconstruction.reconstruct`)."""
        return reconstruct(model, self._dense, layers, masks, self._images)


class OneShotTrial(tune.Trainable):  # type: ignore[misc]
    """Set the weights of a proposed allocation, evaluate on validation, report; the actor is then reused.

    Each step evaluates further images, up to the next rung of the search.
    """

    def setup(self, config: dict[str, float], inputs: OneShotInputs) -> None:
        torch.set_num_threads(inputs.threads)
        self._inputs = inputs
        self._order = inputs.order.open(device=inputs.device)
        self._model = load_checkpoint(inputs.checkpoint, shared=True).model.eval().to(inputs.device)
        self._parameters = dict(self._model.named_parameters())
        self._before = {name: weight.detach().clone() for name, weight in self._parameters.items()}
        count = inputs.search.reconstruct
        self._solver = Solver(inputs.dense, inputs.data, inputs.seed, count, inputs.device) if count else None
        preprocessing = models.data_config(self._model)
        images = data.split(inputs.data, "validation", data.eval_transform(preprocessing), inputs.seed)
        ends = inputs.search.rungs(len(images))
        self._parts = list(pairwise([0, *ends]))
        # decoded once for all actors of a node: a trial only evaluates
        self._images = Pixels.of(images, ends[-1], preprocessing, inputs.device)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, float]) -> bool:
        self._values = new_config
        self._results: list[Evaluation] = []
        return True

    def step(self) -> dict[str, Any]:
        if not self._results:
            self._set_weights()
        first, last = self._parts[len(self._results)]
        self._results.append(evaluate(self._model, self._images.batches(first, last, _BATCH)))
        report = self._report()
        return {**report, "done": report["complete"]}  # Tune's own key

    def _report(self) -> EpochReport:
        """The figures on the images that were evaluated so far."""
        result, speed = Evaluation.over(self._results), self._inputs.speed
        costs = self._inputs.costs.at(self._allocation)
        report: EpochReport = {
            "score": -result.loss if self._inputs.search.objective == "cross_entropy" else result.score,
            "val_top1": result.top1,
            "val_loss": result.loss,
            "images": result.images,
            "sparsity": self._sparsity,
            "parameters": costs.parameters,
            "parameters_sparse": costs.parameters_sparse,
            "macs": costs.macs,
            "macs_sparse": costs.macs_sparse,
            "allocation": self._allocation,
            "shares": summarise(self._allocation, self._inputs.space.layers),
            "complete": len(self._results) == len(self._parts),
        }
        return report if speed is None else {**report, **speed.at(self._allocation)}

    def _set_weights(self) -> None:
        self._allocation = self._inputs.space.allocation(self._values, self._order.losses)
        ordered = {name: self._before[name] for name in self._order}
        weights, masks = self._order.weights_at(ordered, self._allocation)
        self._sparsity = masks.sparsity
        if self._solver is None:
            write_weights(self._model, weights)
            return
        write_weights(self._model, {**self._before, **weights})  # reset biases: the last trial changed them
        self._solver.solve(self._model, self._inputs.space.layers, masks)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        return None

    def load_checkpoint(self, checkpoint: Any) -> None:
        return None
