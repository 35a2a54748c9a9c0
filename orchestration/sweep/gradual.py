"""Gradual runs of a method: the search over schedules, and the long run with the best values found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic_core import to_jsonable_python
from ray.tune.schedulers import TrialScheduler

from orchestration.cluster.capacity import cluster_size
from orchestration.common.hashing import digest
from orchestration.recipe.dotted_keys import flatten, get
from orchestration.recipe.jobs import gradual_job
from orchestration.recipe.phases import Phase
from orchestration.recipe.schema import Recipe
from orchestration.recipe.search import LIMITS
from orchestration.reporting import plots
from orchestration.reporting.display import leading
from orchestration.reporting.search_plots import search_figures
from orchestration.search.limits import Limits
from orchestration.search.pbt import Population
from orchestration.search.runner import run_search
from orchestration.search.schedulers import stopping
from orchestration.search.space import recipe_space
from orchestration.search.spec import Search
from orchestration.search.training_trial import Jobs, RunNames
from orchestration.state.trial_log import TrialLog, TrialRecord
from orchestration.sweep.artifacts import Allocated, Dense, Kept, Recovered
from orchestration.sweep.context import Sweep
from orchestration.sweep.training import PopulationState, is_whole, run_training, training_trial
from orchestration.sweep.trial_runs import TrialRuns, without_trainer_state
from orchestration.tracking.pyfunc_model import classes_of
from trainers import storage
from trainers.checkpoint.folder import PRUNING_RECORD

_TITLES: dict[Phase, str] = {"schedule": "gradual pruning", "long_run": "long run"}


def schedule_phase(sweep: Sweep, method: str, dense: Dense, allocated: Allocated | None) -> Gradual:
    """Do the gradual runs of the search over schedules, at the sparsity of the chosen allocation.

    Args:
        sweep: the sweep.
        method: of pruning.
        dense: the model to prune.
        allocated: the result of the allocation search; ``None``: each run has the method's own allocation.

    Returns:
        The runs, with the best of them.
    """
    if allocated is not None and sweep.recipe.allocation.reach is not None:
        sweep = sweep.changed({"pruning.sparsity": allocated.goal.sparsity})
    return _runs(sweep, "schedule", method, dense, allocated)


def long_run_phase(
    sweep: Sweep, method: str, dense: Dense, allocated: Allocated | None, scheduled: Gradual
) -> Gradual:
    """Do one more run, with the best values of the search and those of the recipe's ``long_run``.

    Args:
        sweep: the sweep.
        method: of pruning.
        dense: the model to prune.
        allocated: the result of the allocation search; ``None``: the run has the method's own allocation.
        scheduled: the result of the search over schedules.

    Returns:
        The run.
    """
    search = scheduled.sweep.recipe.schedule
    values = search.active(scheduled.best.values) | sweep.recipe.long_run
    alone = {f"schedule.{key}": value for key, value in search.alone.items()} | {"long_run": {}}
    long_run = scheduled.sweep.changed({**values, **alone}).phase("long_run")
    return _runs(long_run, "long_run", method, dense, allocated)


@dataclass(frozen=True)
class Gradual:
    """Gradual runs that have ended: the best of them, and what is needed to register it."""

    sweep: Sweep
    best: TrialRecord
    trials: list[TrialRecord]
    folder: str
    runs: TrialRuns

    def register(self) -> Recovered:
        """Register the final model of the best run, and those kept at lower sparsities."""
        classes = classes_of(self.sweep.data.train, self.sweep.data.columns)
        register = partial(self.runs.register, self.sweep.recipe.registered_model, self.best, classes=classes)
        recovered = f"{self.folder}/recovered"
        end = Kept(recovered, self.best.metrics["val_top1"], register(recovered))
        kept = self._kept(register)
        self.sweep.display.say(
            f"registered: version {end.version}"
            + "".join(
                f"; {100 * float(level):g} %: {100 * model.validation:.1f} %, version {model.version}"
                for level, model in kept.items()
            )
        )
        return Recovered(self._sparsity, self.best, end, kept, self.trials)

    @property
    def _sparsity(self) -> float:
        """The final sparsity of the best run, which may have been searched too."""
        recipe = self.sweep.recipe
        sparsity: float = recipe.schedule.active(self.best.values).get(
            "pruning.sparsity", recipe.pruning.sparsity
        )
        return sparsity

    def _kept(self, register: Callable[..., str]) -> dict[str, Kept]:
        kept = {}
        for level, figures in self.best.kept.items():
            if self.best.checkpoint is None or figures["checkpoint"] == self.best.checkpoint:
                continue
            target = f"{self.folder}/kept/{level}"
            if not storage.exists(f"{target}/{PRUNING_RECORD}"):
                storage.copy(figures["checkpoint"], target)
            version = register(target, name=f"kept-{level}")
            kept[level] = Kept(target, figures["val_top1"], version)
        return kept


def _runs(sweep: Sweep, phase: Phase, method: str, dense: Dense, allocated: Allocated | None) -> Gradual:
    recipe, title = sweep.recipe, f"{method}: {_TITLES[phase]}"
    allocation = allocated.goal.allocation if allocated is not None else None
    key = digest(
        dense.weights,
        method,
        allocation,
        recipe.pruning.model_dump(mode="json", exclude={"methods"}),
        recipe.recovery.model_dump(mode="json"),
        recipe.schedule.model_dump(mode="json", exclude={"trials", *LIMITS}),
        recipe.resources.most,
        recipe.seed,
        sweep.data_hash,
    )
    name = f"{phase}-{method}-{key}"
    folder, recovered = f"{sweep.root}/{name}", f"{sweep.root}/{name}/recovered"
    log = TrialLog(f"{folder}/trials.json")
    trials, epochs, ended = recipe.schedule.runs, recipe.recovery.epochs, len(log.ended)
    label = f"{method}-{phase}"
    so_far = leading(log.trials)
    sweep.display.phase(
        title, trials=trials, done=ended, epochs=epochs, best=so_far, label=label, log=log.uri
    )
    known = ended >= trials and storage.exists(f"{recovered}/{PRUNING_RECORD}")
    if not known:
        sweep.begin(phase, title)
    runs = sweep.runs(log, phase, _params(recipe), method, done=known)
    if not known:
        lineage = {
            **sweep.lineage,
            "parent": dense.weights,
            "parent_version": dense.version,
        }
        jobs = partial(
            gradual_job,
            recipe=recipe,
            method=method,
            data=sweep.data,
            checkpoint=dense.checkpoint,
            allocation=allocation,
            lineage=lineage,
        )
        if trials == 1:
            run_training(sweep, jobs({}), log, runs, folder=f"{folder}/train")
        else:
            _search(sweep, name, jobs, log, runs, folder=f"{folder}/train")
    best = log.best()
    assert best.checkpoint is not None, "a finished training run has reported a checkpoint"
    if not known:
        runs.figure(plots.trial_history(log.trials, title, dense.top1), "history")
        runs.figures(search_figures(log.trials, recipe_space(recipe.schedule.space), title))
    runs.close(best)
    if not known:  # last: this folder marks the search as done, with everything in MLflow
        with without_trainer_state(best.checkpoint) as clean:
            storage.upload(clean, recovered)
    stopped = sum(record.state == "stopped" for record in log.trials)
    sweep.display.finished(
        f"{'known, ' if known else ''}{len(log.ended)} runs ({stopped} stopped early), "
        f"best {best.percent} on validation at {100 * best.metrics['sparsity']:.1f} %"
    )
    return Gradual(sweep, best, log.ended, folder, runs)


def _search(sweep: Sweep, name: str, jobs: Jobs, log: TrialLog, runs: TrialRuns, *, folder: str) -> None:
    """Run the recipe's search over schedules; ``folder`` is for its Train runs."""
    recipe, settings = sweep.recipe, sweep.recipe.schedule
    concurrent = sweep.size.training_runs(recipe.resources)
    population = _population(recipe, log)
    complete = partial(is_whole, epochs=recipe.recovery.epochs)
    with sweep.scratch(name) as scratch:
        search = Search(
            name=name,
            trainable=training_trial(recipe.resources, jobs, folder, population),
            space=recipe_space(settings.space),
            trials=settings.runs,
            concurrent=concurrent,
            storage=scratch,
            seed=recipe.seed,
            sampler=settings.sampler,
            first=_first(recipe),
            scheduler=_stopping(recipe, log, folder, slots=concurrent),
            reuse_actors=population is None,  # the process of a member ends with it
            complete=complete,
            names=RunNames(complete) if population is None else None,
            limits=Limits(settings, "schedule"),
            fits=lambda: cluster_size().training_runs(recipe.resources),
            say=sweep.display.say,
        )
        run_search(search, log, runs)


