"""Jobs of worker groups, made from a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestration.recipe.loading import with_values
from orchestration.recipe.schema import Recipe
from trainers.config.data import DataSettings, ModelSettings
from trainers.config.jobs import TrainJob


def dense_job(recipe: Recipe, data: DataSettings, lineage: Mapping[str, Any]) -> TrainJob:
    """Training of the dense model.

    Args:
        recipe: one that trains its dense model.
        data: the images, with whole addresses.
        lineage: what the checkpoints record of where they come from.

    Returns:
        The job of one worker group.
    """
    assert recipe.dense is not None, "only a recipe that trains its dense model has this job"
    return TrainJob(
        name=f"{recipe.name}-dense",
        seed=recipe.seed,
        model=recipe.model,
        data=data,
        training=recipe.dense,
        threads=threads(recipe),
        lineage=lineage,
    )


def structured_job(
    recipe: Recipe, data: DataSettings, *, cut: str, dense: str, lineage: Mapping[str, Any]
) -> TrainJob:
    """Recovery of a model whose channels were cut.

    Args:
        recipe: one with a structured step and recovery.
        data: the images, with whole addresses.
        cut: folder or URI of the model that was cut.
        dense: folder or URI of the dense model, for a recovery whose teacher is ``dense``.
        lineage: what the checkpoints record of where they come from.

    Returns:
        The job of one worker group.
    """
    assert recipe.structured is not None, "only a recipe with a structured step has this job"
    training = recipe.structured.recovery
    assert training is not None, "only a structured step with recovery has this job"
    if training.distill is not None and training.distill.teacher == "dense":
        distill = training.distill.model_copy(update={"teacher": dense})
        training = training.model_copy(update={"distill": distill})
    return TrainJob(
        name=f"{recipe.name}-structured",
        seed=recipe.seed,
        model=ModelSettings(checkpoint=cut, classes=recipe.model.classes),
        data=data,
        training=training,
        threads=threads(recipe),
        lineage=lineage,
    )


def gradual_job(
    values: Mapping[str, Any],
    *,
    recipe: Recipe,
    method: str,
    data: DataSettings,
    checkpoint: str,
    allocation: Mapping[str, int] | None,
    lineage: Mapping[str, Any],
) -> TrainJob:
    """A gradual run with a proposal's ``values`` in place of the recipe's.

    Args:
        values: recipe keys and values, as ``{"recovery.lr.peak": 1e-3}``.
        recipe: the recipe without the proposal.
        method: of pruning.
        data: the images, with whole addresses.
        checkpoint: folder or URI of the dense model.
        allocation: pruned weights of each layer at the end; ``None``: the method's own.
        lineage: what the checkpoints record of where they come from.

    Returns:
        The job of one worker group.

    Raises:
        InputError: values that make no valid recipe.
    """
    chosen = with_values(recipe, recipe.schedule.active(values))
    return TrainJob.model_validate(
        {
            "name": f"{chosen.name}-{method}",
            "seed": chosen.seed,
            "model": ModelSettings(checkpoint=checkpoint, classes=chosen.model.classes),
            "data": data,
            "training": chosen.recovery,
            "pruning": chosen.pruning,
            "method": method,
            "allocation": allocation,
            "threads": threads(chosen),
            "lineage": lineage,
        }
    )


def aware_job(
    recipe: Recipe, method: str, data: DataSettings, checkpoint: str, lineage: Mapping[str, Any]
) -> TrainJob:
    """Training of a pruned model with fake quantization, its zeros held.

    Args:
        recipe: one that asks for INT8 by quantization-aware training.
        method: that pruned the model.
        data: the images, with whole addresses.
        checkpoint: folder or URI of the pruned model.
        lineage: what the checkpoints record of where they come from.

    Returns:
        The job of one worker group.
    """
    settings = recipe.quantize
    assert settings is not None, "only a recipe that asks for INT8 has this job"
    content = {
        "name": f"{recipe.name}-{method}-int8",
        "seed": recipe.seed,
        "model": ModelSettings(checkpoint=checkpoint, classes=recipe.model.classes),
        "data": data,
        "training": settings.training,
        "method": method,
        "quantize": settings.calibration,
        "threads": threads(recipe),
        "lineage": lineage,
    }
    return TrainJob.model_validate(content)


def threads(recipe: Recipe) -> int:
    """Threads of one worker: the CPUs it reserves."""
    return max(1, int(recipe.resources.cpus_per_worker))
