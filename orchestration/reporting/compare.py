"""``espalier compare``: what sweeps of a storage came to, read from their folders."""

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

_LABEL = re.compile(r"(.+)-(allocation|schedule|long_run)(?:-([\d.]+))?")
_COSTS = ("sparsity", "parameters", "parameters_sparse", "macs", "macs_sparse")


@dataclass(frozen=True)
class Model:
    """A row of the table; accuracies are of ``part``, in 0…1. What is not known yet is ``None``."""

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
        return [one for one in self.trials if one.state == "finished" and one.score is not None]

    @property
    def best(self) -> TrialRecord | None:
        return max(self.finished, key=lambda one: one.score or 0.0, default=None)


@dataclass(frozen=True)
class Compared:
    """A sweep as its folder tells of it; ``note`` says what its figures lack."""

    name: str
    state: str
    note: str | None
    recipe: Recipe
    models: list[Model]
    searches: list[Search]
    dense: float | None  # on validation, where this sweep trained it
    failures: list[str]


def read(place: str, names: Sequence[str]) -> list[Compared]:
    """The sweeps of these names, each once.

    Raises:
        InputError: no such sweep, or one that has no results yet.
    """
    return [_read(place, name) for name in dict.fromkeys(names)]


def _read(place: str, name: str) -> Compared:
    recipe = load(place, name)
    state = heartbeat.read(place, name)
    found = phases(place, state) if state else []
    trials = {phase.label: phase.log.trials for phase in found if phase.log}
    searches = [
        Search(phase.name, match[1], match[2], match[3], trials[phase.label])
        for phase in found
        if phase.log and (match := _LABEL.fullmatch(phase.label))
    ]
    dense = next(
        (one.metrics["val_top1"] for one in trials.get("dense", []) if one.state == "finished"), None
    )
    file = f"{folder_of(place, name)}/{RESULTS}"
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
    failures = [one for phase in found for one in phase.failures()]
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
    return Model(**{one.name: row[one.name] for one in fields(Model) if one.name in row})


def _so_far(recipe: Recipe, searches: Sequence[Search], dense: float | None) -> list[Model]:
    """A row for each method that has a finished trial: its best at the sparsity that the recipe asks for."""
    goal = (None, f"{100 * recipe.pruning.sparsity:g}")
    rows = []
    for method in recipe.pruning.methods:
        best = {one.kind: one.best for one in searches if one.method == method and one.level in goal}
        one_shot, recovered = best.get("allocation"), best.get("long_run") or best.get("schedule")
        if last := recovered or one_shot:
            rows.append(
                Model(
                    method=method,
                    part="validation",
                    dense=dense,
                    one_shot=one_shot.metrics["val_top1"] if one_shot else None,
                    recovered=recovered.metrics["val_top1"] if recovered else None,
                    **{key: last.metrics[key] for key in _COSTS},
                )
            )
    return rows


def differences(sweeps: Sequence[Compared]) -> dict[str, list[str]]:
    """Keys of the recipes that are not the same in all sweeps -> the value in each, as others may read it."""
    recipes = [flatten(content_of(one.recipe)) for one in sweeps]
    found = {}
    for key in sorted({key for one in recipes for key in one} - {"name"}):
        values = [one.get(key) for one in recipes]
        if any(value != values[0] for value in values):
            shown = ["–" if value is None else str(redact(value)) for value in values]
            if len(set(shown)) == 1:  # of the same name in other folders
                shown = [f"{text} ({digest(value)[:4]})" for text, value in zip(shown, values, strict=True)]
            found[key] = shown
    return found


def tables(sweeps: Sequence[Compared]) -> Group:
    """Final models, what differs between the recipes, failures: for a terminal."""
    models = Table("sweep", *HEADINGS, title="Top-1 of the final models", title_justify="left")
    for column in models.columns[4:-1]:
        column.justify = "right"
    for sweep in sweeps:
        for number, model in enumerate(sweep.models):
            models.add_row("" if number else Text(sweep.name), *model.cells)
    lines = [f"{one.name}: {one.state}" + (f"; {one.note}" if one.note else "") for one in sweeps]
    parts: list[Any] = [models, *map(Text, lines)]
    if found := differences(sweeps):
        recipes = Table("key", *(one.name for one in sweeps), title="Recipes", title_justify="left")
        for key, values in found.items():
            recipes.add_row(*map(Text, (key, *values)))
        parts.append(recipes)
    elif len(sweeps) > 1:
        parts.append(Text("the recipes are the same"))
    parts += [Text(f"{one.name}: {failure}") for one in sweeps for failure in one.failures]
    return Group(*parts)
