"""From gradients to an elimination order: in one pass or several, in one process or one of several."""

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
from pruners.elimination.memory import free_bytes, give_back_freed, layer_groups
from pruners.elimination.order import EliminationOrder, merge
from pruners.errors import InputError
from pruners.methods.base import Pruner
from pruners.methods.second_order import SecondOrder
from pruners.model.layers import PrunableLayer
from pruners.model.masks import MaskSet

Progress = Callable[[str, int, int], None]
"""Is called with the kind of work (``gradients``, ``layers``), the number done, and the number in all."""

Gather = Callable[[BlockFisher, Sequence[PrunableLayer]], Sequence[PrunableLayer]]
"""Sums the Fisher over all workers; returns the layers that this worker orders."""


def single_process(fisher: BlockFisher | None, layers: Sequence[PrunableLayer]) -> Sequence[PrunableLayer]:
    """The :data:`Gather` of a single process: it orders all layers."""
    return layers


@dataclass
class OrderBuilder:
    """Builds the elimination order of a model's weights, for one λ or several.

    The weights are those that the model has when the builder is created.

    Args:
        model: the model.
        layers: its prunable layers.
        masks: the masks of these layers.
        pruner: the method.
        batches: returns the batches for the gradients, the same at every call; each pass calls it once.
        loss: the mean loss of a batch.
        limit: number of gradients at most; default all that the batches give.
        per_sample: gradients of single images instead of batches.
        memory: bytes for the Fisher; default a share of what is free. If all layers do not fit, they are
            worked on in groups, each with a pass over the gradients; the updates then lie on disk.
        gather: how several workers sum their Fishers; default one process.
        progress: is called after each gradient and each layer.
        depth: the largest sparsity of a layer that will be asked for; second-order methods go no further.
    """

    model: nn.Module
    layers: Sequence[PrunableLayer]
    masks: MaskSet
    pruner: Pruner
    batches: Callable[[], Iterable[Batch]]
    loss: Loss
    limit: int | None = None
    per_sample: bool = False
    memory: int | None = None
    gather: Callable[[Any, Sequence[PrunableLayer]], Sequence[PrunableLayer]] = single_process
    progress: Progress | None = None
    depth: float = 1.0

    def __post_init__(self) -> None:
        parameters = dict(self.model.named_parameters())
        # a copy, because the trials of several λ write into the model
        self._weights = {layer.name: parameters[layer.name].detach().clone() for layer in self.layers}
        self._groups = self._layer_groups()
        self._fisher: BlockFisher | None = None  # kept for the next λ
        self._assigned: Sequence[PrunableLayer] = ()
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights that are ordered, by parameter name."""
        return self._weights

    @property
    def passes(self) -> int:
        """Number of passes over the gradients for one order; 0 for a method without gradients."""
        return len(self._groups) if isinstance(self.pruner, SecondOrder) else 0

    def order(self, damp: float | None = None, *, last: bool = True) -> EliminationOrder:
        """Compute the order of the layers that this process is assigned.

        Args:
            damp: λ instead of the method's own.
            last: whether no other λ will be asked for; the memory of the Fisher is then freed on the way.

        Returns:
            The order of these layers.

        Raises:
            InputError: NaN or zero gradients, a λ that is too small, or zeros that do not keep the pattern.
        """
        pruner = self.pruner
        if damp is not None:
            assert isinstance(pruner, SecondOrder), "only second-order methods are damped"
            pruner = replace(pruner, damp=damp, relative=False)
        parts: list[EliminationOrder] = []
        failure: InputError | None = None
        for group in self._groups:
            fisher, assigned = self._gathered_fisher(pruner, group)
            if fisher is not None and damp is not None:
                fisher.damp, fisher.relative = damp, False
            try:
                if failure is None:
                    frees = last or len(self._groups) > 1
                    parts.append(self._group_order(pruner, fisher, assigned, frees=frees))
            except InputError as error:
                failure = error  # gather the other groups all the same, because other workers wait for that
            fisher = None  # free the failed group's Fisher first
            if len(self._groups) > 1:
                give_back_freed()
        if last:
            self._fisher = None
        if failure is not None:
            raise failure
        return merge(parts)

    def _group_order(
        self, pruner: Pruner, fisher: BlockFisher | None, layers: Sequence[PrunableLayer], *, frees: bool
    ) -> EliminationOrder:
        """The order of a group's layers, on disk if there are several groups.

        Args:
            frees: whether the Fisher of each layer is freed as soon as the layer is ordered.
        """
        order = EliminationOrder()
        for number, layer in enumerate(layers):
            order |= self._ordered(pruner, layer, fisher)
            if fisher is not None and frees:
                fisher.discard(layer.name)
            self._report("layers", number + 1, len(layers))
        return order if len(self._groups) == 1 else self._on_disk(order)

    def _ordered(self, pruner: Pruner, layer: PrunableLayer, fisher: BlockFisher | None) -> EliminationOrder:
        if isinstance(pruner, SecondOrder):
            return pruner.order(self._weights, [layer], self.masks, fisher, depth=self.depth)
        return pruner.order(self._weights, [layer], self.masks, fisher)

    def _gathered_fisher(
        self, pruner: Pruner, group: Sequence[PrunableLayer]
    ) -> tuple[BlockFisher | None, Sequence[PrunableLayer]]:
        if self._fisher is not None:
            return self._fisher, self._assigned
        fisher = pruner.fisher(group)
        if fisher is not None:
            write_weights(self.model, self._weights)  # the trial of another λ may have changed them
            limit = self.limit or 0
            for batch_gradients in gradients(
                self.model,
                group,
                self.masks,
                self.batches(),
                self.loss,
                limit=self.limit,
                per_sample=self.per_sample,
            ):
                fisher.add_many(batch_gradients)
                self._report("gradients", fisher.count, max(limit, fisher.count))
            fisher.flush()
            if fisher.blank and any(bool(self.masks[layer.name].any()) for layer in group):
                expected = "is zero in every layer: has the model one class, or are its answers constant?"
                raise InputError("gradient", 0.0, expected)
        assigned = self.gather(fisher, group)
        if len(self._groups) == 1:
            self._fisher, self._assigned = fisher, assigned
        return fisher, assigned

    def _layer_groups(self) -> list[Sequence[PrunableLayer]]:
        fisher = self.pruner.fisher(self.layers)
        if fisher is None or not self.layers:
            return [self.layers]
        device = self._weights[self.layers[0].name].device
        budget = free_bytes(device) if self.memory is None else self.memory
        sizes = {layer.name: fisher.block_size(layer.name) for layer in self.layers}
        number = 8 if isinstance(self.pruner, SecondOrder) and self.pruner.double else 4
        return list(layer_groups(self.layers, sizes, budget, number))

    def _on_disk(self, part: EliminationOrder) -> EliminationOrder:
        """Write an order to disk, and read it back with its updates mapped into memory."""
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="espalier-order-")
        folder = Path(tempfile.mkdtemp(dir=self._scratch.name))
        part.save(folder, "scratch", rounded=False)
        device = str(next(iter(self._weights.values())).device)
        return EliminationOrder.load(folder, "scratch").on(device)

    def _report(self, kind: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(kind, done, total)


def repeatable(batches: Iterable[Batch], passes: int) -> Callable[[], Iterable[Batch]]:
    """A function that returns ``batches`` for each of several passes.

    Raises:
        InputError: there are several passes, but the batches can be read only once.
    """
    if passes > 1 and isinstance(batches, Iterator):
        raise InputError(
            "memory",
            None,
            f"holds the Fisher in {passes} parts only, and batches can be read once: "
            "give a list or a DataLoader, or more memory",
        )
    return lambda: batches


def write_weights(model: nn.Module, new: Mapping[str, Tensor]) -> None:
    """Copy weights into a model, by parameter name."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in new.items():
            parameters[name].copy_(weight)
