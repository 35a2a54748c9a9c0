"""The structured step between the dense model and its pruning: cut in width, then trained until it recovers.

Its folder is beside those of dense models, named by the hash of all that it depends on. What was cut is kept
there before it recovers, so that a run that is broken off goes on with the very same channels.
"""

from __future__ import annotations

from typing import Any

import ray

from orchestration import remote
from orchestration.config import digest
from orchestration.context import Dense, Sweep, content_hash
from orchestration.dense_phase import validation_top1
from orchestration.jobs import structured_job
from orchestration.mlflow_model import classes_of
from orchestration.recipes import flatten
from orchestration.training_search import run_training
from orchestration.trial_log import TrialLog
from orchestration.trial_runs import without_trainer_state
from trainers import storage
from trainers.checkpoint import RECORD
from trainers.structured_settings import words

REGISTERED = "registered.json"  # beside the model: its version in the registry
_TITLE = "structured pruning"


def structured_phase(sweep: Sweep, dense: Dense) -> tuple[Dense, dict[str, Any]]:
    """The smaller model, to be pruned as a dense one, and what is recorded of the step in all that follow."""
    sweep = sweep.phase("structured")
    settings = sweep.recipe.structured
    assert settings is not None, "only a recipe with a structured step has this phase"
    key = digest(
        dense.weights,
        settings.model_dump(mode="json"),
        sweep.recipe.resources.most if settings.recovery else None,
        sweep.recipe.seed,
        sweep.data_hash,
    )
    step = _Step(sweep, dense, key)
    if not step.known:
        step.make()
    else:
        sweep.display.phase(_TITLE)
    return step.result()


class _Step:
    """One step: ``cut`` is the model before it recovers, ``model`` the one after (if it does)."""

    def __init__(self, sweep: Sweep, dense: Dense, key: str) -> None:
        self._sweep, self._dense, self._key = sweep, dense, key
        self._folder = f"{sweep.storage}/structured/{key}"
        self._cut = f"{self._folder}/cut"
        assert sweep.recipe.structured is not None, "checked by who makes a step"
        self._settings = sweep.recipe.structured
        self._made = False

    @property
    def model(self) -> str:
        return self._cut if self._settings.recovery is None else f"{self._folder}/model"

    @property
    def known(self) -> bool:
        registered = storage.exists(f"{self._folder}/{REGISTERED}")
        recovered = self._settings.recovery is None or registered
        return recovered and storage.exists(f"{self.model}/{RECORD}")

    def make(self) -> None:
        """Cut, recover, register."""
        sweep, training = self._sweep, self._settings.recovery
        log = TrialLog(f"{self._folder}/trials.json")
        shown: dict[str, Any] = {} if training is None else {"label": "structured", "log": log.uri}
        sweep.display.phase(_TITLE, epochs=training.epochs if training else 1, **shown)
        sweep.begin("structured", _TITLE)
        facts = self._cut_now()
        if training is not None:
            self._recover(log, facts)
        self._made = True

    def result(self) -> tuple[Dense, dict[str, Any]]:
        """The model as the following phases take it, and the facts of the step."""
        facts = storage.read_json(f"{self.model}/{RECORD}")["structured"]
        top1 = validation_top1(self._sweep, self.model)
        file = f"{self._folder}/{REGISTERED}"
        version = storage.read_json(file)["version"] if storage.exists(file) else self._dense.version
        how = "" if self._made else "known, "
        self._sweep.display.finished(f"{how}{words(facts['cut'])}: {100 * top1:.1f} % on validation")
        return Dense(self.model, top1, content_hash(self.model), version), facts

    def _cut_now(self) -> dict[str, Any]:
        """Cut the dense model unless that was done before; what is recorded of it."""
        sweep, dense = self._sweep, self._dense
        if not storage.exists(f"{self._cut}/{RECORD}"):
            task, device = sweep.task(remote.save_structured)
            lineage = self._lineage({"dense": dense.weights, "dense_top1": dense.top1})
            given = {"seed": sweep.recipe.seed, "lineage": lineage, "device": device}
            ray.get(task.remote(dense.checkpoint, self._settings, sweep.data, self._cut, **given))
        facts: dict[str, Any] = storage.read_json(f"{self._cut}/{RECORD}")["structured"]
        top1 = validation_top1(sweep, self._cut)
        sweep.display.say(
            f"      {words(facts['cut'])}: {100 * dense.top1:.1f} → {100 * top1:.1f} % on validation"
        )
        return facts | {"cut_top1": top1}

    def _recover(self, log: TrialLog, facts: dict[str, Any]) -> None:
        sweep, recipe = self._sweep, self._sweep.recipe
        lineage = self._lineage(facts)
        job = structured_job(
            recipe, sweep.data, cut=self._cut, dense=self._dense.checkpoint, lineage=lineage
        ).model_dump(mode="json")
        params = recipe.model_dump(mode="json", include={"structured", "seed"})
        runs = sweep.runs(log, "structured", flatten(params))
        figures = {key: value for key, value in facts.items() if isinstance(value, int | float)}
        sweep.tracker.metrics(runs.run, {key: [(0, float(value))] for key, value in figures.items()})
        name = f"structured-{self._key}"
        best, trained = run_training(sweep, name, job, log, runs, folder=f"{self._folder}/train")
        with without_trainer_state(trained) as clean:
            storage.upload(clean, self.model)
        version = runs.register(
            recipe.registered_model, best, self.model, classes=classes_of(sweep.data.train)
        )
        reference = f"models:/{recipe.registered_model}/{version}"
        storage.write_json(f"{self._folder}/{REGISTERED}", {"version": reference})
        runs.close(best)

    def _lineage(self, facts: dict[str, Any]) -> dict[str, Any]:
        """What a record of this step says; its method is in the place of a pruner's name."""
        return {
            **self._sweep.lineage,
            "method": "structured",
            "parent": self._dense.weights,
            "parent_version": self._dense.version,
            "structured": facts,
        }