def _population(recipe: Recipe, log: TrialLog) -> PopulationState | None:
    """The inputs of a population's trials; ``None`` if the recipe asks for no population."""
    if recipe.schedule.scheduler != "pbt":
        return None
    known = {digest(member["values"]): member for member in log.members}
    return PopulationState(known, every=recipe.schedule.grace_epochs)


def _first(recipe: Recipe) -> list[dict[str, Any]]:
    """Proposals before those of the sampler: the recipe's own values, or all points of a grid."""
    search = recipe.schedule
    own = {name: to_jsonable_python(get(recipe, name)) for name in search.space}
    return search.grid()[: search.runs] if search.sampler == "grid" else [own]


def _stopping(recipe: Recipe, log: TrialLog, folder: str, *, slots: int) -> Callable[[], TrialScheduler]:
    """The scheduler that stops trials early, or makes them a population.

    Args:
        folder: of the Train runs.
        slots: how many of them run at once.
    """
    search, epochs = recipe.schedule, recipe.recovery.epochs
    if search.scheduler == "none":
        return Search.scheduler
    if search.scheduler == "pbt":
        return partial(
            Population,
            recipe_space(search.space),
            folder,
            every=search.grace_epochs,
            share=1 / search.reduction,
            epochs=epochs,
            slots=slots,
            seed=recipe.seed + len(log.trials),
        )
    return partial(
        stopping, search.scheduler, "recovery_epochs", search.grace_epochs, search.reduction, epochs
    )


def _params(recipe: Recipe) -> Mapping[str, Any]:
    return flatten(recipe.model_dump(mode="json", include={"pruning", "recovery", "seed"}))
