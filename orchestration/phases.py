"""The phases of a sweep around its allocation search: a dense model, and gradual runs of each method.

A phase keeps its results in a folder named by the hash of all that it depends on: what has not changed is
not run again, and an interrupted phase goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import TrialScheduler

from orchestration import plots, registry, remote
from orchestration.config import Recipe, digest
from orchestration.context import Allocated, Dense, Kept, Recovered, Sweep, content_hash
from orchestration.jobs import dense_job, gradual_job
from orchestration.mlflow_model import classes_of
from orchestration.recipes import flatten, get
from orchestration.search import Search, run_search, stopping
from orchestration.search_plots import search_figures
from orchestration.search_space import recipe_space
from orchestration.trial_log import TrialLog, TrialRecord
from orchestration.trial_runs import without_trainer_state
from orchestration.tune_trial import training_trial
from trainers import storage
from trainers.checkpoint import RECORD

PARENT = "parent.json"  # in a dense model that was a registered version: which one


def dense_phase(sweep: Sweep) -> Dense:
    """The dense model: trained once for a recipe and data, or taken as it is."""
    recipe = sweep.recipe
    given = recipe.model.checkpoint
    if given is not None and not given.startswith(("hf-hub:", "models:/")):
        sweep.display.phase("dense model")
        return _measured(sweep, storage.absolute(given), "given")
    key = digest(
        recipe.model.model_dump(mode="json"),
        recipe.dense and recipe.dense.model_dump(mode="json"),
        recipe.resources.most if recipe.dense else None,
        recipe.seed,
        sweep.data_hash,
    )
    folder = f"{sweep.storage}/dense/{key}"
    checkpoint = f"{folder}/model"
    if storage.exists(f"{checkpoint}/{RECORD}"):
        sweep.display.phase("dense model")
        return _measured(sweep, checkpoint, "reused")
    if recipe.dense is None:
        sweep.display.phase("dense model")
        if given is not None and given.startswith("models:/"):
            version = registry.version_of(given, sweep.tracker.uri)  # the alias may move on
            with registry.pulled(version, sweep.tracker.uri) as local:
                storage.write_json(f"{local}/{PARENT}", {"version": version})
                storage.upload(local, checkpoint)
        else:
            ray.get(sweep.task(remote.save_pretrained)[0].remote(recipe.model, sweep.data, checkpoint))
        return _measured(sweep, checkpoint, "pretrained")
    log = TrialLog(f"{folder}/trials.json")
    sweep.display.phase("dense model", epochs=recipe.dense.epochs, label="dense", log=log.uri)
    job = dense_job(recipe, sweep.data, sweep.lineage).model_dump(mode="json")
    runs = sweep.runs(log, "dense", flatten({"model": job["model"], "training": job["training"]}))
    with sweep.scratch(f"dense-{key}") as scratch:
        best = run_search(
            Search(
                name=f"dense-{key}",
                trainable=_training(sweep, lambda values: job, f"{folder}/train"),
                space={},
                trials=1,
                concurrent=1,
                storage=scratch,
                seed=recipe.seed,
                complete=_complete(recipe.dense.epochs),
            ),
            log,
            runs,
        )
    assert best.checkpoint is not None, "a finished training run has reported a checkpoint"
    with without_trainer_state(best.checkpoint) as clean:
        storage.upload(clean, f"{folder}/model")
    runs.close(best)
    return _measured(sweep, checkpoint, f"trained in {best.seconds:.0f} s")


def schedule_phase(sweep: Sweep, method: str, dense: Dense, allocated: Allocated | None) -> Recovered:
    """Gradual runs over schedule hyper-parameters; the best is registered."""
    recipe = sweep.recipe
    allocation = allocated.goal.allocation if allocated is not None else None
    key = digest(
        content_hash(dense.checkpoint),
        method,
        allocation,
        recipe.pruning.model_dump(mode="json", exclude={"methods"}),
        recipe.recovery.model_dump(mode="json"),
        recipe.schedule.model_dump(mode="json", exclude={"trials"}),
        recipe.resources.most,
        recipe.seed,
        sweep.data_hash,
    )
    folder = f"{sweep.root}/schedule-{method}-{key}"
    log = TrialLog(f"{folder}/trials.json")
    epochs = recipe.recovery.epochs
    trials = recipe.schedule.runs
    ended = len(log.ended)
    sweep.display.phase(
        f"{method}: gradual pruning",
        trials=trials,
        done=ended,
        epochs=epochs,
        label=f"{method}-schedule",
        log=log.uri,
    )
    recovered = f"{folder}/recovered"
    space = recipe_space(recipe.schedule.space) if trials > 1 else {}
    content = recipe.model_dump(mode="json")
    known = ended >= trials and storage.exists(f"{recovered}/{RECORD}")
    runs = sweep.runs(log, "schedule", _gradual_params(recipe), method, done=known)
    if not known:
        jobs = partial(
            gradual_job,
            recipe=content,
            method=method,
            data=sweep.data,
            checkpoint=dense.checkpoint,
            allocation=allocation,
            lineage={
                **sweep.lineage,
                "parent": content_hash(dense.checkpoint),
                "parent_version": dense.version,
            },
        )
        with sweep.scratch(f"schedule-{method}-{key}") as scratch:
            run_search(
                Search(
                    name=f"schedule-{method}-{key}",
                    trainable=_training(sweep, jobs, f"{folder}/train"),
                    space=space,
                    trials=trials,
                    concurrent=sweep.size.training_runs(recipe.resources),
                    storage=scratch,
                    seed=recipe.seed,
                    sampler=recipe.schedule.sampler,
                    first=_first(recipe, content) if space else [],
                    scheduler=_stopping(recipe) if space else Search.scheduler,
                    complete=_complete(epochs),
                ),
                log,
                runs,
            )
    best = log.best()
    assert best.checkpoint is not None, "a finished training run has reported a checkpoint"
    if not known:
        with without_trainer_state(best.checkpoint) as clean:
            storage.upload(clean, recovered)
    register = partial(runs.register, recipe.registered_model, best, classes=classes_of(sweep.data.train))
    version = register(recovered)
    kept = _keep(best, folder, register)
    if not known:
        runs.figure(plots.trial_history(log.trials, f"{method}: gradual runs", dense.top1), "history")
        runs.figures(search_figures(log.trials, space, f"{method}: gradual runs"))
    runs.close(best)
    stopped = sum(record.state == "stopped" for record in log.trials)
    sweep.display.finished(
        f"{'known, ' if known else ''}{len(log.ended)} runs ({stopped} stopped early), "
        f"best {best.percent} on validation at {100 * best.metrics['sparsity']:.1f} %, version {version}"
        + "".join(
            f"; {100 * float(level):g} %: {100 * one.validation:.1f} %, version {one.version}"
            for level, one in kept.items()
        )
    )
    return Recovered(best, Kept(recovered, best.metrics["val_top1"], version), kept, log.trials)


def _keep(best: TrialRecord, folder: str, register: Callable[..., str]) -> dict[str, Kept]:
    """The best run's models at the sparsities on the way: copied, logged and registered, each as its own."""
    found = {}
    for level, figures in best.kept.items():
        if best.checkpoint is None or figures["checkpoint"] == best.checkpoint:
            continue
        target = f"{folder}/kept/{level}"
        if not storage.exists(f"{target}/{RECORD}"):
            storage.copy(figures["checkpoint"], target)
        version = register(target, name=f"kept-{level}")
        found[level] = Kept(target, figures["val_top1"], version)
    return found


