"""One pruning step over data-parallel workers: each orders its share of the layers, and all get the result.

Each worker computes other gradients, receives the Fisher blocks of its own layers only, and eliminates their
weights; losses and results are then broadcast. The maths (:mod:`pruners`) does not depend on workers.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from pruners.allocation.bounds import per_layer
from pruners.allocation.sharing import Allocation, Sharing
from pruners.arithmetic import ceil_div
from pruners.elimination.damping import DampChoice, choose_damp
from pruners.elimination.fisher import BlockFisher
from pruners.elimination.gradients import Batch, summed_loss
from pruners.elimination.memory import free_bytes
from pruners.elimination.order import EliminationOrder
from pruners.errors import InputError
from pruners.methods.base import Pruner
from pruners.model.layers import PrunableLayer, find_layers
from pruners.model.masks import MaskSet
from pruners.model.sparsity_pattern import Pattern, fitting_layers
from pruners.order_builder import OrderBuilder, write_weights
from pruners.reconstruction.reconstruct import Reconstruction, reconstruct
from trainers import distributed
from trainers.config.pruning import FisherSettings, PruningSettings
from trainers.data.datasets import fixed_batches

_HELD_OUT = 16  # batches, over all workers, on which the λ of ``damp: auto`` are compared


def owners(layers: Sequence[PrunableLayer], world: int) -> dict[str, int]:
    """Assign each layer to a worker: the largest layers first, each to the worker with the fewest weights.

    Args:
        layers: the layers to order.
        world: number of workers.

    Returns:
        The rank of each layer's owner, by name.
    """
    load = [0] * world
    owner_of: dict[str, int] = {}
    for layer in sorted(layers, key=lambda layer: (-layer.numel, layer.name)):
        owner = load.index(min(load))
        owner_of[layer.name] = owner
        load[owner] += layer.numel
    return owner_of


@dataclass(frozen=True)
class Gradients:
    """The source of the gradients of a pruning step, and their number.

    Attributes:
        batches: returns this worker's batches (images, labels), the same at every call; the number of batches
            differs by one at most between workers.
        limit: how many gradients this worker computes at most.
        per_sample: a gradient of each image, not of each batch.
        held_out: returns this worker's batches on which several λ are compared.
        memory: bytes for the Fisher of this worker; default: a share of what is free.
    """

    batches: Callable[[], Iterable[Batch]]
    limit: int | None = None
    per_sample: bool = False
    held_out: Callable[[], Iterable[Batch]] | None = None
    memory: int | None = None


def gradient_source(
    images: Dataset[tuple[Tensor, int]],
    settings: FisherSettings,
    pruner: Pruner,
    *,
    tries_damps: bool,
    rank: int,
    world: int,
    seed: int,
    skip: int = 0,
) -> Gradients:
    """This worker's share of the gradients that a recipe asks for.

    Held-out batches are those that follow the gradients' batches in the fixed order of the images.

    Args:
        images: items are (image (3, H, W), label).
        settings: the recipe's Fisher.
        pruner: the method, for its default number of gradients.
        tries_damps: whether several λ are compared, which takes held-out batches.
        rank: this worker.
        world: number of workers.
        seed: decides the order of the images.
        skip: number of gradients that earlier rounds have used; these follow them in the order of the images.

    Returns:
        The source of gradients.
    """

    def batches_of(gradients: int) -> int:
        return ceil_div(gradients, settings.batch_size) if settings.per_sample else gradients

    count, before = settings.gradients or pruner.gradients, batches_of(skip)
    batches = batches_of(count)

    # with a gradient of each image the last batch may be needed in part only
    images_of = [
        min(settings.batch_size, count - n * settings.batch_size) for n in range(rank, batches, world)
    ]

    def part(first: int, last: int) -> Iterable[Batch]:
        return fixed_batches(
            images, settings.batch_size, before + first, before + last, rank=rank, world=world, seed=seed
        )

    return Gradients(
        lambda: part(0, batches),
        limit=sum(images_of) if settings.per_sample else None,
        per_sample=settings.per_sample,
        held_out=(lambda: part(batches, batches + _HELD_OUT)) if tries_damps else None,
        memory=settings.memory,
    )


def prunable_layers(model: nn.Module, settings: PruningSettings) -> list[PrunableLayer]:
    """The layers of a model that a recipe prunes.

    Raises:
        InputError: patterns that match nothing, or layers that the sparsity pattern cannot fit.
    """
    layers = find_layers(model, settings.layers)
    return fitting_layers(layers, Pattern.parse(settings.pattern), unfit=settings.unfit)


@dataclass(frozen=True)
class Goal:
    """The goal of a pruning step.

    Attributes:
        total: number of pruned weights in all layers.
        target: number of pruned weights of each layer, or how ``total`` is divided among the layers.
    """

    total: int
    target: Allocation | Sharing


def sharing_of(settings: PruningSettings, pruner: Pruner) -> Sharing:
    """The recipe's way to divide a budget among layers; default: the method's."""
    return Sharing(settings.scope or pruner.scope, settings.floor, settings.ceiling, settings.table)


@dataclass(frozen=True)
class StepReport:
    """The result of a pruning step: the new masks, and the λ that was chosen where several were compared."""

    masks: MaskSet
    damp: DampChoice | None = None


def ordering(
    model: nn.Module,
    layers: Sequence[PrunableLayer],
    masks: MaskSet,
    pruner: Pruner,
    source: Gradients,
) -> OrderBuilder:
    """Make the builder that orders this worker's share of the layers, from the gradients of all workers.

    Args:
        model: the model to prune.
        layers: the layers to prune.
        masks: of weights that are pruned already.
        pruner: the method.
        source: this worker's gradients.

    Returns:
        The builder; nothing is computed yet.
    """
    owner = owners(layers, distributed.world_size())
    device = next(model.parameters()).device

    def gather(fisher: BlockFisher | None, group: Sequence[PrunableLayer]) -> Sequence[PrunableLayer]:
        if fisher is not None:
            _gather_fisher(fisher, group, owner, device)
        return [layer for layer in group if owner[layer.name] == distributed.rank()]

    return OrderBuilder(
        model,
        layers,
        masks,
        pruner,
        source.batches,
        functional.cross_entropy,
        limit=source.limit,
        per_sample=source.per_sample,
        memory=_budget(device) if source.memory is None else source.memory,
        gather=gather,
    )


def _budget(device: torch.device) -> int:
    """Bytes for the Fisher of each worker: the same on all, which must process the same groups of layers.

    The workers of one machine share its memory.
    """
    host = socket.gethostname()
    everywhere = distributed.all_gather((host, free_bytes(device)))
    sharing = Counter(name for name, _ in everywhere) if device.type == "cpu" else Counter()
    return min(free // max(sharing[name], 1) for name, free in everywhere)


def prune_step(work: OrderBuilder, source: Gradients, goal: Goal) -> StepReport:
    """Prune a model in place, on every worker.

    Args:
        work: as :func:`ordering` makes it; its model is pruned.
        source: this worker's gradients.
        goal: of the step.

    Returns:
        The new masks, and the chosen λ.

    Raises:
        RuntimeError: workers that do not end with the same masks.
    """
    order, choice = order_share(work, source, goal)
    result = _apply(work, order, goal)
    if not distributed.all_equal(result.fingerprint()):
        raise RuntimeError("the workers ended a pruning step with different masks")
    return StepReport(result, choice)


def reconstruct_step(
    model: nn.Module, dense: nn.Module, layers: Sequence[PrunableLayer], masks: MaskSet, images: list[Tensor]
) -> Reconstruction:
    """Solve the kept weights of a pruned model again, in place, the same on every worker.

    Args:
        model: the pruned model.
        dense: what it was before the pruning step.
        layers: its prunable layers.
        masks: ``True`` for kept weights.
        images: this worker's batches of them, (N, 3, H, W).

    Returns:
        What was done, with the images of all workers.

    Raises:
        InputError: no layer can be solved, or an activation is not finite.
    """
    done = reconstruct(model, dense, layers, masks, images, summed=distributed.sum_over_workers)
    parameters = dict(model.named_parameters())
    for name in done.errors:  # the workers' processors may round differently
        for key in (name, f"{name.removesuffix('.weight')}.bias"):
            if key in parameters:
                distributed.broadcast(parameters[key].detach(), 0)
    return done


def order_share(
    work: OrderBuilder, source: Gradients, goal: Goal
) -> tuple[EliminationOrder, DampChoice | None]:
    """Compute the order of this worker's share of the layers.

    Args:
        work: as :func:`ordering` makes it.
        source: this worker's gradients; with held-out batches several λ are compared.
        goal: the sparsity at which they are compared.

    Returns:
        The order, and the λ that was chosen; ``None`` where the method has one.

    Raises:
        InputError: every λ fails, on this worker or on another.
    """
    work.depth = _deepest(work.layers, goal.target)
    if source.held_out is None:
        return work.order(), None
    held_out = source.held_out

    def loss_at(damp: float) -> float:
        order, failure = None, None
        try:
            order = work.order(damp, last=False)
        except InputError as error:
            if error.key != "damp":
                raise
            failure = error
        device = next(work.model.parameters()).device
        failed = distributed.sum_over_workers(torch.tensor(0.0 if failure is None else 1.0, device=device))
        if failure is not None:
            raise failure
        if order is None or float(failed):  # all workers skip this λ together
            raise InputError("damp", damp, "failed on another worker")
        _apply(work, order, goal)
        value, images = summed_loss(work.model, held_out(), functional.cross_entropy)
        sums = distributed.sum_over_workers(torch.tensor([value, float(images)], device=device))
        return float(sums[0] / sums[1].clamp_min(1))

    try:
        choice = choose_damp(loss_at)
    finally:
        write_weights(work.model, work.weights)
    return work.order(choice.damp), choice


def _deepest(layers: Sequence[PrunableLayer], target: Allocation | Sharing) -> float:
    """The largest sparsity that any layer may reach."""
    if isinstance(target, Sharing):
        return max(per_layer("ceiling", target.ceiling, layers, 1.0).values(), default=1.0)
    return max((target[layer.name] / layer.numel for layer in layers), default=1.0)


def _apply(work: OrderBuilder, order: EliminationOrder, goal: Goal) -> MaskSet:
    """Write the weights that an order gives at a goal into the model, on every worker."""
    layers, target = work.layers, goal.target
    owner = owners(layers, distributed.world_size())
    parameters = dict(work.model.named_parameters())
    pruned = work.masks.pruned()
    if isinstance(target, Sharing):
        losses = _gather_losses(order, layers, owner, next(iter(parameters.values())).device)
        unit = work.pruner.sparsity_pattern.unit
        target = target.allocate(losses, layers, goal.total, pruned=pruned, unit=unit)
    _check_kept(target, pruned)
    new: dict[str, Tensor] = {}
    for layer in layers:
        weight = parameters[layer.name].detach()
        mask = torch.empty(layer.shape, dtype=torch.bool, device=weight.device)
        if layer.name in order:
            pruned_weight, mask = order[layer.name].at(work.weights[layer.name], target[layer.name])
            weight.copy_(pruned_weight)
        distributed.broadcast(weight, owner[layer.name])
        new[layer.name] = distributed.broadcast_bool(mask, owner[layer.name])
    return MaskSet(new)


def _check_kept(allocation: Allocation, pruned: Mapping[str, int]) -> None:
    """Check that an allocation keeps the zeros that a layer has.

    Raises:
        InputError: a layer that would get fewer zeros than it has.
    """
    for name, count in pruned.items():
        if allocation[name] < count:
            expected = f"{count:,} of its weights are zero already, and none comes back"
            raise InputError(f"allocation.{name}", allocation[name], expected)


def _gather_fisher(
    fisher: BlockFisher, layers: Sequence[PrunableLayer], owner: Mapping[str, int], device: torch.device
) -> None:
    """Sum each layer's Fisher blocks on its owner, and discard them elsewhere."""
    for layer in layers:
        for part in fisher.parts(layer, device):
            distributed.reduce(part, owner[layer.name])
        if owner[layer.name] != distributed.rank():
            fisher.discard(layer.name)
    count = torch.tensor(fisher.count, device=device)
    fisher.count = int(distributed.sum_over_workers(count))


def _gather_losses(
    order: EliminationOrder,
    layers: Sequence[PrunableLayer],
    owner: Mapping[str, int],
    device: torch.device,
) -> dict[str, Tensor]:
    """Broadcast the losses of each layer's elimination from its owner to all workers."""
    losses = {}
    own_losses = order.losses
    for layer in layers:
        own = own_losses[layer.name].double().contiguous() if layer.name in own_losses else None
        reach = torch.tensor(0 if own is None else len(own), device=device)
        reach = distributed.broadcast(reach, owner[layer.name])  # a pattern may leave less than the layer
        if own is None:
            own = torch.empty(int(reach), dtype=torch.float64, device=device)
        losses[layer.name] = distributed.broadcast(own, owner[layer.name])
    return losses
