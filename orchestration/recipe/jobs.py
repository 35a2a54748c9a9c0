"""From a recipe to what one worker group is asked to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestration.recipe.loading import with_values
from orchestration.recipe.schema import Recipe
from trainers.config.data import DataSettings, ModelSettings
from trainers.config.jobs import TrainJob


def dense_job(recipe: Recipe, data: DataSettings, lineage: Mapping[str, Any]) -> TrainJob:
    """Training of the dense model."""
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
    """Recovery of a model that was cut in width, from ``cut``; by ``dense`` as a teacher learns from that."""
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
        checkpoint: folder or URI of the dense model.
        allocation: pruned weights of each layer at the end; ``None``: the method's own.
        lineage: what the checkpoints record of where they come from.
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
    """Training of a pruned model for INT8, its zeros held."""
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
