"""The phases of a sweep: a dense model, an allocation search and a schedule search for each method.

A phase keeps its results in a folder named by the hash of all that it depends on: what has not changed is
not run again, and an interrupted phase goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import ray
from ray import tune

from orchestration import plots, registry, remote
from orchestration.config import Recipe, digest
from orchestration.context import Allocated, Dense, Kept, Recovered, Sweep, content_hash
from orchestration.jobs import dense_job, gradual_job
from orchestration.one_shot import OneShotInputs, OneShotTrial
from orchestration.recipes import flatten, get
from orchestration.search import Search, asha, run_search
from orchestration.search_space import AllocationSpace, recipe_space
from orchestration.trial_log import TrialLog, TrialRecord
from orchestration.trial_runs import TrialRuns, without_trainer_state
from orchestration.tune_trial import training_trial
from trainers import storage
from trainers.checkpoint import RECORD


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
            with registry.pulled(given, sweep.tracker.uri) as local:
                storage.upload(local, checkpoint)
        else:
            ray.get(sweep.task(remote.save_pretrained)[0].remote(recipe.model, sweep.data, checkpoint))
        return _measured(sweep, checkpoint, "pretrained")
    log = TrialLog(f"{folder}/trials.json")
    sweep.display.phase("dense model", epochs=recipe.dense.epochs, label="dense", log=log.uri)
    job = dense_job(recipe, sweep.data, sweep.lineage).model_dump(mode="json")
    runs = sweep.runs(log, "dense", flatten({"model": job["model"], "training": job["training"]}))
    with _scratch(sweep, f"dense-{key}") as scratch:
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


def allocation_phase(sweep: Sweep, method: str, dense: Dense) -> Allocated:
    """One elimination, then cheap trials that read it; the first is the method's own allocation."""
    recipe = sweep.recipe
    search = recipe.allocation
    pruning = recipe.pruning.model_dump(mode="json", exclude={"methods", "schedule"})
    key = digest(
        content_hash(dense.checkpoint),
        method,
        pruning,
        search.model_dump(mode="json", exclude={"trials"}),
        recipe.seed,
        sweep.data_hash,
    )
    folder = f"{sweep.root}/allocation-{method}-{key}"
    log = TrialLog(f"{folder}/trials.json")
    trials = max(search.trials, 1)
    ended = len(log.ended)
    sweep.display.phase(
        f"{method}: allocation search", trials=trials, done=ended, label=f"{method}-allocation", log=log.uri
    )
    one_shot = f"{folder}/one-shot"
    if ended >= trials and storage.exists(f"{one_shot}/{RECORD}"):
        best = log.best()
        sweep.display.finished(f"known, {_percent(best)} one-shot on validation")
        return _allocated(best, one_shot, log)

    task, device = sweep.task(remote.elimination_order, returns=2)
    facts, order = task.remote(
        dense.checkpoint,
        sweep.data,
        recipe.pruning,
        method,
        seed=recipe.seed,
        device=device,
    )
    layers, own, costs, damp = ray.get(facts)
    if damp is not None:
        sweep.display.say(f"{method}: {damp.why}")
    space = AllocationSpace.of(search, recipe.pruning, layers, own)
    inputs = OneShotInputs(
        checkpoint=dense.checkpoint,
        data=sweep.data,
        seed=recipe.seed,
        images=search.images,
        threads=max(1, int(search.cpus_per_trial)),
        device="cuda" if search.gpus_per_trial else "cpu",
        space=space,
        order=order,
        costs=costs,
    )
    tried = {} if damp is None else {"damp": damp.damp, "damp_why": damp.why}
    runs = sweep.runs(log, "allocation", {"dense": content_hash(dense.checkpoint), **tried}, method)
    with _scratch(sweep, f"allocation-{method}-{key}") as scratch:
        best = run_search(
            Search(
                name=f"allocation-{method}-{key}",
                trainable=tune.with_resources(
                    tune.with_parameters(OneShotTrial, inputs=inputs),
                    {"CPU": search.cpus_per_trial, "GPU": search.gpus_per_trial},
                ),
                space=space.distributions(),
                trials=trials,
                concurrent=sweep.size.allocation_trials(search),
                storage=scratch,
                seed=recipe.seed,
                sampler=search.sampler,
                first=[space.own_values()],
                reuse_actors=True,
            ),
            log,
            runs,
        )
    record = {"method": method, "figures": {"val_top1": best.metrics["val_top1"]}, **sweep.lineage}
    ray.get(sweep.task(remote.save_one_shot)[0].remote(inputs, best.metrics["allocation"], one_shot, record))
    runs.figure(plots.allocations(log.trials, f"{method}: sparsity of stages and modules"), "allocations")
    runs.figure(plots.trial_history(log.trials, f"{method}: one-shot trials", dense.top1), "history")
    runs.close(best)
    sweep.display.finished(
        f"{len(log.ended)} trials, own {_own(log)} → best {_percent(best)} one-shot on validation"
    )
    return _allocated(best, one_shot, log)


