"""Pruning in one shot, in one process: from a model to a pruned model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruners.allocation.bounds import PerLayer, per_layer
from pruners.allocation.projection import budget
from pruners.allocation.sharing import Allocation, Scope, Sharing
from pruners.elimination.damping import DampChoice, choose_damp
from pruners.elimination.gradients import Batch, Loss, summed_loss
from pruners.elimination.order import EliminationOrder
from pruners.errors import InputError
from pruners.methods.base import Pruner
from pruners.methods.registry import create_pruner
from pruners.model.layers import PrunableLayer, find_layers
from pruners.model.masks import MaskSet
from pruners.model.sparsity_pattern import Pattern, fitting_layers
from pruners.order_builder import OrderBuilder, Progress, repeatable, write_weights
from pruners.reconstruction.reconstruct import Reconstruction
from pruners.reconstruction.reconstruct import reconstruct as reconstruct_layers
from pruners.rounds import Shares, round_sparsities

_HELD_OUT = 16  # batches that compare the λ of ``damp="auto"``


@dataclass(frozen=True)
class PruneReport:
    """The report of :func:`prune`.

    Attributes:
        method: name of the method.
        allocation: number of pruned weights in each layer.
        masks: ``True`` for kept weights.
        sparsity: pruned share of the prunable weights.
        order: the elimination order, which also gives the weights at every other allocation
            (:meth:`EliminationOrder.weights_at`, from the weights before); after several rounds the order of
            the last one, from the weights before that round.
        damp: the choice among several λ, for ``damp="auto"``; after several rounds the last choice.
        rounds: the sparsity after each round.
        reconstruction: the report of the reconstruction after the last round, if one was requested.
    """

    method: str
    allocation: Allocation
    masks: MaskSet
    sparsity: float
    order: EliminationOrder
    damp: DampChoice | None = None
    rounds: tuple[float, ...] = ()
    reconstruction: Reconstruction | None = None


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
    rounds: int | Sequence[float] = 1,
    reconstruct: int = 0,
    held_out: Iterable[Batch] | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
    **options: object,
) -> PruneReport:
    """Prune a model in one shot, in place. After an error it is as it was.

    Half-precision models are pruned in float32, and have their own types back afterwards.

    >>> report = prune(model, "ovit", sparsity=0.5, batches=loader, pattern="1x4")
    >>> report.sparsity
    0.5

    Args:
        model: the model.
        method: a name in :data:`pruners.METHODS`, or a pruner of your own.
        sparsity: pruned share of the prunable weights, 0 to 1; default the one that an N:M pattern implies.
        batches: (images, labels), for methods that need gradients.
        loss: the mean loss of a batch, from outputs and labels.
        layers: the layers to prune; default all prunable layers (:func:`find_layers`).
        scope: which layers share one threshold; default the method's own.
        floor: least sparsity of a layer: one for all layers, or sparsities by patterns on layer names.
        ceiling: largest sparsity of a layer, in the same way.
        table: a sparsity for each layer by patterns on its name, instead of thresholds.
        unfit: what to do with layers that the pattern does not fit: ``refuse`` them by an error, or leave
            them ``dense``.
        gradients: number of gradients at most; default the method's own.
        per_sample: gradients of single images instead of batches.
        rounds: number of rounds, or the sparsity after each of them, the last one ``sparsity``. The gradients
            are divided among the rounds; those of a round are computed at the weights after the last one.
        reconstruct: number of images, of the first batches, on which the kept weights are solved again after
            each round, so that each layer's outputs match those before (:mod:`pruners.reconstruction`); 0:
            no reconstruction.
        held_out: batches that compare the λ of ``damp="auto"``; default the batches after those of the
            gradients.
        memory: bytes for the Fisher; default a share of what is free.
        progress: is called with the kind of work, the number done, and the number in all.
        options: arguments of a method given by name: ``pattern``, ``block_size``, ``damp`` and so on.
            ``damp="auto"`` tries several λ.

    Returns:
        What was done.

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
    pattern = pruner.sparsity_pattern
    chosen = fitting_layers(find_layers(model) if layers is None else list(layers), pattern, unfit=unfit)
    sparsity = pattern.forced if sparsity is None else sparsity
    if sparsity is None:
        raise InputError("sparsity", None, "must be given, between 0 and 1")
    masks = MaskSet.from_zeros(model, chosen)
    total = pattern_budget(chosen, sparsity, pattern, masks)
    _check_weights(model, chosen)
    if sum(masks.pruned().values()) > total:
        raise InputError("sparsity", sparsity, f"the model is sparser already ({masks.sparsity:.4f})")
    sharing = Sharing(scope or pruner.scope, floor, ceiling, table)
    if (pruner.gradients or reconstruct) and batches is None:
        who = pruner.name if pruner.gradients else "reconstruct"
        raise InputError("batches", None, f"{who} needs batches of (images, labels)")
    in_steps = bool(reconstruct) or rounds != 1  # otherwise nothing is written before all is known
    with _in_float32(model, masks), _undone_by_errors(model) if in_steps else nullcontext():
        limit = pruner.gradients if gradients is None else gradients
        source: Iterable[Batch] = batches or ()
        if auto and held_out is None:
            source, held_out = _split(source, limit, per_sample)
        source, images = _with_first_images(source, reconstruct) if reconstruct else (source, [])
        dense = copy.deepcopy(model) if reconstruct else model
        steps = round_sparsities(rounds, masks.sparsity, sparsity)
        solved: Reconstruction | None = None
        shares = Shares(source, limit, len(steps), per_sample=per_sample)
        for number, step in enumerate(steps):
            builder = OrderBuilder(
                model,
                chosen,
                masks,
                pruner,
                shares.once,
                loss,
                limit=shares.gradients,
                per_sample=per_sample,
                memory=memory,
                progress=progress,
                depth=max(per_layer("ceiling", ceiling, chosen, 1.0).values(), default=1.0),
            )
            if builder.passes > 1:
                again = source if len(steps) == 1 else shares.again(number)
                builder.batches = repeatable(again, builder.passes)
            if number < len(steps) - 1:
                total = round_budget(sharing, chosen, step, pattern, masks)
            else:
                total = pattern_budget(chosen, step, pattern, masks)
            choice = _try_damps(builder, sharing, total, held_out or ()) if auto else None
            order = builder.order(None if choice is None else choice.damp)
            allocation = sharing.allocate(
                order.losses, chosen, total, pruned=masks.pruned(), unit=pattern.unit
            )
            new, masks = order.weights_at(builder.weights, allocation)
            write_weights(model, new)
            if reconstruct:
                solved = reconstruct_layers(model, dense, chosen, masks, images, progress=progress)
    return PruneReport(pruner.name, allocation, masks, masks.sparsity, order, choice, tuple(steps), solved)


