"""Functions that run as Ray tasks around the trials: elimination, the one-shot model, accuracy on test."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from orchestration.preflight.allocation import check_not_sparser
from orchestration.search.one_shot_trial import OneShotInputs, Solver
from orchestration.state.order_store import StoredOrder
from pruners.allocation.sharing import Allocation
from pruners.arithmetic import ceil_div
from pruners.elimination.order import EliminationOrder
from pruners.methods.registry import create_pruner
from pruners.model.costs import CostModel, cost_model
from pruners.model.layers import PrunableLayer
from pruners.model.masks import MaskSet
from pruners.one_shot import pattern_budget, round_budget
from pruners.order_builder import write_weights
from trainers import storage
from trainers.checkpoint.folder import Checkpoint, load_checkpoint, save_checkpoint, verify, weights_hash
from trainers.checkpoint.records import PROVENANCE_KEYS
from trainers.config.data import DataSettings, ModelSettings
from trainers.config.jobs import OrderJob
from trainers.config.pruning import PruningSettings
from trainers.config.quantization import Mode
from trainers.config.structured import StructuredSettings
from trainers.data import datasets as data
from trainers.data.preprocessing import preprocessing_of
from trainers.deploy.checked import BATCHES, write_checked
from trainers.deploy.formats import FORMATS
from trainers.deploy.formats import Source as EngineSource
from trainers.deploy.runnable import load_runnable
from trainers.loop.elimination import write_order
from trainers.loop.evaluation import evaluate
from trainers.loop.prune_step import prunable_layers, sharing_of
from trainers.models import factory as models
from trainers.models.weights_file import from_file
from trainers.quantization import int8_folder as int8
from trainers.structured.cut import cut_model, plan_cut, save_cut


@dataclass(frozen=True)
class OrderFacts:
    """The facts about an order that trials need.

    Attributes:
        layers: the prunable layers.
        costs: parameters and multiply-accumulates at any allocation.
        own: the method's own allocation at each sparsity.
        pruned: number of weights of each layer that were zero before.
    """

    layers: list[PrunableLayer]
    costs: CostModel
    own: dict[float, Allocation]
    pruned: Allocation


def warm_up() -> None:
    """Do nothing. Running it makes the task process import this module in advance."""


def make_order(job: OrderJob, device: str) -> None:
    """Order a dense model's weights, in one process, for all trials of all sweeps."""
    _use_all_processors(device)
    write_order(job.model_copy(update={"threads": torch.get_num_threads()}), torch.device(device))


def order_facts(
    checkpoint: str, pruning: PruningSettings, method: str, order: StoredOrder, sparsities: list[float]
) -> OrderFacts:
    """Compute the method's own allocation at each sparsity, from the losses of a stored order.

    Args:
        checkpoint: folder or URI of the model whose weights are ordered.
        pruning: the recipe's pruning.
        method: of pruning.
        order: the stored order.
        sparsities: of all prunable weights together, 0…1.

    Returns:
        The allocations, with layers and costs.

    Raises:
        InputError: the model has more zeros already, or bounds that do not allow a sparsity.
    """
    model = load_checkpoint(checkpoint, layers=pruning.layers).model
    layers = prunable_layers(model, pruning)
    pruner = create_pruner(method, **pruning.options(method))
    masks = MaskSet.from_zeros(model, layers)
    losses, sharing = order.open(updates=False).losses, sharing_of(pruning, pruner)
    own, pruned, unit = {}, masks.pruned(), pruner.sparsity_pattern.unit
    for sparsity in sparsities:
        total = pattern_budget(layers, sparsity, pruner.sparsity_pattern, masks)
        check_not_sparser("pruning.sparsity", sparsity, layers, sum(pruned.values()), total)
        own[sparsity] = sharing.allocate(losses, layers, total, pruned=pruned, unit=unit)
    return OrderFacts(layers, cost_model(model, models.input_size(model)), own, pruned)


def sparsity_of(checkpoint: str, pruning: PruningSettings) -> float:
    """Share of zeros in the layers that a recipe prunes."""
    model = load_checkpoint(checkpoint, layers=pruning.layers).model
    return MaskSet.from_zeros(model, prunable_layers(model, pruning)).sparsity


@dataclass(frozen=True)
class RoundModel:
    """The model after one of several rounds, to write at ``target``.

    Attributes:
        checkpoint: the model before the round.
        order: the elimination order of its weights.
        sparsity: the sparsity after the round; it is higher if the layers' floors ask for more zeros.
        dense: the model whose outputs a reconstruction must match.
    """

    checkpoint: str
    order: StoredOrder
    sparsity: float
    method: str
    pruning: PruningSettings
    dense: str
    data: DataSettings
    seed: int
    target: str


