"""Before anything starts: is there data, a model, layers, a budget, a place to write, an MLflow to log to?"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import timm
import torch
from pyarrow import fs

from orchestration.check_allocation import check_allocated, check_sparsities
from orchestration.check_data import check_calibration, check_classes_of_digits, known_data
from orchestration.check_tracking import check_uri
from orchestration.check_training import check_frozen, check_training, trainings
from orchestration.cluster import ClusterSize
from orchestration.config import Recipe
from orchestration.latency import check_linear, check_threads
from orchestration.recipes import with_values
from orchestration.search_config import Distribution, Fastest
from orchestration.versions import check_name
from pruners.allocation import budget, by_table
from pruners.costs import Costs, count_costs
from pruners.coupling import check_installed
from pruners.errors import InputError, first_line
from pruners.layers import PrunableLayer
from pruners.left_dense import LeftDense
from pruners.limits import bounds, check_feasible
from pruners.methods import create_pruner
from pruners.patterns import Pattern
from trainers import models, storage
from trainers.checkpoint import load_checkpoint, model_args
from trainers.classes import check_known, names_of
from trainers.config import DataSettings
from trainers.int8 import NEEDS
from trainers.int8_checks import check_mode
from trainers.latency_settings import LatencyTarget
from trainers.optional import require
from trainers.prune_step import prunable_layers
from trainers.schedules import pruning_plan
from trainers.structured import Plan, plan_cut
from trainers.weights import load_weights

_CORNERS = 64


@dataclass(frozen=True)
class Prepared:
    """A recipe that can run: its data by place and hash, its layers, its budget."""

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
    """Check all of a recipe that can be checked without a cluster; what writes to the storage comes last.

    Args:
        dry_run: data that is not on this machine is listed as missing instead of refused.
        local: no cluster is to be joined: what this machine cannot give is refused.

    Raises:
        InputError: the first thing that cannot work.
    """
    structured = recipe.structured
    for part, training in trainings(recipe).items():
        check_training(training, f"{part}.")
    if recipe.quantize is not None:
        require("quantize.mode", recipe.quantize.mode, *NEEDS)
        if recipe.quantize.training is not None:
            check_training(recipe.quantize.training, "quantize.recovery.")
    _check_schedule(recipe)
    check_allocated(recipe)
    _check_space(recipe)
    _check_long_run(recipe)
    if structured is not None and not dry_run:
        check_installed()
    model, layers, cut = _model(recipe)
    if recipe.quantize is not None and model is not None:
        check_mode(model, recipe.quantize.mode, [layer.name for layer in layers], "quantize.mode")
    _check_frozen(recipe, model, layers)
    total = _check_budget(recipe, layers)
    check_sparsities(recipe, model, layers)
    costs, dense = None, None
    if model is not None:
        dense = LeftDense.of(model, layers)
        shares = {layer.name: round(layer.numel * recipe.pruning.sparsity) for layer in layers}
        costs = _costs(recipe, model, shares)
    _check_latency(recipe, model, layers, local=local)
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
        check_known(models.label_names(model), names, key="data.train", uri=data.train)
    check_calibration(recipe, data, missing)
    if recipe.data.source is None and not dry_run:
        _check_writable(recipe.storage)
    return Prepared(recipe, data, data_hash, layers, total, costs, cut, missing, dense)


def _costs(recipe: Recipe, model: torch.nn.Module, shares: Mapping[str, int]) -> Costs:
    """Raises:
    InputError: the model cannot be run on its images: what it was built with does not go together.
    """
    size = models.input_size(model)
    try:
        return count_costs(model, size, shares)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:  # torch's and timm's own
        sides = " by ".join(map(str, size[1:]))
        expected = f"such a model cannot be run on images of {sides} ({first_line(error)})"
        raise InputError("model.args", recipe.model.args, expected) from None


def check_local(recipe: Recipe) -> None:
    """Whether this machine alone can ever run the recipe; asked before a local cluster is started.

    Where ``RAY_ADDRESS`` is set (as inside a Ray job) a cluster is joined, and it is the one to ask.

    Raises:
        InputError: more workers than it has processors.
    """
    if os.environ.get("RAY_ADDRESS"):
        return
    size = ClusterSize(cpus=float(os.cpu_count() or 1), gpus=float(torch.cuda.device_count()))
    check_size(recipe, size)


def check_size(recipe: Recipe, size: ClusterSize) -> None:
    """Raises:
    InputError: the recipe asks for more than the cluster can ever give.
    """
    for phase in ("dense", "structured", "schedule", "long_run"):
        size.training_runs(recipe.resources.of(phase))
    if recipe.allocation.trials:
        size.allocation_trials(recipe.allocation)


def _model(recipe: Recipe) -> tuple[torch.nn.Module | None, list[PrunableLayer], Plan | None]:
    """The model that weights are pruned of, its layers, and the structured step that leads to it."""
    patterns = recipe.pruning.layers
    source = recipe.model.checkpoint
    if source is not None and source.startswith(("hf-hub:", "models:/")):
        return None, [], None  # known when it is fetched
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
        channels = models.input_size(model)[0]
        if channels != 3:
            expected = f"takes {channels} channels, and images are read as RGB"
            raise InputError("model.checkpoint", source, expected)
    else:
        with torch.device("meta"):
            settings = recipe.model.model_copy(update={"pretrained": False})
            model = models.build_model(settings, recipe.data)
        _check_head(recipe)
    cut = None
    if recipe.structured is not None:
        arguments = _arguments(recipe)
        plans = [plan_cut(model, arguments, one) for one in recipe.structured.choices()]
        cut = plans[0]
        model = cut.skeleton
    try:
        return model, prunable_layers(model, recipe.pruning), cut
    except InputError as error:
        if error.key != "pattern":
            raise
        raise InputError("pruning.pattern", error.value, error.expected) from None


def _from_file(recipe: Recipe) -> tuple[torch.nn.Module, int]:
    """The model that a file of weights gives, and how many classes the file knows."""
    given = recipe.model
    assert given.checkpoint is not None, "a file has a name"
    model = load_weights(given.checkpoint, given.architecture, given.args, data=recipe.data)[0]
    known = models.classes(model)
    if known != given.classes:
        models.replace_head(model, given.classes)
    return model, known


def _arguments(recipe: Recipe) -> Mapping[str, Any]:
    """With which timm builds the dense model."""
    if recipe.model.checkpoint is None or recipe.model.is_file:
        return recipe.model.args
    with storage.local_copy(recipe.model.checkpoint) as folder:
        return model_args(folder)


def _check_head(recipe: Recipe) -> None:
    """Pretrained weights for other classes come with a new head, which nobody would have trained."""
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
    try:
        for method in pruning.methods:
            create_pruner(method, **pruning.options(method)).fisher(layers)
        limits = bounds(layers, pruning.floor, pruning.ceiling, unit=pattern.unit)
        if pruning.table is not None:
            by_table(pruning.table, layers, total, limits, pattern.unit)
    except InputError as error:
        place = "pruning.fisher" if error.key in ("block_size", "damp") else "pruning"
        if error.key == "budget":  # in the recipe's keys, not in counts of weights
            raise InputError(
                "pruning.sparsity", pruning.sparsity, f"{total:,} weights {error.expected}"
            ) from None
        raise InputError(f"{place}.{error.key}", error.value, error.expected) from None
    ends = np.array(list(limits.values())).reshape(-1, 2)
    try:
        check_feasible(total, ends[:, 0], ends[:, 1])
    except InputError as error:
        between = (
            f"{total:,} weights cannot be met within floor {pruning.floor} and ceiling {pruning.ceiling}"
        )
        raise InputError("pruning.sparsity", pruning.sparsity, f"{between}: {error}") from None
    return total


def _check_latency(
    recipe: Recipe, model: torch.nn.Module | None, layers: list[PrunableLayer], *, local: bool
) -> None:
    """Whether there can be a table: the engine is installed, and zeros change some layer's time."""
    rule, step = recipe.allocation.rule, recipe.structured
    wanted: dict[str, LatencyTarget] = {}
    if step is not None and step.objective == "latency":
        wanted["structured"] = step.serves
    if isinstance(rule, Fastest) and recipe.allocation.trials:
        wanted["allocation"] = rule.target
        if model is not None:
            check_linear(model, layers)
    for part, target in wanted.items():
        target.choice.check("cpu", key=f"{part}.target.engine")
        if local and not os.environ.get("RAY_ADDRESS"):
            check_threads(target, os.cpu_count() or 1, key=f"{part}.target.threads")


