"""From gradients to an order, in as many passes as the memory asks for, on one process or one of several."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pruners.elimination.fisher import BlockFisher
from pruners.elimination.gradients import Batch, Loss, gradients
from pruners.elimination.memory import free_bytes, layer_groups
from pruners.elimination.order import EliminationOrder, merge
from pruners.errors import InputError
from pruners.methods.base import Pruner
from pruners.methods.second_order import SecondOrder
from pruners.model.layers import PrunableLayer

Progress = Callable[[str, int, int], None]
"""Told (what is done, how many are done, how many there are)."""

Gather = Callable[[BlockFisher, Sequence[PrunableLayer]], Sequence[PrunableLayer]]
"""Brings the gradients of all workers together; returns the layers that this one orders."""


def alone(fisher: BlockFisher | None, layers: Sequence[PrunableLayer]) -> Sequence[PrunableLayer]:
    """A process by itself orders all layers."""
    return layers


@dataclass
class Ordering:
    """What is needed to order the weights of a model, by one λ or several.

    Args:
        batches: gives the batches of gradients afresh for every pass; each pass must see the same.
        limit: how many gradients at most.
        memory: bytes for the Fisher; default a share of what is free. What it cannot hold at once is done
            in groups of layers, each with a pass over the gradients of its own; what is known of the
            survivors then waits on disk.
        gather: what makes it one worker of several.
        depth: the deepest sparsity of a layer that will be asked for; second-order methods go no further.
    """

    model: nn.Module
    layers: Sequence[PrunableLayer]
    masks: Mapping[str, Tensor]
    pruner: Pruner
    batches: Callable[[], Iterable[Batch]]
    loss: Loss
    limit: int | None = None
    per_sample: bool = False
    memory: int | None = None
    gather: Callable[[Any, Sequence[PrunableLayer]], Sequence[PrunableLayer]] = alone
    progress: Progress | None = None
    depth: float = 1.0

    def __post_init__(self) -> None:
        parameters = dict(self.model.named_parameters())
        # the weights as they were: trials of several λ write into the model
        self._weights = {layer.name: parameters[layer.name].detach().clone() for layer in self.layers}
        self._groups = self._plan()
        self._kept: BlockFisher | None = None
        self._mine: Sequence[PrunableLayer] = ()
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights that orders are of, by parameter name."""
        return self._weights

    @property
    def passes(self) -> int:
        """How often an order takes the gradients."""
        return len(self._groups) if isinstance(self.pruner, SecondOrder) else 0

    def order(self, damp: float | None = None, *, last: bool = True) -> EliminationOrder:
        """The order of this process's share of the layers.

        Args:
            damp: λ in place of the method's own.
            last: no other λ will be asked for, so the Fisher's memory is given back on the way.
        """
        pruner = self.pruner
        if damp is not None:
            assert isinstance(pruner, SecondOrder), "only second-order methods are damped"
            pruner = replace(pruner, damp=damp, relative=False)
        parts: list[EliminationOrder] = []
        failure: InputError | None = None
        for group in self._groups:
            fisher, mine = self._fisher(pruner, group)
            if fisher is not None and damp is not None:
                fisher.damp, fisher.relative = damp, False
            part = EliminationOrder()
            for number, layer in enumerate(mine):
                try:
                    part |= self._ordered(pruner, layer, fisher) if failure is None else {}
                except InputError as error:
                    failure = error  # the other groups are gathered all the same: other workers wait there
                if fisher is not None and (last or len(self._groups) > 1):
                    fisher.discard(layer.name)
                self._tell("layers", number + 1, len(mine))
            parts.append(self._spilled(part, len(parts)) if len(self._groups) > 1 else part)
        if last:
            self._kept = None
        if failure is not None:
            raise failure
        return merge(parts)

    def _ordered(self, pruner: Pruner, layer: PrunableLayer, fisher: BlockFisher | None) -> EliminationOrder:
        if isinstance(pruner, SecondOrder):
            return pruner.order(self._weights, [layer], self.masks, fisher, depth=self.depth)
        return pruner.order(self._weights, [layer], self.masks, fisher)

    def _fisher(
        self, pruner: Pruner, group: Sequence[PrunableLayer]
    ) -> tuple[BlockFisher | None, Sequence[PrunableLayer]]:
        if self._kept is not None:
            return self._kept, self._mine
        fisher = pruner.fisher(group)
        if fisher is not None:
            write(self.model, self._weights)  # the trial of another λ may have left its own there
            limit = self.limit or 0
            for some in gradients(
                self.model,
                group,
                self.masks,
                self.batches(),
                self.loss,
                limit=self.limit,
                per_sample=self.per_sample,
            ):
                fisher.add_many(some)
                self._tell("gradients", fisher.count, max(limit, fisher.count))
            fisher.flush()
            if fisher.blank and any(bool(self.masks[layer.name].any()) for layer in group):
                expected = "is zero in every layer: has the model one class, or are its answers constant?"
                raise InputError("gradient", 0.0, expected)
        mine = self.gather(fisher, group)
        if len(self._groups) == 1:
            self._kept, self._mine = fisher, mine
        return fisher, mine

    def _plan(self) -> list[Sequence[PrunableLayer]]:
        fisher = self.pruner.fisher(self.layers)
        if fisher is None or not self.layers:
            return [self.layers]
        device = self._weights[self.layers[0].name].device
        budget = free_bytes(device) if self.memory is None else self.memory
        sizes = {layer.name: fisher.block_size(layer.name) for layer in self.layers}
        number = 8 if isinstance(self.pruner, SecondOrder) and self.pruner.double else 4
        return list(layer_groups(self.layers, sizes, budget, number))

    def _spilled(self, part: EliminationOrder, number: int) -> EliminationOrder:
        """The same order, its updates read from disk as they are needed."""
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="espalier-order-")
        folder = Path(self._scratch.name) / str(number)
        part.save(folder, "scratch")
        device = str(next(iter(self._weights.values())).device)
        return EliminationOrder.load(folder, "scratch").on(device)

    def _tell(self, what: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(what, done, total)


def again(batches: Iterable[Batch], passes: int) -> Callable[[], Iterable[Batch]]:
    """``batches`` for several passes.

    Raises:
        InputError: they can be read once only.
    """
    if passes > 1 and isinstance(batches, Iterator):
        raise InputError(
            "memory",
            None,
            f"holds the Fisher in {passes} parts only, and batches can be read once: "
            "give a list or a DataLoader, or more memory",
        )
    return lambda: batches


def write(model: nn.Module, new: Mapping[str, Tensor]) -> None:
    """Write weights into a model, by parameter name."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in new.items():
            parameters[name].copy_(weight)
