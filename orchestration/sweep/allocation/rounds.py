"""The rounds of a method's one-shot pruning: each orders the weights of the model that the last one made.

The results of a round are kept in the storage, in folders named by a hash of all that they depend on: the
elimination order, and the model from which the next round starts. The searches at all sparsities share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import ray

from orchestration.common.hashing import digest
from orchestration.search.training_trial import order_run
from orchestration.state.order_store import StoredOrder
from orchestration.sweep import tasks
from orchestration.sweep.artifacts import Dense
from orchestration.sweep.context import Sweep
from orchestration.sweep.tasks import OrderFacts, RoundModel
from pruners.methods.registry import create_pruner
from trainers import storage
from trainers.checkpoint.folder import PRUNING_RECORD, weights_hash
from trainers.config.jobs import OrderJob
from trainers.loop.elimination import round_of

_REACHED = 1e-9


@dataclass(frozen=True)
class Round:
    """A finished round: the model whose weights it ordered, and the order."""

    checkpoint: str
    order: StoredOrder


class Rounds:
    """The rounds of one method; a round is made when a search needs it.

    Args:
        sweep: with the recipe.
        method: of pruning.
        dense: the model that the first round prunes.
        sparsities: of all searches.
    """

    def __init__(self, sweep: Sweep, method: str, dense: Dense, sparsities: Sequence[float]) -> None:
        self._sweep, self._method, self._dense = sweep, method, dense
        self._searched = list(sparsities)
        pruning = sweep.recipe.pruning
        self._pruner = create_pruner(method, **pruning.options(method))
        self._done: list[Round] = []
        self._facts: dict[int, OrderFacts] = {}

    def leading_to(self, sparsity: float) -> tuple[Round, OrderFacts]:
        """The round that leads to a sparsity or beyond it, and the facts about its order that trials need."""
        number = self._number(sparsity)
        while len(self._done) <= number:
            self._done.append(self._next())
        last = self._done[number]
        if number not in self._facts:
            sparsities = [level for level in self._searched if self._number(level) == number]
            task, _ = self._sweep.task(tasks.order_facts)
            pruning = self._sweep.recipe.pruning
            facts = task.remote(last.checkpoint, pruning, self._method, last.order, sparsities)
            self._facts[number] = ray.get(facts)
        return last, self._facts[number]

    @cached_property
    def _levels(self) -> list[float]:
        """The sparsity after each round. If the sparsity is searched, the last round ends at its minimum."""
        recipe = self._sweep.recipe
        pruning, reach = recipe.pruning, recipe.allocation.reach
        end = pruning.sparsity if reach is None else reach[0]
        if len(pruning.rounds(self._method, 0.0, end)) == 1:
            return [end]
        task, _ = self._sweep.task(tasks.sparsity_of)
        start: float = ray.get(task.remote(self._dense.checkpoint, pruning))
        return pruning.rounds(self._method, start, end)

    def _number(self, sparsity: float) -> int:
        """The number of the round for a sparsity; the last round is also used for any higher sparsity."""
        if self._sweep.recipe.allocation.reach is not None:
            return len(self._levels) - 1
        reached = (number for number, level in enumerate(self._levels) if level >= sparsity - _REACHED)
        return next(reached, len(self._levels) - 1)

    def _next(self) -> Round:
        """Do the next round, or take its results from the storage."""
        sweep, number = self._sweep, len(self._done)
        checkpoint, weights = self._dense.checkpoint, self._dense.weights
        if number:
            checkpoint = self._model_after(number - 1)
            weights = weights_hash(checkpoint)
        settings, skip = round_of(sweep.recipe.pruning, self._pruner, self._levels, number)
        order = StoredOrder.of(
            sweep.storage,
            self._method,
            settings,
            weights=weights,
            data=sweep.data_hash,
            seed=sweep.recipe.seed,
            skip=skip,
        )
        if not order.known:
            with sweep.making(f"orders/{order.fingerprint}", f"{self._method}: {self._title(number)}"):
                if not order.known:
                    self._make(order, checkpoint, number)
        if "why" in order.facts:
            sweep.display.say(f"{self._method}: {order.facts['why']}")
        return Round(checkpoint, order)

    def _title(self, number: int) -> str:
        if len(self._levels) == 1:
            return "elimination"
        return (
            f"elimination of round {number + 1} of {len(self._levels)}, to {100 * self._levels[number]:.4g} %"
        )

    def _make(self, order: StoredOrder, checkpoint: str, number: int) -> None:
        """Make an order. With GPUs or several nodes a worker group does it, each worker with some layers.

        Otherwise it is one process, which uses all processors of a node.
        """
        sweep, resources = self._sweep, self._sweep.recipe.resources
        if len(self._levels) > 1:
            sweep.display.say(f"      {self._title(number)}")
        job = OrderJob(
            checkpoint=checkpoint,
            data=sweep.data,
            pruning=sweep.recipe.pruning,
            method=self._method,
            seed=sweep.recipe.seed,
            rounds=tuple(self._levels),
            round=number,
            threads=max(1, int(resources.cpus_per_worker)),
            folder=order.folder,
            fingerprint=order.fingerprint,
        )
        if resources.most > 1 and (resources.gpus_per_worker > 0 or len(sweep.size.nodes) != 1):
            with sweep.scratch(f"order-{order.fingerprint}") as scratch:
                order_run(job, resources, scratch)
            return
        task, device = sweep.task(tasks.make_order)
        ray.get(task.remote(job, device))

    def _model_after(self, number: int) -> str:
        """The folder of the model after a round, pruned by the method's own allocation."""
        sweep, before = self._sweep, self._done[number]
        pruning = sweep.recipe.pruning
        key = digest(
            before.order.fingerprint,
            self._levels[number],
            pruning.model_dump(mode="json", include={"scope", "table", "floor"}),
            *(
                [pruning.reconstruct, self._dense.weights, sweep.data_hash, sweep.recipe.seed]
                if pruning.reconstruct
                else []
            ),
        )
        folder = f"{sweep.storage}/rounds/{key}"
        if storage.exists(f"{folder}/{PRUNING_RECORD}"):
            return folder
        title = f"{self._method}: the model after round {number + 1}"
        with sweep.making(f"rounds/{key}", title):
            if not storage.exists(f"{folder}/{PRUNING_RECORD}"):
                job = RoundModel(
                    checkpoint=before.checkpoint,
                    order=before.order,
                    sparsity=self._levels[number],
                    method=self._method,
                    pruning=pruning,
                    dense=self._dense.checkpoint,
                    data=sweep.data,
                    seed=sweep.recipe.seed,
                    target=folder,
                )
                task, device = sweep.task(tasks.save_round)
                ray.get(task.remote(job, device))
        return folder
