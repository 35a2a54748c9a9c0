"""What the small sweep leaves, as the tests of the whole read it: its table, its runs in MLflow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from commands import SMALL

from orchestration.recipe.loading import load_recipe

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

METHODS = ("dimap", "ovit")
RECIPE = load_recipe(str(SMALL))
STEPS = 1097 // RECIPE.recovery.batch_size + bool(1097 % RECIPE.recovery.batch_size)
MODEL = "espalier-small"


def rows(out: str) -> dict[str, list[str]]:
    """The cells of the table's rows, by method."""
    table = [[cell.strip() for cell in line.strip("│┃ ").split("│")] for line in out.splitlines()]
    return {cells[0]: cells for cells in table if cells[0] in METHODS}


def all_runs(client: MlflowClient) -> dict[str, list[Run]]:
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    by_level: dict[str, list[Run]] = {}
    for entry in client.search_runs(ids, "tags.`espalier.sweep` = 'small'", max_results=1000):
        by_level.setdefault(entry.data.tags.get("espalier.level", "none"), []).append(entry)
    return by_level


def children(client: MlflowClient, parent: str) -> list[Run]:
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    return client.search_runs(ids, f"tags.`mlflow.parentRunId` = '{parent}'", max_results=1000)


def trials_of(client: MlflowClient, phase: str, method: str | None) -> list[Run]:
    return [
        entry
        for entry in all_runs(client)["trial"]
        if entry.data.tags["espalier.phase"] == phase and entry.data.tags.get("espalier.method") == method
    ]
