"""Preflight checks of a recipe: data, model, layers, budget, storage, tracking server."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
from pyarrow import fs

from orchestration.cluster.capacity import check_local
from orchestration.preflight.allocation import check_allocated, check_sparsities
from orchestration.preflight.data import check_calibration, check_classes_of_digits, known_data
from orchestration.preflight.deploy import check_deployable, check_latency, check_libraries
from orchestration.preflight.training import check_frozen, check_training, trainings
from orchestration.recipe.distribution import Distribution
from orchestration.recipe.loading import with_values
from orchestration.recipe.schema import Recipe
from orchestration.tracking.check import check_name, check_uri
from pruners.allocation.bounds import bounds
from pruners.allocation.projection import budget, check_feasible
from pruners.allocation.sharing import by_table
from pruners.errors import InputError, first_line
from pruners.methods.registry import create_pruner
from pruners.model.costs import Costs, count_costs
from pruners.model.layers import PrunableLayer
from pruners.model.left_dense import LeftDense
from pruners.model.sparsity_pattern import Pattern
from pruners.reconstruction.reconstruct import solvable_layers
from pruners.structured.dependency import check_installed
from trainers import storage
from trainers.checkpoint.folder import load_checkpoint, model_args
from trainers.config.data import DataSettings
from trainers.loop.prune_step import prunable_layers
from trainers.loop.schedules import pruning_plan
from trainers.models import factory
from trainers.models.weights_file import load_weights
from trainers.sources.classes import check_known, names_of
from trainers.structured.cut import Plan, plan_cut

_CORNERS = 64


@dataclass(frozen=True)
class Prepared:
    """A checked recipe: its data by address and hash, its layers, its budget."""

    recipe: Recipe
    data: DataSettings
    data_hash: str
    layers: list[PrunableLayer]
    pruned: int
    costs: Costs | None
    cut: Plan | None = None
    missing: list[str] = field(default_factory=list)
    dense: LeftDense | None = None


def prepare(recipe: Recipe, *, dry_run: bool = False, local: bool = False) -> Prepared:
    """Check all of a recipe that can be checked without a cluster; last, write to the storage.

    Args:
        recipe: the recipe, read and typed.
        dry_run: list data that this machine does not see as missing, instead of raising an error.
        local: the recipe will run on this machine, which must have the resources.

    Returns:
        The recipe with its data, model, layers and budget.

    Raises:
        InputError: the first key that cannot work; names it and its value.
    """
    structured = recipe.structured
    for part, training in trainings(recipe).items():
        check_training(training, f"{part}.")
    check_libraries(recipe)
    _check_schedule(recipe)
    check_allocated(recipe)
    _check_space(recipe)
    _check_long_run(recipe)
    if structured is not None and not dry_run:
        check_installed()
    model, layers, cut = _model(recipe)
    if model is not None:
        check_deployable(recipe, model, layers)
    _check_frozen(recipe, model, layers)
    total = _check_budget(recipe, layers)
    check_sparsities(recipe, model, layers)
    if model is not None and recipe.pruning.reconstruct and not solvable_layers(model, layers):
        expected = (
            "none of the layers is linear or a plain convolution, so there is nothing to solve: drop it"
        )
        raise InputError("pruning.reconstruct", recipe.pruning.reconstruct, expected)
    costs, dense = None, None
    if model is not None:
        dense = LeftDense.of(model, layers)
        shares = {layer.name: round(layer.numel * recipe.pruning.sparsity) for layer in layers}
        costs = _costs(recipe, model, shares)
    check_latency(recipe, local=local)
    if local:
        check_local(recipe)
    check_name(recipe.registered_model, "tracking.registered_model")
    if recipe.tracking.uri is not None and not dry_run:
        check_uri(recipe.tracking.uri)
    _check_storage(recipe.storage, silent=dry_run)
    if recipe.data.source is not None:
        check_classes_of_digits(recipe)
        if not dry_run:
            _check_writable(recipe.storage)
    data, data_hash, missing = known_data(recipe, dry_run)
    if recipe.model.checkpoint is not None and model is not None and data.train is not None and not missing:
        names = names_of(data.train, columns=data.columns)
        check_known(factory.label_names(model), names, key="data.train", uri=data.train)
    check_calibration(recipe, data, missing)
    if recipe.data.source is None and not dry_run:
        _check_writable(recipe.storage)
    return Prepared(recipe, data, data_hash, layers, total, costs, cut, missing, dense)


def _costs(recipe: Recipe, model: torch.nn.Module, shares: Mapping[str, int]) -> Costs:
    """Parameters and MACs of the model, which is run on an image for it.

    Raises:
        InputError: the model cannot be run on its images, as its arguments do not go together.
    """
    size = factory.input_size(model)
    try:
        return count_costs(model, size, shares)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:  # torch's and timm's own
        sides = " by ".join(map(str, size[1:]))
        expected = f"such a model cannot be run on images of {sides} ({first_line(error)})"
        raise InputError("model.args", recipe.model.args, expected) from None


def _model(recipe: Recipe) -> tuple[torch.nn.Module | None, list[PrunableLayer], Plan | None]:
    """The model that weights are pruned of, its layers, and the structured step that leads to it."""
    patterns = recipe.pruning.layers
    source = recipe.model.checkpoint
    if recipe.model.is_fetched:
        return None, [], None  # known when the model is there
    if source is not None and recipe.model.is_file:
        model, known = _from_file(recipe)
        if known != recipe.model.classes and recipe.dense is None:
            expected = f"the weights know {known}; a new head needs 'dense' to be trained"
            raise InputError("model.classes", recipe.model.classes, expected)
    elif source is not None:
        model = load_checkpoint(source, key="model.checkpoint", layers=patterns).model
        classes = getattr(model, "num_classes", recipe.model.classes)
        if classes != recipe.model.classes:
            raise InputError("model.classes", recipe.model.classes, f"{source} has {classes} classes")
        channels = factory.input_size(model)[0]
        if channels != 3:
            expected = f"takes {channels} channels, and images are read as RGB"
            raise InputError("model.checkpoint", source, expected)
    else:
        with torch.device("meta"):
            settings = recipe.model.model_copy(update={"pretrained": False})
            model = factory.build_model(settings, recipe.data)
        _check_head(recipe)
    cut = None
    if recipe.structured is not None:
        arguments = _arguments(recipe)
        plans = [plan_cut(model, arguments, widths) for widths in recipe.structured.choices()]
        cut = plans[0]
        model = cut.skeleton
    with InputError.renamed({"pattern": "pruning.pattern"}):
        return model, prunable_layers(model, recipe.pruning), cut


def _from_file(recipe: Recipe) -> tuple[torch.nn.Module, int]:
    """Load a file of weights as a model; return it with the number of classes in the file."""
    given = recipe.model
    assert given.checkpoint is not None, "a file has a name"
    model = load_weights(given.checkpoint, given.architecture, given.args, data=recipe.data)[0]
    known = factory.classes(model)
    if known != given.classes:
        factory.replace_head(model, given.classes)
    return model, known


def _arguments(recipe: Recipe) -> Mapping[str, Any]:
    """The arguments that timm builds the dense model with."""
    if recipe.model.checkpoint is None or recipe.model.is_file:
        return recipe.model.args
    with storage.local_copy(recipe.model.checkpoint) as folder:
        return model_args(folder)


def _check_head(recipe: Recipe) -> None:
    """Refuse pretrained weights for other classes without training: they come with a new, untrained head."""
    if not recipe.model.pretrained or recipe.dense is not None or recipe.model.architecture is None:
        return
    known = timm.get_pretrained_cfg(recipe.model.architecture)
    if known is not None and known.num_classes != recipe.model.classes:
        expected = f"the pretrained weights know {known.num_classes}; a new head needs 'dense' to be trained"
        raise InputError("model.classes", recipe.model.classes, expected)


def _check_frozen(recipe: Recipe, model: torch.nn.Module | None, layers: list[PrunableLayer]) -> None:
    if model is None:
        return
    pruned = {layer.name for layer in layers}
    for part, training in trainings(recipe).items():
        check_frozen(training, model, pruned if part == "recovery" else (), f"{part}.")


def _check_budget(recipe: Recipe, layers: list[PrunableLayer]) -> int:
    pruning = recipe.pruning
    pattern = Pattern.parse(pruning.pattern)
    total = round(budget(layers, pruning.sparsity) / pattern.unit) * pattern.unit
    if not layers:
        return total

    def by_recipe_key(error: InputError) -> InputError:
        if error.key == "budget":  # by the recipe's key, not as a count of weights
            return InputError("pruning.sparsity", pruning.sparsity, f"{total:,} weights {error.expected}")
        parent = "pruning.fisher" if error.key in ("block_size", "damp") else "pruning"
        return error.replaced(key=f"{parent}.{error.key}")

    def by_limits(error: InputError) -> InputError:
        limited = f"cannot be met within floor {pruning.floor} and ceiling {pruning.ceiling}"
        return InputError("pruning.sparsity", pruning.sparsity, f"{total:,} weights {limited}: {error}")

    with InputError.renamed(by_recipe_key):
        for method in pruning.methods:
            create_pruner(method, **pruning.options(method)).fisher(layers)
        limits = bounds(layers, pruning.floor, pruning.ceiling, unit=pattern.unit)
        if pruning.table is not None:
            by_table(pruning.table, layers, total, limits, pattern.unit)
    ends = np.array(list(limits.values())).reshape(-1, 2)
    with InputError.renamed(by_limits):
        check_feasible(total, ends[:, 0], ends[:, 1])
    return total


def _check_schedule(recipe: Recipe) -> None:
    """Check that all pruning steps lie within the run, and that one of them reaches each sparsity to keep."""
    pruning = recipe.pruning
    if pruning.schedule.unit == "steps":
        return  # checked when the images are counted
    for target in recipe.allocation.reach or (pruning.sparsity,):  # at either end of a search's range
        plan = pruning_plan(pruning.schedule, target, recipe.recovery.epochs)
        for sparsity in pruning.keep:
            if not any(abs(sparsity - stop) < 1e-6 for stop in plan.values()):
                stops = ", ".join(f"{stop:.4g}" for stop in plan.values()) or "none"
                expected = f"the schedule does not stop there; it stops at {stops}"
                raise InputError("pruning.keep", sparsity, expected)


def _check_space(recipe: Recipe) -> None:
    """Check that the smallest and largest value of each searched key, and all combinations of these, give a
    valid recipe."""
    ends = {key: _ends(distribution) for key, distribution in recipe.schedule.space.items()}
    for key, values in ends.items():
        for value in values:
            with InputError.renamed(partial(_below, f"schedule.space.{key}", value)):
                _check_values(recipe, recipe.schedule.active({key: value}))
    if math.prod(map(len, ends.values())) > _CORNERS:
        return
    for corner in itertools.product(*ends.values()):
        chosen = dict(zip(ends, corner, strict=True))
        with InputError.renamed(partial(_below, "schedule.space", chosen)):
            _check_values(recipe, recipe.schedule.active(chosen))


def _below(key: str, value: object, error: InputError) -> InputError:
    """Rename a nested recipe error to the searched key, or to the key that holds the changed values."""
    return InputError(key, value, f"{error.key}: {error.expected}")


def _check_long_run(recipe: Recipe) -> None:
    """Check that the values of the long run give a valid recipe."""
    changes = recipe.long_run
    with InputError.renamed(lambda error: _below("long_run", changes.get(error.key, changes), error)):
        _check_values(recipe, changes)


def _check_values(recipe: Recipe, values: Mapping[str, Any]) -> None:
    changed = with_values(recipe, values)
    _check_schedule(changed)
    if changed.recovery != recipe.recovery:
        check_training(changed.recovery, "recovery.")


def _ends(distribution: Distribution) -> tuple[Any, ...]:
    return distribution.uniform or distribution.log or distribution.integer or distribution.choice or ()


def _check_storage(storage_uri: str, *, silent: bool) -> None:
    """Check that the storage is a folder, or can become one.

    Args:
        storage_uri: a path or any pyarrow URI.
        silent: it need not answer from here, because it may answer from the cluster.

    Raises:
        InputError: it is no address of a storage, or nothing can be written there.
    """
    try:
        entry = storage.info(storage_uri)
    except storage.UnreachableError:
        if silent:
            return
        raise
    if entry.type not in (fs.FileType.NotFound, fs.FileType.Directory):
        raise InputError("storage", storage_uri, "must be a folder, and is none")


def _check_writable(storage_uri: str) -> None:
    probe = f"{storage.absolute(storage_uri)}/.espalier-writes"
    try:
        storage.write_bytes(probe, b"")
        storage.remove_file(probe)
    except OSError as error:
        expected = f"must be a place that can be written ({first_line(error)})"
        raise InputError("storage", storage_uri, expected) from None
