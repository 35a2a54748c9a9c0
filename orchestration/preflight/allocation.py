"""Preflight checks of sparsities: what the allocation search decides, and the zeros that a model has."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from orchestration.recipe.schema import Recipe
from pruners.allocation.bounds import bounds
from pruners.allocation.projection import budget
from pruners.errors import InputError
from pruners.model.layers import PrunableLayer
from pruners.model.masks import MaskSet
from pruners.model.sparsity_pattern import Pattern

# keys that divide a budget among layers: for these, gradual runs use the result of the allocation search
_DECIDED = ("sparsity", "scope", "table", "floor", "ceiling", "layers", "pattern", "unfit")


def check_allocated(recipe: Recipe) -> None:
    """Check that ``schedule.space`` has no key that the allocation search already decides.

    Raises:
        InputError: it has one, which would be searched and reported without any effect.
    """
    if not recipe.allocation.trials:
        return
    for key, distribution in recipe.schedule.space.items():
        if _is_decided(key):
            expected = (
                "is decided by the allocation search, before gradual runs begin: drop it, or set "
                "allocation.trials: 0, so that each run shares out its own zeros"
            )
            raise InputError(
                f"schedule.space.{key}", distribution.model_dump(exclude_defaults=True), expected
            )


def _is_decided(key: str) -> bool:
    return key == "pruning" or any(f"{key}.".startswith(f"pruning.{decided}.") for decided in _DECIDED)


def check_not_sparser(
    key: str, value: object, layers: Sequence[PrunableLayer], gone: int, total: int
) -> None:
    """Check that layers can have ``total`` zeros in all, where ``gone`` are zero already.

    Args:
        key, value: what asked for it, as the user wrote it.
        layers: whose weights are counted.
        gone: zeros that are there.
        total: zeros that are asked for.

    Raises:
        InputError: zeros that are there stay.
    """
    if gone > total:
        share = gone / max(sum(layer.numel for layer in layers), 1)
        raise InputError(
            key, value, f"the model has more already: {share:.4f} of its prunable weights are zero"
        )


def check_sparsities(recipe: Recipe, model: nn.Module | None, layers: Sequence[PrunableLayer]) -> None:
    """Check that floors, ceilings and the zeros there are let all sparsities of the searches be met.

    Args:
        recipe: that asks for them.
        model: that weights are pruned of; its zeros are known where it is a checkpoint of this machine.
        layers: its prunable layers.

    Raises:
        InputError: one of those asked for, or all that a search is to choose from, by its key.
    """
    pruning, search = recipe.pruning, recipe.allocation
    pattern, gone = Pattern.parse(pruning.pattern), dict.fromkeys((layer.name for layer in layers), 0)
    if model is not None and recipe.model.checkpoint is not None and recipe.structured is None:
        gone = MaskSet.from_zeros(model, layers).pruned()
    holds = (
        pruning.schedule.kind == "constant" and not search.trials
    )  # then the sparsity is that of the checkpoint
    if pattern.forced is not None or holds or not layers:
        return
    limits = bounds(layers, pruning.floor, pruning.ceiling, gone, unit=pattern.unit)
    low, high = (sum(ends) for ends in zip(*limits.values(), strict=True))
    asked: list[tuple[str, object, tuple[float, float]]] = [
        ("pruning.sparsity", pruning.sparsity, (pruning.sparsity, pruning.sparsity))
    ]
    if search.trials:
        asked += [("allocation.sparsities", sparsity, (sparsity, sparsity)) for sparsity in search.sparsities]
    if search.reach is not None:
        asked.append((f"allocation.{search.between_key}", list(search.reach), search.reach))
    for key, value, ends in asked:
        least, most = (round(budget(layers, end) / pattern.unit) * pattern.unit for end in ends)
        check_not_sparser(key, value, layers, sum(gone.values()), most)
        if most < low or least > high:
            nearest = (low if most < low else high) / sum(layer.numel for layer in layers)
            expected = f"cannot be met within pruning.floor and ceiling; nearest feasible: {nearest:.4f}"
            raise InputError(key, value, expected)