def save_round(job: RoundModel, device: str) -> None:
    """Write the model after a round: pruned by the method's own allocation, reconstructed if requested."""
    _use_all_processors(device)
    pruning = job.pruning
    loaded = load_checkpoint(job.checkpoint, layers=pruning.layers, shared=True)
    model = loaded.model.to(device)
    layers = prunable_layers(model, pruning)
    pruner = create_pruner(job.method, **pruning.options(job.method))
    sharing, pattern = sharing_of(pruning, pruner), pruner.sparsity_pattern
    masks = MaskSet.from_zeros(model, layers)
    total = round_budget(sharing, layers, job.sparsity, pattern, masks)
    order = job.order.open(device=device)
    allocation = sharing.allocate(order.losses, layers, total, pruned=masks.pruned(), unit=pattern.unit)
    masks = _prune(model, order, allocation)
    if pruning.reconstruct:
        Solver(job.dense, job.data, job.seed, pruning.reconstruct, device).solve(model, layers, masks)
    record = {"method": job.method, "sparsity": masks.sparsity, "allocation": allocation}
    _save_pruned(loaded, masks, record, job.target)


def save_one_shot(
    inputs: OneShotInputs, allocation: Allocation, target: str, record: Mapping[str, Any], device: str
) -> float | None:
    """Write the one-shot model of an allocation as a checkpoint folder at ``target``.

    Args:
        inputs: of the search.
        allocation: number of pruned weights in each layer.
        target: the folder.
        record: content of ``pruning.json``; with a reconstruction its top-1 is measured again.
        device: of the model, ``cpu`` or ``cuda``.

    Returns:
        Top-1 on the trials' images after a reconstruction; ``None`` without one.
    """
    _use_all_processors(device)
    loaded = load_checkpoint(inputs.checkpoint, shared=True)
    model = loaded.model.eval().to(device)
    masks = _prune(model, inputs.order.open(device=device), allocation)
    content = {
        **record,
        "allocation": allocation,
        "sparsity": masks.sparsity,
        "costs": inputs.costs.at(allocation).as_dict(),
    }
    top1 = None
    if inputs.reconstruct:
        solver = Solver(inputs.dense, inputs.data, inputs.seed, inputs.reconstruct, device)
        done = solver.solve(model, inputs.space.layers, masks)
        images = data.split(
            inputs.data, "validation", data.eval_transform(models.data_config(model)), inputs.seed
        )
        seen = Subset(images, range(inputs.search.rungs(len(images))[-1]))
        top1 = evaluate(model, data.eval_loader(seen, 128)).top1
        content["figures"] = {**content["figures"], "val_top1": top1}
        content["reconstruction"] = {"images": done.images}
    _save_pruned(loaded, masks, content, target)
    return top1


def _prune(model: torch.nn.Module, order: EliminationOrder, allocation: Allocation) -> MaskSet:
    """Write the weights that an order gives into the model, in place; returns the masks."""
    parameters = dict(model.named_parameters())
    weights, masks = order.weights_at({name: parameters[name].detach() for name in order}, allocation)
    write_weights(model, weights)
    return masks


def _save_pruned(loaded: Checkpoint, masks: MaskSet, record: Mapping[str, Any], target: str) -> None:
    """Write a model that was loaded and pruned since as a checkpoint folder at ``target``."""
    with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
        save_checkpoint(
            Path(folder),
            loaded.model.cpu(),
            model_args=loaded.arguments,
            masks=masks.to(torch.device("cpu")).over(loaded.masks),
            record=record,
        )
        storage.upload(Path(folder), target)


def save_pretrained(settings: ModelSettings, images: DataSettings, target: str) -> None:
    """Write pretrained weights of timm, of the hub or of a file as a checkpoint folder at ``target``."""
    if settings.is_file:
        model = from_file(settings, images)
    elif settings.checkpoint is not None:
        model = models.load_hub(settings.checkpoint)
    else:
        model = models.build_model(settings, images)
    models.name_classes(model, data.class_names(images))
    with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
        save_checkpoint(
            Path(folder),
            model,
            model_args=settings.args,
            masks=None,
            record={"method": "dense", "sparsity": 0.0, "allocation": {}},
        )
        storage.upload(Path(folder), target)


def save_structured(
    checkpoint: str,
    settings: StructuredSettings,
    images: DataSettings,
    target: str,
    *,
    seed: int,
    lineage: Mapping[str, Any],
    device: str,
) -> None:
    """Cut the model of ``checkpoint`` in width, and write it as a checkpoint folder at ``target``.

    Args:
        checkpoint: folder or URI of the model.
        settings: the widths, and how channels are chosen.
        images: the data, of which training images give the gradients for the channels' importance.
        target: the folder or URI to write.
        lineage: recorded in ``pruning.json``; the entry ``structured`` also gets what was cut.
        seed: decides which images are taken.
        device: of the model, ``cpu`` or ``cuda``.
    """
    _use_all_processors(device)
    loaded = load_checkpoint(checkpoint)
    model = loaded.model.to(device)
    plan = plan_cut(model, loaded.arguments, settings)
    train = data.split(images, "train", data.eval_transform(models.data_config(model)), seed)
    count = ceil_div(min(settings.images, len(train)), settings.batch_size)
    batches = data.fixed_batches(train, settings.batch_size, 0, count, rank=0, world=1, seed=seed)
    made = cut_model(model, plan, settings, batches)
    record = {**lineage, "structured": {**lineage["structured"], **plan.facts(settings)}}
    with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
        save_cut(Path(folder), made, plan, record, sparse=loaded.masks is not None)
        storage.upload(Path(folder), target)