def schedule_phase(sweep: Sweep, method: str, dense: Dense, allocated: Allocated | None) -> Recovered:
    """Gradual runs over schedule hyper-parameters; the best is registered."""
    recipe = sweep.recipe
    allocation = allocated.allocation if allocated is not None else None
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
            lineage={**sweep.lineage, "parent": content_hash(dense.checkpoint)},
        )
        with _scratch(sweep, f"schedule-{method}-{key}") as scratch:
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
                    first=[{name: get(content, name) for name in space}] if space else [],
                    scheduler=partial(asha, recipe.schedule.grace_epochs, recipe.schedule.reduction, epochs)
                    if recipe.schedule.stop_early and space
                    else Search.scheduler,
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
    version = runs.register(recipe.registered_model, best, recovered)
    kept = _keep(sweep, runs, best, folder)
    if not known:
        runs.figure(plots.trial_history(log.trials, f"{method}: gradual runs", dense.top1), "history")
    runs.close(best)
    stopped = sum(record.state == "stopped" for record in log.trials)
    sweep.display.finished(
        f"{'known, ' if known else ''}{len(log.ended)} runs ({stopped} stopped early), "
        f"best {_percent(best)} on validation at {100 * best.metrics['sparsity']:.1f} %, version {version}"
        + "".join(
            f"; {100 * float(level):g} %: {100 * one.validation:.1f} %, version {one.version}"
            for level, one in kept.items()
        )
    )
    return Recovered(best, Kept(recovered, best.metrics["val_top1"], version), kept, log.trials)


def _keep(sweep: Sweep, runs: TrialRuns, best: TrialRecord, folder: str) -> dict[str, Kept]:
    """The best run's models at the sparsities on the way: copied, logged and registered, each as its own."""
    found = {}
    for level, figures in best.kept.items():
        if best.checkpoint is None or figures["checkpoint"] == best.checkpoint:
            continue
        target = f"{folder}/kept/{level}"
        if not storage.exists(f"{target}/{RECORD}"):
            storage.copy(figures["checkpoint"], target)
        version = runs.register(sweep.recipe.registered_model, best, target, name=f"kept-{level}")
        found[level] = Kept(target, figures["val_top1"], version)
    return found


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


def _own(log: TrialLog) -> str:
    """How the method's own allocation did."""
    given = next((record for record in log.ended if record.given), None)
    return _percent(given) if given is not None else "failed"


def _allocated(best: TrialRecord, checkpoint: str, log: TrialLog) -> Allocated:
    name = "own" if best.given else "searched"
    return Allocated(best.metrics["allocation"], name, checkpoint, log.ended)


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
    return Dense(checkpoint, top1)


@contextmanager
def _scratch(sweep: Sweep, name: str) -> Iterator[str]:
    """Where Tune keeps its own state while it runs; nobody reads it again."""
    uri = f"{sweep.storage}/scratch/{name}"
    storage.remove(uri)
    try:
        yield uri
    finally:
        storage.remove(uri)


def _gradual_params(recipe: Recipe) -> dict[str, Any]:
    content = recipe.model_dump(mode="json", include={"pruning", "recovery", "seed"})
    return flatten(content)


def _percent(record: TrialRecord) -> str:
    return f"{100 * record.metrics['val_top1']:.1f} %"
