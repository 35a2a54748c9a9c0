"""Compute an elimination order of a dense model, by one worker or several, and store it."""

from __future__ import annotations

import torch

from pruners.methods.registry import create_pruner
from pruners.model.masks import MaskSet
from pruners.one_shot import pattern_budget
from trainers import distributed, storage
from trainers.checkpoint.folder import load_checkpoint
from trainers.config.jobs import OrderJob
from trainers.data import datasets
from trainers.loop.prune_step import Goal, gradient_source, order_share, ordering, prunable_layers, sharing_of
from trainers.models import factory

ORDER_FACTS = "facts.json"


def write_order(job: OrderJob, device: torch.device) -> None:
    """Order this worker's share of the layers, and write it as a part of the order.

    When all workers have written their parts, rank 0 writes :data:`ORDER_FACTS`, which marks the order as
    complete.

    Raises:
        InputError: a checkpoint, data or settings that cannot be used.
    """
    torch.set_num_threads(job.threads)
    rank, world = distributed.rank(), distributed.world_size()
    pruning = job.pruning
    model = load_checkpoint(job.checkpoint, layers=pruning.layers, shared=True).model.to(device)
    layers = prunable_layers(model, pruning)
    pruner = create_pruner(job.method, **pruning.options(job.method))
    masks = MaskSet.from_zeros(model, layers)
    source = gradient_source(
        datasets.split(job.data, "train", datasets.eval_transform(factory.data_config(model)), job.seed),
        pruning.fisher,
        pruner,
        tries_damps=pruning.tries_damps(job.method),
        rank=rank,
        world=world,
        seed=job.seed,
    )
    total = pattern_budget(layers, pruning.sparsity, pruner.sparsity_pattern, masks)
    goal = Goal(total, sharing_of(pruning, pruner))
    work = ordering(model, layers, masks, pruner, source)
    order, damp = order_share(work, source, goal)
    if pruning.order_begins_at:
        limits = sharing_of(pruning, pruner).limits(layers, masks.pruned(), unit=pruner.sparsity_pattern.unit)
        order = order.beyond(work.weights, {name: least for name, (least, _) in limits.items()})
    with storage.writing(f"{job.folder}/part-{rank}") as folder:
        order.save(folder, job.fingerprint)
    distributed.all_gather(rank)  # a barrier: all workers have written
    if rank == 0:
        facts = {"parts": world} | ({} if damp is None else {"damp": damp.damp, "why": damp.why})
        storage.write_json(f"{job.folder}/{ORDER_FACTS}", facts)
