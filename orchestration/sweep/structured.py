"""The structured step between the dense model and its pruning: cut the model in width, then let it recover.

Its folder is named by a hash of all that the result depends on. It first gets the model that was cut, before
the recovery, so that an interrupted run resumes with exactly the same channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray

from orchestration.common.hashing import content_hash, digest
from orchestration.recipe.dotted_keys import flatten
from orchestration.recipe.jobs import structured_job
from orchestration.state import latency_store as latency
from orchestration.state.trial_log import TrialLog
from orchestration.sweep import tasks
from orchestration.sweep.artifacts import Dense
from orchestration.sweep.context import Sweep
from orchestration.sweep.dense import validation_top1
from orchestration.sweep.training import run_training
from orchestration.sweep.trial_runs import without_trainer_state
from orchestration.tracking.pyfunc_model import classes_of
from trainers import storage
from trainers.checkpoint.folder import PRUNING_RECORD
from trainers.config.structured import StructuredSettings, format_cut

REGISTERED = "registered.json"  # beside the model: its version in the registry
_TITLE = "structured pruning"


def structured_phase(sweep: Sweep, dense: Dense) -> tuple[Dense, dict[str, Any]]:
    """Make the smaller model, which is then pruned like a dense one.

    Returns:
        The model, and the facts about the step, which the records of all later models hold.
    """
    sweep = sweep.phase("structured")
    settings = sweep.recipe.structured
    assert settings is not None, "only a recipe with a structured step has this phase"
    server: list[Any] = []
    if settings.objective == "latency":  # times, and so the choice, depend on the machine
        server = [latency.on_server(settings.serves, latency.circumstances, settings.serves)]
    key = digest(
        dense.weights,
        settings.decides(),
        sweep.recipe.resources.most if settings.recovery else None,
        sweep.recipe.seed,
        sweep.data_hash,
        *server,
    )
    step = _Step(sweep, dense, key)
    if step.known:
        sweep.display.phase(_TITLE)
        return step.result()
    step.show()
    with sweep.making(f"structured/{key}", _TITLE):
        if not step.known:
            step.make()
    return step.result()


def fastest_cut(candidates: Sequence[Mapping[str, Any]], loss: float, dense_top1: float) -> int:
    """Choose the fastest candidate that loses at most ``loss`` of the dense model's top-1.

    Args:
        candidates: with ``top1`` (0…1), ``latency`` (seconds for a batch) and ``cut``.
        loss: share of the dense model's top-1.
        dense_top1: 0…1.

    Returns:
        Its index.

    Raises:
        RuntimeError: all lose more; names the loss of the nearest.
    """
    losses = [1 - candidate["top1"] / max(dense_top1, 1e-12) for candidate in candidates]
    within = [number for number, lost in enumerate(losses) if lost <= loss + 1e-9]
    if not within:
        nearest = min(range(len(losses)), key=lambda number: losses[number])
        raise RuntimeError(
            f"no candidate is within structured.loss ({loss:g} of the dense model's top-1); the nearest, "
            f"{format_cut(candidates[nearest]['cut'])}, loses {losses[nearest]:.3f} before recovery"
        )
    return min(within, key=lambda number: candidates[number]["latency"])


class _Step:
    """A structured step; ``model`` is the model after the recovery, or after the cut without a recovery."""

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
        return recovered and storage.exists(f"{self.model}/{PRUNING_RECORD}")

    @property
    def _log(self) -> str:
        return f"{self._folder}/trials.json"

    def show(self) -> None:
        """Show the phase on the display."""
        training = self._settings.recovery
        shown: dict[str, Any] = {} if training is None else {"label": "structured", "log": self._log}
        self._sweep.display.phase(_TITLE, epochs=training.epochs if training else 1, **shown)

    def make(self) -> None:
        """Cut, recover, register."""
        self._sweep.begin("structured", _TITLE)
        facts = self._cut_now()
        if self._settings.recovery is not None:
            self._recover(TrialLog(self._log), facts)
        self._made = True

    def result(self) -> tuple[Dense, dict[str, Any]]:
        """The model for the later phases, and the facts about the step."""
        facts = storage.read_json(f"{self.model}/{PRUNING_RECORD}")["structured"]
        top1 = validation_top1(self._sweep, self.model)
        file = f"{self._folder}/{REGISTERED}"
        version = storage.read_json(file)["version"] if storage.exists(file) else self._dense.version
        how = "" if self._made else "known, "
        self._sweep.display.finished(f"{how}{format_cut(facts['cut'])}: {100 * top1:.1f} % on validation")
        return Dense(self.model, top1, content_hash(self.model), version), facts

    def _cut_now(self) -> dict[str, Any]:
        """Cut the dense model unless that was done before; return the record of the cut."""
        sweep, dense = self._sweep, self._dense
        if not storage.exists(f"{self._cut}/{PRUNING_RECORD}"):
            facts: dict[str, Any] = {"dense": dense.weights, "dense_top1": dense.top1}
            settings = self._settings
            if settings.objective == "latency":
                candidates, taken = self._candidates(facts)
                settings, facts = (
                    settings.choices()[taken],
                    facts | {"candidates": candidates, "taken": taken},
                )
            self._save(settings, facts, self._cut)
        facts = storage.read_json(f"{self._cut}/{PRUNING_RECORD}")["structured"]
        top1 = validation_top1(sweep, self._cut)
        sweep.display.say(
            f"      {format_cut(facts['cut'])}: {100 * dense.top1:.1f} → {100 * top1:.1f} % on validation"
        )
        return facts | {"cut_top1": top1}

    def _save(self, settings: StructuredSettings, facts: dict[str, Any], folder: str) -> None:
        """Cut the dense model by a task, into a folder."""
        sweep = self._sweep
        task, device = sweep.task(tasks.save_structured)
        given = {"seed": sweep.recipe.seed, "lineage": self._lineage(facts), "device": device}
        ray.get(task.remote(self._dense.checkpoint, settings, sweep.data, folder, **given))

    def _candidates(self, facts: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
        """Measure each candidate without recovery; return all, and the index of the chosen one."""
        sweep, target = self._sweep, self._settings.serves
        choices = self._settings.choices()
        with sweep.scratch(f"structured-{self._key}") as scratch:
            folders = [f"{scratch}/{number}" for number in range(len(choices))]
            for settings, folder in zip(choices, folders, strict=True):
                self._save(settings, facts, folder)
            task, device = sweep.task(tasks.measure)
            tops = ray.get(task.remote(folders, sweep.data, "validation", sweep.recipe.seed, device))
            *times, dense = latency.on_server(
                target, latency.times_of, [*folders, self._dense.checkpoint], target
            )
            cuts = [
                storage.read_json(f"{folder}/{PRUNING_RECORD}")["structured"]["cut"] for folder in folders
            ]
        candidates = [
            {"cut": cut, "top1": top["top1"], "latency": took}
            for cut, top, took in zip(cuts, tops, times, strict=True)
        ]
        sweep.display.say(f"      dense: {100 * self._dense.top1:.1f} %, {1e3 * dense:.2f} ms on {target}")
        for candidate in candidates:
            milliseconds = 1e3 * candidate["latency"]
            sweep.display.say(
                f"      {format_cut(candidate['cut'])}: "
                f"{100 * candidate['top1']:.1f} %, {milliseconds:.2f} ms"
            )
        assert self._settings.loss is not None, "checked when it was read"
        return candidates, fastest_cut(candidates, self._settings.loss, self._dense.top1)

    def _recover(self, log: TrialLog, facts: dict[str, Any]) -> None:
        sweep, recipe = self._sweep, self._sweep.recipe
        lineage = self._lineage(facts)
        job = structured_job(recipe, sweep.data, cut=self._cut, dense=self._dense.checkpoint, lineage=lineage)
        params = recipe.model_dump(mode="json", include={"structured", "seed"})
        runs = sweep.runs(log, "structured", flatten(params))
        figures = {key: value for key, value in facts.items() if isinstance(value, int | float)}
        sweep.tracker.metrics(runs.run, {key: [(0, float(value))] for key, value in figures.items()})
        best, trained = run_training(sweep, job, log, runs, folder=f"{self._folder}/train")
        with without_trainer_state(trained) as clean:
            storage.upload(clean, self.model)
        version = runs.register(
            recipe.registered_model,
            best,
            self.model,
            classes=classes_of(sweep.data.train, sweep.data.columns),
        )
        reference = f"models:/{recipe.registered_model}/{version}"
        runs.close(best)
        # last: this file marks the phase as done
        storage.write_json(f"{self._folder}/{REGISTERED}", {"version": reference})

    def _lineage(self, facts: dict[str, Any]) -> dict[str, Any]:
        """The lineage recorded with the model; its method is ``structured``."""
        return {
            **self._sweep.lineage,
            "method": "structured",
            "parent": self._dense.weights,
            "parent_version": self._dense.version,
            "structured": facts,
        }