def pattern_budget(layers: Sequence[PrunableLayer], sparsity: float, pattern: Pattern, masks: MaskSet) -> int:
    """The number of weights to prune for a sparsity, under a pattern.

    Args:
        layers: the prunable layers.
        sparsity: pruned share of their weights, 0 to 1.
        pattern: the sparsity pattern. 1×B rounds to whole blocks; N:M at its own sparsity prunes exactly as
            many weights as it can.
        masks: the masks of these layers.

    Returns:
        Number of weights.

    Raises:
        InputError: ``sparsity`` lies outside 0…1, or is larger than N:M allows.
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


def round_budget(
    sharing: Sharing, layers: Sequence[PrunableLayer], sparsity: float, pattern: Pattern, masks: MaskSet
) -> int:
    """The number of weights that a round before the last one prunes; more if the floors ask for it.

    Args:
        sharing: the way the budget is divided among layers, with the floors.
        layers, sparsity, pattern, masks: as for :func:`pattern_budget`.

    Returns:
        Number of weights.

    Raises:
        InputError: as :func:`pattern_budget`.
    """
    limits = sharing.limits(layers, masks.pruned(), unit=pattern.unit)
    return max(pattern_budget(layers, sparsity, pattern, masks), sum(least for least, _ in limits.values()))


def _try_damps(builder: OrderBuilder, sharing: Sharing, total: int, held_out: Iterable[Batch]) -> DampChoice:
    """Compare λ by the held-out loss of the models that they give; the model is left as it was."""
    if isinstance(held_out, Iterator):
        held_out = list(held_out)  # every λ reads it

    def loss_at(damp: float) -> float:
        order = builder.order(damp, last=False)
        unit, pruned = builder.pruner.sparsity_pattern.unit, builder.masks.pruned()
        allocation = sharing.allocate(order.losses, builder.layers, total, pruned=pruned, unit=unit)
        write_weights(builder.model, order.weights_at(builder.weights, allocation)[0])
        loss, images = summed_loss(builder.model, held_out, builder.loss)
        if not images:
            raise InputError("held_out", None, "damp = auto needs batches beyond those of the gradients")
        return loss / images

    try:
        return choose_damp(loss_at)
    finally:
        write_weights(builder.model, builder.weights)


def _split(batches: Iterable[Batch], limit: int, per_sample: bool) -> tuple[list[Batch], list[Batch]]:
    """The batches of ``limit`` gradients, and the next few for the comparison of λ."""
    source = iter(batches)
    first: list[Batch] = []
    count = 0
    while count < limit and (batch := next(source, None)) is not None:
        first.append(batch)
        count += len(batch[0]) if per_sample else 1
    return first, list(itertools.islice(source, _HELD_OUT))


def _with_first_images(batches: Iterable[Batch], number: int) -> tuple[Iterable[Batch], list[Tensor]]:
    """The batches, still unread even if they can be read only once, and their first ``number`` images."""
    source = iter(batches)
    read: list[Batch] = []
    while sum(len(images) for images, _ in read) < number and (batch := next(source, None)) is not None:
        read.append(batch)
    if not read:
        raise InputError("batches", None, "reconstruct needs batches of (images, labels)")
    excess = max(sum(len(images) for images, _ in read) - number, 0)
    images = [images for images, _ in read]
    images[-1] = images[-1][: len(images[-1]) - excess]
    return itertools.chain(read, source) if isinstance(batches, Iterator) else batches, images


@contextmanager
def _undone_by_errors(model: nn.Module) -> Iterator[None]:
    """Restore the model's parameters after an error."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    try:
        yield
    except BaseException:
        write_weights(model, before)
        raise


def _check_weights(model: nn.Module, layers: Sequence[PrunableLayer]) -> None:
    """Raise an error if a weight is NaN or Inf."""
    for layer in layers:
        if not torch.isfinite(model.get_parameter(layer.name)).all():
            raise InputError("weights", layer.name, "has NaN or Inf")


@contextmanager
def _in_float32(model: nn.Module, masks: MaskSet) -> Iterator[None]:
    """Convert half-precision parameters and buffers to float32; they have their own types back afterwards."""
    half = (torch.float16, torch.bfloat16)
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    types: dict[str, torch.dtype] = {
        name: tensor.dtype for name, tensor in named.items() if tensor.dtype in half
    }
    gradients: dict[str, Tensor | None] = {name: named[name].grad for name in types}
    for name in types:
        named[name].grad = None
        named[name].data = named[name].data.float()
    try:
        yield
    finally:
        for name, kind in types.items():
            exact = named[name].data
            rounded = exact.to(kind)
            if name in masks:  # a kept weight must not become zero by rounding
                rounded.masked_fill_((rounded == 0) & (exact != 0), torch.finfo(kind).tiny)
            named[name].data = rounded
            named[name].grad = gradients[name]