def _first(recipe: Recipe, content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is tried before the sampler proposes: the recipe's own values, and all of a grid."""
    search = recipe.schedule
    own = {name: get(content, name) for name in search.space}
    return search.grid()[: search.runs] if search.sampler == "grid" else [own]


def _stopping(recipe: Recipe) -> Callable[[], TrialScheduler]:
    search = recipe.schedule
    if search.scheduler == "none":
        return Search.scheduler
    grace, epochs = search.grace_epochs, recipe.recovery.epochs
    return partial(stopping, search.scheduler, "recovery_epochs", grace, search.reduction, epochs)


def _complete(epochs: int) -> Callable[[Mapping[str, Any]], bool]:
    """Whether a trial ran all its epochs, or was stopped before."""
    return lambda metrics: bool(metrics.get("epoch", 0) >= epochs)


def _training(sweep: Sweep, jobs: Any, folder: str) -> Any:
    # The function takes next to nothing, as its workers reserve what they need; a sliver of a processor
    # would already keep a group as large as the cluster from ever being placed.
    return tune.with_resources(
        tune.with_parameters(training_trial, jobs=jobs, resources=sweep.recipe.resources, storage=folder),
        {"memory": 1 << 20},
    )


def _measured(sweep: Sweep, checkpoint: str, how: str) -> Dense:
    """The dense model with its validation top-1: from its record if that tells of the same data."""
    place = f"{checkpoint}/{RECORD}"
    record = storage.read_json(place) if storage.exists(place) else {}
    top1 = record.get("figures", {}).get("val_top1")
    if top1 is None or record.get("data") != sweep.data_hash:
        task, device = sweep.task(remote.measure)
        found = ray.get(task.remote([checkpoint], sweep.data, "validation", sweep.recipe.seed, device))
        top1 = found[0]["top1"]
    sweep.display.finished(f"{how}, {100 * top1:.1f} % on validation")
    parent = f"{checkpoint}/{PARENT}"
    version = storage.read_json(parent)["version"] if storage.exists(parent) else None
    return Dense(checkpoint, top1, version)


def _gradual_params(recipe: Recipe) -> dict[str, Any]:
    content = recipe.model_dump(mode="json", include={"pruning", "recovery", "seed"})
    return flatten(content)
