"""Preflight checks of a sweep's storage, without torch, so that a mistake there is answered at once."""

from __future__ import annotations

from orchestration.recipe.schema import Recipe
from orchestration.state.stored_recipe import check_unchanged
from trainers import storage


def check_start(recipe: Recipe) -> None:
    """Check that the storage answers, and that an existing sweep of this name was begun with the same recipe.

    Called before :func:`orchestration.preflight.checks.prepare`, wherever the driver runs.

    Raises:
        InputError: the storage does not answer, or the sweep was begun with another recipe.
    """
    storage.info(recipe.storage)
    check_unchanged(recipe)
