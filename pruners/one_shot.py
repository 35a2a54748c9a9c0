"""Pruning in one shot, on one machine: from a model to a pruned model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruners.allocation.bounds import PerLayer, per_layer
from pruners.allocation.projection import budget
from pruners.allocation.sharing import Allocation, Scope, Sharing
from pruners.elimination.damping import DampChoice, choose_damp
from pruners.elimination.gradients import Batch, Loss, mean_loss
from pruners.elimination.order import EliminationOrder
from pruners.errors import InputError
from pruners.methods.base import Pruner
from pruners.methods.registry import create_pruner
from pruners.model.layers import PrunableLayer, find_layers
from pruners.model.masks import MaskSet
from pruners.model.sparsity_pattern import Pattern, fitting
from pruners.order_builder import Ordering, Progress, again, write

_HELD_OUT = 16  # batches that score the λ of ``damp="auto"``


@dataclass(frozen=True)
class PruneReport:
    """What :func:`prune` did: pruned weights of each layer, the masks, and the sparsity reached.

    ``damp`` is the choice among several λ, where one was asked for; ``order`` gives the weights at any other
    allocation too (:meth:`EliminationOrder.weights_at`, from the weights before).
    """

    method: str
    allocation: Allocation
    masks: MaskSet
    sparsity: float
    order: EliminationOrder
    damp: DampChoice | None = None


def prune(
    model: nn.Module,
    method: str | Pruner = "dimap",
    sparsity: float | None = None,
    *,
    batches: Iterable[Batch] | None = None,
    loss: Loss = nn.functional.cross_entropy,
    layers: Sequence[PrunableLayer] | None = None,
    scope: Scope | None = None,
    floor: PerLayer = 0.0,
    ceiling: PerLayer = 1.0,
    table: dict[str, float] | None = None,
    unfit: str = "refuse",
    gradients: int | None = None,
    per_sample: bool = False,
    held_out: Iterable[Batch] | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
    **options: object,
) -> PruneReport:
    """Prune ``model`` in one shot, in place; after an error it is as it was.

    Half-precision models are pruned in float32 and have their own types back afterwards.

    Args:
        method: a name (:data:`pruners.METHODS`), with ``options`` for it (``pattern``, ``block_size``,
            ``damp`` …; ``damp="auto"`` tries several), or a pruner of one's own.
        sparsity: pruned share of the prunable weights, 0 to 1; default what an N:M pattern leads to.
        batches: (images, labels) for methods that follow gradients.
        layers: default all prunable layers (:func:`find_layers`).
        scope: what shares one threshold; default the method's own.
        floor, ceiling: least and largest sparsity of a layer, for all or by patterns on their names.
        table: a sparsity for each layer by patterns on its name, instead of thresholds.
        unfit: what becomes of layers that the pattern cannot fit: ``refuse``, or ``dense``.
        gradients: how many to take at most; default the method's own.
        per_sample: gradients of single images instead of batches.
        held_out: batches that score ``damp="auto"``; default those that follow the gradients' own.
        memory: bytes that the Fisher may take; default a share of what is free.
        progress: told what is done of how much.

    Raises:
        InputError: an unknown method, option or scope, a sparsity outside 0…1 or below the model's own,
            missing batches, NaN in the weights or gradients, layers that the pattern does not fit.
    """
    auto = options.get("damp") == "auto"
    if auto:
        options = {key: value for key, value in options.items() if key != "damp"}
    if options and not isinstance(method, str):
        key, value = next(iter(options.items()))
        raise InputError(key, value, f"is for methods by name; {method.name} has options of its own")
    pruner = create_pruner(method, **options) if isinstance(method, str) else method
    if auto and not pruner.gradients:
        raise InputError("damp", "auto", f"{pruner.name} has no Fisher to damp")
    chosen = fitting(find_layers(model) if layers is None else list(layers), pruner.form, unfit=unfit)
    if sparsity is None:
        sparsity = pruner.form.forced
    if sparsity is None:
        raise InputError("sparsity", None, "must be given, between 0 and 1")
    masks = MaskSet.from_zeros(model, chosen)
    total = pattern_budget(chosen, sparsity, pruner.form, masks)
    _check_weights(model, chosen)
    if sum(masks.pruned().values()) > total:
        raise InputError("sparsity", sparsity, f"the model is sparser already ({masks.sparsity:.4f})")
    sharing = Sharing(scope or pruner.scope, floor, ceiling, table)
    if pruner.gradients and batches is None:
        raise InputError("batches", None, f"{pruner.name} needs batches of (images, labels)")
    with _in_float32(model, masks):
        limit = pruner.gradients if gradients is None else gradients
        source = batches or ()
        if auto and held_out is None:
            source, held_out = _split(source, limit, per_sample)
        ordering = Ordering(
            model,
            chosen,
            masks,
            pruner,
            lambda: source,
            loss,
            limit=limit,
            per_sample=per_sample,
            memory=memory,
            progress=progress,
            depth=max(per_layer("ceiling", ceiling, chosen, 1.0).values(), default=1.0),
        )
        ordering.batches = again(source, ordering.passes)
        choice = None
        if auto:
            choice = _try_damps(ordering, sharing, total, held_out or ())
        order = ordering.order(None if choice is None else choice.damp)
        allocation = sharing.allocate(
            order.losses, chosen, total, pruned=masks.pruned(), unit=pruner.form.unit
        )
        new, kept = order.weights_at(ordering.weights, allocation)
        write(model, new)
    return PruneReport(pruner.name, allocation, kept, kept.sparsity, order, choice)


def pattern_budget(layers: Sequence[PrunableLayer], sparsity: float, pattern: Pattern, masks: MaskSet) -> int:
    """How many weights ``sparsity`` is: whole blocks, or exactly what N:M leads to at its own sparsity.

    Raises:
        InputError: more than N:M leaves, with what is feasible.
    """
    total = budget(layers, sparsity)
    if pattern.whole:
        return round(total / pattern.unit) * pattern.unit
    if pattern.forced is None:
        return total
    most = sum(int(pattern.room(pattern.flat(mask)).sum() + (~mask).sum()) for mask in masks.values())
    if total > most:
        raise InputError("sparsity", sparsity, f"{pattern.name} leads to {pattern.forced:g} and no further")
    return total if sparsity < pattern.forced - 1e-9 else most


def _try_damps(ordering: Ordering, sharing: Sharing, total: int, held_out: Iterable[Batch]) -> DampChoice:
    """Score each λ by the held-out loss of the model it gives; the model is as it was afterwards."""
    if isinstance(held_out, Iterator):
        held_out = list(held_out)  # read once for every λ

    def loss_at(damp: float) -> float:
        order = ordering.order(damp, last=False)
        unit = ordering.pruner.form.unit
        pruned = {name: int((~mask).sum()) for name, mask in ordering.masks.items()}
        allocation = sharing.allocate(order.losses, ordering.layers, total, pruned=pruned, unit=unit)
        write(ordering.model, order.weights_at(ordering.weights, allocation)[0])
        value, images = mean_loss(ordering.model, held_out, ordering.loss)
        if not images:
            raise InputError("held_out", None, "damp = auto needs batches beyond those of the gradients")
        return value / images

    try:
        return choose_damp(loss_at)
    finally:
        write(ordering.model, ordering.weights)


def _split(batches: Iterable[Batch], limit: int, per_sample: bool) -> tuple[list[Batch], list[Batch]]:
    """The batches of ``limit`` gradients, and the next few."""
    source = iter(batches)
    first: list[Batch] = []
    found = 0
    while found < limit and (batch := next(source, None)) is not None:
        first.append(batch)
        found += len(batch[0]) if per_sample else 1
    return first, list(itertools.islice(source, _HELD_OUT))


def _check_weights(model: nn.Module, layers: Sequence[PrunableLayer]) -> None:
    for layer in layers:
        if not torch.isfinite(model.get_parameter(layer.name)).all():
            raise InputError("weights", layer.name, "has NaN or Inf")


@contextmanager
def _in_float32(model: nn.Module, masks: MaskSet) -> Iterator[None]:
    """The model's half-precision numbers in float32 for a while; each has its own type back afterwards."""
    short = (torch.float16, torch.bfloat16)
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    types: dict[str, torch.dtype] = {name: one.dtype for name, one in named.items() if one.dtype in short}
    gradients: dict[str, Tensor | None] = {name: named[name].grad for name in types}
    for name in types:
        named[name].grad = None
        named[name].data = named[name].data.float()
    try:
        yield
    finally:
        for name, kind in types.items():
            one = named[name].data
            result = one.to(kind)
            if name in masks:  # what is kept stays a number of its own
                result.masked_fill_((result == 0) & (one != 0), torch.finfo(kind).tiny)
            named[name].data = result
            named[name].grad = gradients[name]
