"""``espalier compare``: the final models of sweeps side by side, read from their folders on the storage."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from orchestration.common.hashing import digest
from orchestration.common.redaction import redact
from orchestration.common.units import count, megabytes, percent
from orchestration.recipe.dotted_keys import flatten
from orchestration.recipe.schema import Recipe
from orchestration.reporting.status import format_state, phases
from orchestration.state import heartbeat
from orchestration.state.stored_recipe import RESULTS, content_of, folder_of, load
from orchestration.state.trial_log import TrialRecord
from pruners.errors import InputError
from trainers import storage
from trainers.loop.report import COST_KEYS, figures_of

_LABEL = re.compile(r"(.+)-(allocation|schedule|long_run)(?:-([\d.]+))?")


@dataclass(frozen=True)
class Model:
    """A row of the table; accuracies are on ``part``, 0…1. Values that are not known yet are ``None``."""

    method: str
    part: str
    sparsity: float
    parameters: int
    parameters_sparse: int
    macs: int
    macs_sparse: int
    allocation: str = "–"
    dense: float | None = None
    one_shot: float | None = None
    recovered: float | None = None
    bytes: int | None = None
    version: str | None = None

    @property
    def cells(self) -> list[str]:
        return [
            self.method,
            self.allocation,
            self.part,
            percent(self.dense),
            percent(self.one_shot),
            percent(self.recovered),
            percent(self.sparsity),
            f"{count(self.parameters)} → {count(self.parameters_sparse)}",
            f"{count(self.macs)} → {count(self.macs_sparse)}",
            megabytes(self.bytes),
            self.version or "–",
        ]


HEADINGS = (
    "method",
    "allocation",
    "images",
    "dense",
    "one shot",
    "recovered",
    "sparsity",
    "parameters",
    "MACs",
    "on disk",
    "version",
)


@dataclass(frozen=True)
class Search:
    """A phase's trials that ended; ``level`` is its sparsity in percent, where there are several."""

    title: str
    method: str
    kind: str
    level: str | None
    trials: list[TrialRecord]

    @property
    def finished(self) -> list[TrialRecord]:
        return [trial for trial in self.trials if trial.state == "finished" and trial.score is not None]

    @property
    def best(self) -> TrialRecord | None:
        return max(self.finished, key=lambda trial: trial.score or 0.0, default=None)


@dataclass(frozen=True)
class Compared:
    """A sweep as its folder describes it; ``note`` says which figures are missing."""

    name: str
    state: str
    note: str | None
    recipe: Recipe
    models: list[Model]
    searches: list[Search]
    dense: float | None  # on validation, where this sweep trained it
    failures: list[str]


def read(storage_uri: str, names: Sequence[str]) -> list[Compared]:
    """The sweeps of these names, each once.

    Raises:
        InputError: no such sweep, or one that has no results yet.
    """
    return [_read(storage_uri, name) for name in dict.fromkeys(names)]


def _read(storage_uri: str, name: str) -> Compared:
    recipe = load(storage_uri, name)
    state = heartbeat.read(storage_uri, name)
    begun = phases(storage_uri, state) if state else []
    trials = {phase.label: phase.log.trials for phase in begun if phase.log}
    searches = [
        Search(phase.name, match[1], match[2], match[3], trials[phase.label])
        for phase in begun
        if phase.log and (match := _LABEL.fullmatch(phase.label))
    ]
    dense = next(
        (trial.metrics["val_top1"] for trial in trials.get("dense", []) if trial.state == "finished"), None
    )
    file = f"{folder_of(storage_uri, name)}/{RESULTS}"
    ended = storage.exists(file)
    models = [_model(row) for row in storage.read_json(file)] if ended else _so_far(recipe, searches, dense)
    if not models:
        raise InputError("name", name, "has no results yet: no trial has finished")
    if not ended:
        note = "has not come to its end: the best trials so far, on validation images"
    elif state is not None and state["state"] != "finished":
        note = "was begun again: the table is of its last end"
    else:
        note = None
    failures = [failure for phase in begun for failure in phase.failures()]
    if state is not None and state["reason"]:
        failures.append(state["reason"])
    return Compared(
        name,
        format_state(state) if state else "state not known",
        note,
        recipe,
        models,
        searches,
        dense,
        failures,
    )


def _model(row: dict[str, Any]) -> Model:
    return Model(**{column.name: row[column.name] for column in fields(Model) if column.name in row})


def _so_far(recipe: Recipe, searches: Sequence[Search], dense: float | None) -> list[Model]:
    """A row for each method with a finished trial: its best trial at the recipe's sparsity."""
    goal = (None, f"{100 * recipe.pruning.sparsity:g}")
    rows = []
    for method in recipe.pruning.methods:
        best = {
            search.kind: search.best
            for search in searches
            if search.method == method and search.level in goal
        }
        one_shot, recovered = best.get("allocation"), best.get("long_run") or best.get("schedule")
        if last := recovered or one_shot:
            rows.append(
                Model(
                    method=method,
                    part="validation",
                    dense=dense,
                    one_shot=one_shot.metrics["val_top1"] if one_shot else None,
                    recovered=recovered.metrics["val_top1"] if recovered else None,
                    **figures_of(last.metrics, ("sparsity", *COST_KEYS)),
                )
            )
    return rows


def differences(sweeps: Sequence[Compared]) -> dict[str, list[str]]:
    """Keys that differ between the recipes of the sweeps -> the value in each, redacted."""
    recipes = [flatten(content_of(sweep.recipe)) for sweep in sweeps]
    differing = {}
    for key in sorted({key for recipe in recipes for key in recipe} - {"name"}):
        values = [recipe.get(key) for recipe in recipes]
        if any(value != values[0] for value in values):
            shown = ["–" if value is None else str(redact(value)) for value in values]
            if len(set(shown)) == 1:  # equal names in different folders
                shown = [f"{text} ({digest(value)[:4]})" for text, value in zip(shown, values, strict=True)]
            differing[key] = shown
    return differing


def tables(sweeps: Sequence[Compared]) -> Group:
    """Final models, what differs between the recipes, failures: for a terminal."""
    models = Table("sweep", *HEADINGS, title="Top-1 of the final models", title_justify="left")
    for column in models.columns[4:-1]:
        column.justify = "right"
    for sweep in sweeps:
        for number, model in enumerate(sweep.models):
            models.add_row("" if number else Text(sweep.name), *model.cells)
    lines = [f"{sweep.name}: {sweep.state}" + (f"; {sweep.note}" if sweep.note else "") for sweep in sweeps]
    parts: list[Any] = [models, *map(Text, lines)]
    if differing := differences(sweeps):
        recipes = Table("key", *(sweep.name for sweep in sweeps), title="Recipes", title_justify="left")
        for key, values in differing.items():
            recipes.add_row(*map(Text, (key, *values)))
        parts.append(recipes)
    elif len(sweeps) > 1:
        parts.append(Text("the recipes are the same"))
    parts += [Text(f"{sweep.name}: {failure}") for sweep in sweeps for failure in sweep.failures]
    return Group(*parts)