def _check_schedule(recipe: Recipe) -> None:
    """Steps that fit into the run, and sparsities to keep that are among theirs."""
    pruning = recipe.pruning
    if pruning.schedule.unit == "steps":
        return  # known when the images are counted
    for target in recipe.allocation.reach or (pruning.sparsity,):  # wherever a search may end
        plan = pruning_plan(pruning.schedule, target, recipe.recovery.epochs)
        for sparsity in pruning.keep:
            if not any(abs(sparsity - one) < 1e-6 for one in plan.values()):
                stops = ", ".join(f"{one:.4g}" for one in plan.values()) or "none"
                expected = f"the schedule does not stop there; it stops at {stops}"
                raise InputError("pruning.keep", sparsity, expected)


def _check_space(recipe: Recipe) -> None:
    """Every end of the space must be a recipe that could run, and so must every corner."""
    ends = {key: _ends(distribution) for key, distribution in recipe.schedule.space.items()}
    for key, values in ends.items():
        for value in values:
            try:
                _check_values(recipe, recipe.schedule.active({key: value}))
            except InputError as error:
                raise InputError(f"schedule.space.{key}", value, f"{error.key}: {error.expected}") from None
    if math.prod(map(len, ends.values())) > _CORNERS:
        return
    for corner in itertools.product(*ends.values()):
        chosen = dict(zip(ends, corner, strict=True))
        try:
            _check_values(recipe, recipe.schedule.active(chosen))
        except InputError as error:
            raise InputError("schedule.space", chosen, f"{error.key}: {error.expected}") from None