@dataclass(frozen=True)
class Int8Job:
    """A checkpoint to write as INT8 at ``target``.

    Attributes:
        images: number of training images for the ranges of activations.
        labels: names of the classes, if they are known.
        record: origin of the model, for ``quantization.json``.
    """

    source: str
    target: str
    mode: Mode
    images: int | None
    data: DataSettings
    seed: int
    labels: list[str] | None
    record: Mapping[str, Any]


def quantize(job: Int8Job) -> None:
    """Write the INT8 form of a checkpoint, and evaluate it on validation by the engine that runs it."""
    _use_all_processors("cpu")
    with storage.local_copy(job.source) as source, tempfile.TemporaryDirectory(prefix="espalier-") as made:
        transform = data.eval_transform(models.data_config(load_checkpoint(str(source)).model))

        def figures(model: torch.nn.Module) -> dict[str, float]:
            images = data.split(job.data, "validation", transform, job.seed)
            figures = evaluate(model, data.eval_loader(images, 128))
            return {"val_top1": figures.top1, "val_loss": figures.loss}

        batches: list[torch.Tensor] = []
        if job.mode == "static":
            batches = data.calibration_batches(
                data.split(job.data, "train", transform, job.seed), job.images, job.seed
            )
        int8.quantize_folder(
            source,
            Path(made),
            job.mode,
            batches,
            labels=job.labels,
            record=job.record,
            figures=figures,
        )
        storage.upload(Path(made), job.target)


@dataclass(frozen=True)
class EngineFileJob:
    """A checkpoint to write for an engine, as a folder at ``target``.

    Attributes:
        kind: name of the format (:data:`trainers.deploy.formats.FORMATS`).
        labels: names of the classes, if they are known.
    """

    source: str
    target: str
    kind: str
    data: DataSettings
    seed: int
    labels: list[str] | None


def write_engine_file(job: EngineFileJob) -> None:
    """Write a checkpoint as a file for an engine, whose answers must match torch's on validation images.

    Raises:
        InputError: a model that the format cannot hold.
        CheckError: the engine's answers differ.
    """
    _use_all_processors("cpu")
    with storage.local_copy(job.source) as source, tempfile.TemporaryDirectory(prefix="espalier-") as made:
        record = verify(source, job.source, key="checkpoint")
        model = load_checkpoint(str(source)).model.float().eval()
        transform = data.eval_transform(models.data_config(model))
        calibration = None
        if FORMATS[job.kind].calibrates(model):
            train = data.split(job.data, "train", transform, job.seed)
            calibration = torch.cat(data.calibration_batches(train, None, job.seed)).numpy()
        validation = data.split(job.data, "validation", transform, job.seed)
        rows = [validation[row % len(validation)][0] for row in range(max(BATCHES))]
        origin = {key: record[key] for key in PROVENANCE_KEYS if key in record}
        write_checked(
            EngineSource(model, preprocessing_of(model, job.labels), calibration),
            job.kind,
            Path(made),
            torch.stack(rows).numpy(),
            "validation",
            origin=origin | {"weights": weights_hash(str(source))},
        )
        storage.upload(Path(made), job.target)


def measure(
    checkpoints: list[str],
    images: DataSettings,
    part: str,
    seed: int,
    device: str,
    *,
    most: int | None = None,
) -> list[dict[str, float]]:
    """Evaluate checkpoints.

    Args:
        checkpoints: folders or URIs, of models or of files for engines.
        images: the data.
        part: ``validation`` or ``test``.
        seed: decides which images are held out for validation.
        device: ``cpu`` or ``cuda``.
        most: evaluate on the first images only, this many; default: all.

    Returns:
        ``top1`` (0…1), ``loss`` and number of ``images`` of each checkpoint, in their order.

    Raises:
        InputError: a folder that cannot be loaded, or images that cannot be read.
        FloatingPointError: logits that are not finite.
    """
    _use_all_processors(device)
    figures = []
    for checkpoint in checkpoints:
        runnable = load_runnable(checkpoint, key="checkpoint")
        table = data.split(images, part, data.eval_transform(runnable.config), seed)
        first = Subset(table, range(len(table) if most is None else min(most, len(table))))
        result = evaluate(runnable.model.to(device), data.eval_loader(first, 128))
        figures.append({"top1": result.top1, "loss": result.loss, "images": result.images})
    return figures


def _use_all_processors(device: str) -> None:
    """Let torch use all processors, as nothing else of the sweep runs meanwhile."""
    if device == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
