"""What only timm and torch can tell of training settings: optimizers, augmentations, precision."""

from __future__ import annotations

import torch
from timm.data.auto_augment import rand_augment_transform
from timm.optim import create_optimizer_v2, list_optimizers

from orchestration.config import Recipe
from pruners.errors import InputError, did_you_mean, first_line
from trainers.config import TrainingSettings


def trainings(recipe: Recipe) -> dict[str, TrainingSettings]:
    """The trainings of a recipe by their keys, but that for INT8."""
    structured = recipe.structured
    found = {
        "dense": recipe.dense,
        "structured.recovery": structured.recovery if structured else None,
        "recovery": recipe.recovery,
    }
    return {key: training for key, training in found.items() if training is not None}


def remarks(recipe: Recipe) -> list[str]:
    """What this machine can do, and does not do as one would expect."""
    if recipe.resources.gpus_per_worker or _fast_in_bfloat16():
        return []
    return [
        f"{key}.precision = bfloat16: this processor has no instructions for it, float32 is many times faster"
        for key, training in trainings(recipe).items()
        if training.precision == "bfloat16"
    ]


def _fast_in_bfloat16() -> bool:
    """Measured where it is not (AVX2): a step of a small ViT took 13 times as long as in float32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def check_training(training: TrainingSettings, place: str) -> None:
    """Try the optimizer on one weight, and read the augmentation.

    Args:
        place: of the settings in what the user wrote, as ``recovery.``; goes before the keys of errors.

    Raises:
        InputError: an optimizer that timm does not have or that does not work here, an unknown augmentation.
    """
    weight = torch.nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    name = training.optimizer
    try:
        create_optimizer_v2([weight], name, lr=training.lr.peak, weight_decay=training.weight_decay).step()
    except Exception as error:  # each raises its own kinds; some want closures, or packages that are not here
        known = list_optimizers()
        reason = f"no timm optimizer{did_you_mean(name, known)}" if name not in known else first_line(error)
        raise InputError(f"{place}optimizer", name, f"must be one that works here ({reason})") from None
    text = training.augment.rand_augment
    if text is None:
        return
    try:
        rand_augment_transform(text, {})
    except (AssertionError, ValueError, KeyError):
        key = f"{place}augment.rand_augment"
        raise InputError(key, text, "must be a RandAugment of timm, as rand-m9-mstd0.5-inc1") from None
