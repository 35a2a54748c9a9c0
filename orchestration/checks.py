"""Before anything starts: is there data, a model, layers, a budget, a place to write, an MLflow to log to?"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from orchestration import digits
from orchestration.cluster import ClusterSize
from orchestration.config import Distribution, Recipe, digest
from orchestration.recipes import with_values
from orchestration.tracking import check_uri
from pruners.allocation import bounds, budget, check_feasible
from pruners.costs import Costs, count_costs
from pruners.errors import InputError
from pruners.layers import PrunableLayer, find_layers
from trainers import models, storage
from trainers.checkpoint import load_checkpoint
from trainers.config import DataSettings
from trainers.schedules import pruning_epochs
from trainers.tables import check_table


@dataclass(frozen=True)
class Prepared:
    """A recipe that can run: its data by place and hash, its layers, its budget."""

    recipe: Recipe
    data: DataSettings
    data_hash: str
    layers: list[PrunableLayer]
    pruned: int
    costs: Costs | None
    missing: list[str] = field(default_factory=list)


def prepare(recipe: Recipe, *, dry_run: bool = False) -> Prepared:
    """Check all of a recipe that can be checked without a cluster.

    Args:
        dry_run: data that is not on this machine is listed as missing instead of refused.

    Raises:
        InputError: the first thing that cannot work.
    """
    for key in recipe.schedule.space:
        _check_space(recipe, key, recipe.schedule.space[key])
    pruning_epochs(recipe.pruning.schedule, recipe.recovery.epochs)
    model, layers = _model(recipe)
    total = _check_budget(recipe, layers)
    if recipe.tracking.uri is not None and not dry_run:
        check_uri(recipe.tracking.uri)
    if not dry_run:
        _check_writable(recipe.storage)
    data, data_hash, missing = _data(recipe, dry_run)
    costs = None
    if model is not None:
        shares = {layer.name: round(layer.numel * recipe.pruning.sparsity) for layer in layers}
        costs = count_costs(model, models.input_size(model), shares)
    return Prepared(recipe, data, data_hash, layers, total, costs, missing)


def check_local(recipe: Recipe) -> None:
    """Whether this machine alone can ever run the recipe; asked before a local cluster is started.

    Raises:
        InputError: more workers than it has processors.
    """
    size = ClusterSize(cpus=float(os.cpu_count() or 1), gpus=float(torch.cuda.device_count()))
    check_size(recipe, size)


def check_size(recipe: Recipe, size: ClusterSize) -> None:
    """Raises:
    InputError: the recipe asks for more than the cluster can ever give.
    """
    size.training_runs(recipe.resources)
    if recipe.allocation.trials:
        size.allocation_trials(recipe.allocation)


def _model(recipe: Recipe) -> tuple[torch.nn.Module | None, list[PrunableLayer]]:
    patterns = recipe.pruning.layers
    source = recipe.model.checkpoint
    if source is not None and source.startswith(("hf-hub:", "models:/")):
        return None, []  # known when it is fetched
    if source is not None:
        model = load_checkpoint(source, key="model.checkpoint", layers=patterns).model
        classes = getattr(model, "num_classes", recipe.model.classes)
        if classes != recipe.model.classes:
            raise InputError("model.classes", recipe.model.classes, f"{source} has {classes} classes")
    else:
        with torch.device("meta"):
            settings = recipe.model.model_copy(update={"pretrained": False})
            model = models.build_model(settings, recipe.data)
    return model, find_layers(model, patterns)


def _check_budget(recipe: Recipe, layers: list[PrunableLayer]) -> int:
    pruning = recipe.pruning
    total = budget(layers, pruning.sparsity)
    limits = np.array(list(bounds(layers, pruning.floor, pruning.ceiling).values())).reshape(-1, 2)
    if layers:
        check_feasible(total, limits[:, 0], limits[:, 1])
    return total


def _check_space(recipe: Recipe, key: str, distribution: Distribution) -> None:
    """Every end of the space must be a recipe that could run."""
    ends: tuple[Any, ...] = (
        distribution.uniform or distribution.log or distribution.integer or distribution.choice or ()
    )
    for value in ends:
        try:
            changed = with_values(recipe, {key: value})
            pruning_epochs(changed.pruning.schedule, changed.recovery.epochs)
        except InputError as error:
            raise InputError(f"schedule.space.{key}", value, f"{error.key}: {error.expected}") from None


def _check_writable(place: str) -> None:
    probe = f"{storage.absolute(place)}/.espalier-writes"
    try:
        storage.write_bytes(probe, b"")
        storage.remove_file(probe)
    except OSError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError("storage", place, f"must be a place that can be written ({reason})") from None


def _data(recipe: Recipe, dry_run: bool) -> tuple[DataSettings, str, list[str]]:
    data, classes = recipe.data, recipe.model.classes
    missing: list[str] = []
    if data.source == "digits":
        if classes != digits.CLASSES:
            raise InputError("model.classes", classes, f"digits have {digits.CLASSES} classes")
        if dry_run:
            return data, "", []
        data = digits.prepare_digits(storage.absolute(recipe.storage))
    hashes: dict[str, str] = {}
    places: dict[str, str] = {}
    for part in ("train", "validation", "test"):
        uri: str | None = getattr(data, part)
        if uri is None:
            continue
        places[part] = storage.absolute(uri)
        if dry_run and not storage.exists(uri):
            missing.append(uri)
            continue
        hashes[part] = check_table(places[part], classes, key=f"data.{part}")
    found: Mapping[str, Any] = data.model_dump() | places
    rest = {key: value for key, value in found.items() if key not in places}
    return DataSettings.model_validate(found), digest(hashes, rest), missing