def _check_long_run(recipe: Recipe) -> None:
    """Its values must make a recipe that could run."""
    try:
        _check_values(recipe, recipe.long_run)
    except InputError as error:
        value = recipe.long_run.get(error.key, recipe.long_run)
        raise InputError("long_run", value, f"{error.key}: {error.expected}") from None


def _check_values(recipe: Recipe, values: Mapping[str, Any]) -> None:
    changed = with_values(recipe, values)
    _check_schedule(changed)
    if changed.recovery != recipe.recovery:
        check_training(changed.recovery, "recovery.")


def _ends(distribution: Distribution) -> tuple[Any, ...]:
    return distribution.uniform or distribution.log or distribution.integer or distribution.choice or ()


def _check_storage(place: str, *, silent: bool) -> None:
    """Args:
        silent: it need not answer: what does not from here may answer there.

    Raises:
        InputError: no place, or one where nothing can be put.
    """
    try:
        there = storage.info(place)
    except storage.UnreachableError:
        if silent:
            return
        raise
    if there.type not in (fs.FileType.NotFound, fs.FileType.Directory):
        raise InputError("storage", place, "must be a folder, and is none")


def _check_writable(place: str) -> None:
    probe = f"{storage.absolute(place)}/.espalier-writes"
    try:
        storage.write_bytes(probe, b"")
        storage.remove_file(probe)
    except OSError as error:
        expected = f"must be a place that can be written ({first_line(error)})"
        raise InputError("storage", place, expected) from None
