"""Compute an elimination order of a model, by one worker or several, and store it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pruners.methods.base import Pruner
from pruners.methods.registry import create_pruner
from pruners.model.masks import MaskSet
from pruners.one_shot import round_budget
from trainers import distributed, storage
from trainers.checkpoint.folder import load_checkpoint
from trainers.config.jobs import OrderJob
from trainers.config.pruning import PruningSettings
from trainers.data import datasets
from trainers.loop.prune_step import Goal, gradient_source, order_share, ordering, prunable_layers, sharing_of
from trainers.models import factory

ORDER_FACTS = "facts.json"


def round_of(
    pruning: PruningSettings, pruner: Pruner, rounds: Sequence[float], number: int
) -> tuple[PruningSettings, int]:
    """The settings of a round, and the number of gradients that earlier rounds used.

    Args:
        pruning: of the recipe.
        pruner: the method.
        rounds: the sparsity after each round; empty: one round, to the recipe's sparsity.
        number: of the round, from 0.
    """
    if len(rounds) <= 1:
        return pruning, 0
    settings = pruning.of_round(rounds[number], pruner.gradients, len(rounds))
    return settings, number * (settings.fisher.gradients or 0)


def write_order(job: OrderJob, device: torch.device) -> None:
    """Order this worker's share of the layers, and write it as a part of the order.

    When all workers have written their parts, rank 0 writes :data:`ORDER_FACTS`, which marks the order as
    complete.

    Raises:
        InputError: a checkpoint, data or settings that cannot be used.
    """
    torch.set_num_threads(job.threads)
    rank, world = distributed.rank(), distributed.world_size()
    pruner = create_pruner(job.method, **job.pruning.options(job.method))
    pruning, skip = round_of(job.pruning, pruner, job.rounds, job.round)
    model = load_checkpoint(job.checkpoint, layers=pruning.layers, shared=True).model.to(device)
    layers = prunable_layers(model, pruning)
    masks = MaskSet.from_zeros(model, layers)
    source = gradient_source(
        datasets.split(job.data, "train", datasets.eval_transform(factory.data_config(model)), job.seed),
        pruning.fisher,
        pruner,
        tries_damps=pruning.tries_damps(job.method),
        rank=rank,
        world=world,
        seed=job.seed,
        skip=skip,
    )
    sharing, pattern = sharing_of(pruning, pruner), pruner.sparsity_pattern
    goal = Goal(round_budget(sharing, layers, pruning.sparsity, pattern, masks), sharing)
    work = ordering(model, layers, masks, pruner, source)
    order, damp = order_share(work, source, goal)
    if pruning.order_begins_at:
        limits = sharing.limits(layers, masks.pruned(), unit=pattern.unit)
        order = order.beyond(work.weights, {name: least for name, (least, _) in limits.items()})
    with storage.writing(f"{job.folder}/part-{rank}") as folder:
        order.save(folder, job.fingerprint)
    distributed.all_gather(rank)  # a barrier: all workers have written
    if rank == 0:
        facts = {"parts": world} | ({} if damp is None else {"damp": damp.damp, "why": damp.why})
        storage.write_json(f"{job.folder}/{ORDER_FACTS}", facts)
