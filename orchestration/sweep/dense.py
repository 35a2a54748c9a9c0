"""The dense model that a sweep prunes.

Like every phase it keeps its result in a folder named by a hash of all that the result depends on. A phase
whose inputs have not changed is therefore not run again, and an interrupted phase resumes.
"""

from __future__ import annotations

from typing import Any

import ray

from orchestration.common.hashing import content_hash, digest
from orchestration.recipe.dotted_keys import flatten
from orchestration.recipe.jobs import dense_job
from orchestration.state.trial_log import TrialLog
from orchestration.sweep import tasks
from orchestration.sweep.artifacts import Dense
from orchestration.sweep.context import Sweep
from orchestration.sweep.training import run_training
from orchestration.sweep.trial_runs import without_trainer_state
from orchestration.tracking import registry
from trainers import storage
from trainers.checkpoint.folder import PRUNING_RECORD

PARENT = "parent.json"  # the registered version of a dense model; beside the model, and in the sweep's folder


def dense_phase(sweep: Sweep) -> Dense:
    """Make the dense model: train it once for a recipe and data, or take existing weights."""
    sweep = sweep.phase("dense")
    recipe = sweep.recipe
    given = recipe.model.checkpoint
    if given is not None and not recipe.model.is_file and not recipe.model.is_fetched:
        sweep.display.phase("dense model")
        return _measured(sweep, storage.absolute(given), "given")
    version = _version(sweep, given)
    # the file may hold another model tomorrow
    content = storage.sha256(given) if given is not None and recipe.model.is_file else version or given
    key = digest(
        recipe.model.model_dump(mode="json") | {"checkpoint": content},
        recipe.dense and recipe.dense.model_dump(mode="json"),
        recipe.resources.most if recipe.dense else None,
        recipe.seed,
        sweep.data_hash,
    )
    folder = f"{sweep.storage}/dense/{key}"
    checkpoint = f"{folder}/model"
    if storage.exists(f"{checkpoint}/{PRUNING_RECORD}"):
        sweep.display.phase("dense model")
        return _measured(sweep, checkpoint, "reused")
    log = f"{folder}/trials.json"
    shown: dict[str, Any] = (
        {} if recipe.dense is None else {"epochs": recipe.dense.epochs, "label": "dense", "log": log}
    )
    sweep.display.phase("dense model", **shown)
    with sweep.making(f"dense/{key}", "dense model"):
        if storage.exists(f"{checkpoint}/{PRUNING_RECORD}"):
            how = "made by another sweep"
        elif recipe.dense is None:
            _save(sweep, version, checkpoint)
            how = "pretrained"
        else:
            how = f"trained in {_train(sweep, key, folder):.0f} s"
    return _measured(sweep, checkpoint, how)


def _save(sweep: Sweep, version: str | None, checkpoint: str) -> None:
    """Copy existing weights: of a registered version, pretrained ones of timm, or of the hub."""
    if version is not None:
        with registry.pulled(version, sweep.tracker.uri) as local:
            storage.write_json(f"{local}/{PARENT}", {"version": version})
            storage.upload(local, checkpoint)
    else:
        ray.get(sweep.task(tasks.save_pretrained)[0].remote(sweep.recipe.model, sweep.data, checkpoint))


def _train(sweep: Sweep, key: str, folder: str) -> float:
    """Train the model, or resume an interrupted training; return the seconds."""
    log = TrialLog(f"{folder}/trials.json")
    sweep.begin("dense", "dense model")
    job = dense_job(sweep.recipe, sweep.data, sweep.lineage)
    params = flatten(job.model_dump(mode="json", include={"model", "training"}))
    runs = sweep.runs(log, "dense", params)
    best, trained = run_training(sweep, job, log, runs, folder=f"{folder}/train")
    runs.close(best)
    with without_trainer_state(trained) as clean:  # last: this folder marks the phase as done
        storage.upload(clean, f"{folder}/model")
    return best.seconds


def _version(sweep: Sweep, given: str | None) -> str | None:
    """The registered version that the recipe's alias named when the sweep began; the alias may have moved."""
    if given is None or not given.startswith("models:/"):
        return None
    file = f"{sweep.root}/{PARENT}"
    if not storage.exists(file):
        storage.write_json(file, {"version": registry.version_of(given, sweep.tracker.uri)})
    return str(storage.read_json(file)["version"])


def _measured(sweep: Sweep, checkpoint: str, how: str) -> Dense:
    """The dense model with its validation top-1, and the registered version that it comes from."""
    top1 = validation_top1(sweep, checkpoint)
    sweep.display.finished(f"{how}, {100 * top1:.1f} % on validation")
    parent = f"{checkpoint}/{PARENT}"
    version = storage.read_json(parent)["version"] if storage.exists(parent) else None
    return Dense(checkpoint, top1, content_hash(checkpoint), version)


def validation_top1(sweep: Sweep, checkpoint: str) -> float:
    """Validation top-1 of a checkpoint: from its record if that is of the same data, otherwise measured."""
    file = f"{checkpoint}/{PRUNING_RECORD}"
    record = storage.read_json(file) if storage.exists(file) else {}
    top1 = record.get("figures", {}).get("val_top1")
    if top1 is None or record.get("data") != sweep.data_hash:
        task, device = sweep.task(tasks.measure)
        figures = ray.get(task.remote([checkpoint], sweep.data, "validation", sweep.recipe.seed, device))
        top1 = figures[0]["top1"]
    return float(top1)
