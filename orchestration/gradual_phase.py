"""Gradual runs of a method: the search over schedules, and the long run with what was best there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray.tune.schedulers import TrialScheduler

from orchestration import plots
from orchestration.cluster import cluster_size
from orchestration.config import Recipe, digest
from orchestration.context import Allocated, Dense, Kept, Recovered, Sweep
from orchestration.display import leading
from orchestration.jobs import gradual_job
from orchestration.mlflow_model import classes_of
from orchestration.population import Population
from orchestration.recipes import flatten, get
from orchestration.search import Search, run_search
from orchestration.search_config import LIMITS
from orchestration.search_limits import Limits
from orchestration.search_plots import search_figures
from orchestration.search_space import recipe_space
from orchestration.span import Phase
from orchestration.stopping import stopping
from orchestration.training_search import training_search
from orchestration.trial_log import TrialLog, TrialRecord
from orchestration.trial_runs import TrialRuns, without_trainer_state
from trainers import storage
from trainers.checkpoint import RECORD

_TITLES: dict[Phase, str] = {"schedule": "gradual pruning", "long_run": "long run"}


def schedule_phase(sweep: Sweep, method: str, dense: Dense, allocated: Allocated | None) -> Gradual:
    """Gradual runs over schedule hyper-parameters, at the sparsity that the allocation was chosen at."""
    if allocated is not None and sweep.recipe.allocation.reach is not None:
        sweep = sweep.changed({"pruning.sparsity": allocated.goal.sparsity})
    return _runs(sweep, "schedule", method, dense, allocated)


def long_run_phase(
    sweep: Sweep, method: str, dense: Dense, allocated: Allocated | None, found: Gradual
) -> Gradual:
    """One more run, with the values that were best in the search and those of the recipe's ``long_run``."""
    search = found.sweep.recipe.schedule
    values = search.active(found.best.values) | sweep.recipe.long_run
    alone = {f"schedule.{key}": value for key, value in search.alone.items()} | {"long_run": {}}
    one = found.sweep.phase("long_run").changed({**values, **alone})
    return _runs(one, "long_run", method, dense, allocated)


@dataclass(frozen=True)
class Gradual:
    """Gradual runs that have ended: the best of them, with all that registering it takes."""

    sweep: Sweep
    best: TrialRecord
    trials: list[TrialRecord]
    folder: str
    runs: TrialRuns

    def register(self) -> Recovered:
        """The best run's last model, and those kept on the way, as versions in the registry."""
        classes = classes_of(self.sweep.data.train, self.sweep.data.columns)
        register = partial(self.runs.register, self.sweep.recipe.registered_model, self.best, classes=classes)
        recovered = f"{self.folder}/recovered"
        end = Kept(recovered, self.best.metrics["val_top1"], register(recovered))
        kept = self._kept(register)
        self.sweep.display.say(
            f"registered: version {end.version}"
            + "".join(
                f"; {100 * float(level):g} %: {100 * one.validation:.1f} %, version {one.version}"
                for level, one in kept.items()
            )
        )
        return Recovered(self._sparsity, self.best, end, kept, self.trials)

    @property
    def _sparsity(self) -> float:
        """What the best run was to end at, where that is searched too."""
        recipe = self.sweep.recipe
        found: float = recipe.schedule.active(self.best.values).get(
            "pruning.sparsity", recipe.pruning.sparsity
        )
        return found

    def _kept(self, register: Callable[..., str]) -> dict[str, Kept]:
        found = {}
        for level, figures in self.best.kept.items():
            if self.best.checkpoint is None or figures["checkpoint"] == self.best.checkpoint:
                continue
            target = f"{self.folder}/kept/{level}"
            if not storage.exists(f"{target}/{RECORD}"):
                storage.copy(figures["checkpoint"], target)
            version = register(target, name=f"kept-{level}")
            found[level] = Kept(target, figures["val_top1"], version)
        return found


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
    known = ended >= trials and storage.exists(f"{recovered}/{RECORD}")
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
            recipe=recipe.model_dump(mode="json"),
            method=method,
            data=sweep.data,
            checkpoint=dense.checkpoint,
            allocation=allocation,
            lineage=lineage,
        )
        with sweep.scratch(name) as scratch:
            search = training_search(
                sweep,
                name,
                jobs,
                folder=f"{folder}/train",
                scratch=scratch,
                epochs=epochs,
                **_searched(sweep) | _population(sweep, log, f"{folder}/train"),
            )
            run_search(search, log, runs)
    best = log.best()
    assert best.checkpoint is not None, "a finished training run has reported a checkpoint"
    if not known:
        runs.figure(plots.trial_history(log.trials, title, dense.top1), "history")
        runs.figures(search_figures(log.trials, recipe_space(recipe.schedule.space), title))
    runs.close(best)
    if not known:  # last, as it says that the search is done: MLflow has all of it by now
        with without_trainer_state(best.checkpoint) as clean:
            storage.upload(clean, recovered)
    stopped = sum(record.state == "stopped" for record in log.trials)
    sweep.display.finished(
        f"{'known, ' if known else ''}{len(log.ended)} runs ({stopped} stopped early), "
        f"best {best.percent} on validation at {100 * best.metrics['sparsity']:.1f} %"
    )
    return Gradual(sweep, best, log.ended, folder, runs)


def _searched(sweep: Sweep) -> dict[str, Any]:
    """What makes a search of several runs; nothing where there is one."""
    recipe, search = sweep.recipe, sweep.recipe.schedule
    if search.runs == 1:
        return {}
    return {
        "space": recipe_space(search.space),
        "trials": search.runs,
        "concurrent": sweep.size.training_runs(recipe.resources),
        "sampler": search.sampler,
        "first": _first(recipe),
        "scheduler": _stopping(recipe),
        "reuse_actors": search.scheduler == "none",  # a process whose run was stopped cannot take another
        "limits": Limits(search, "schedule"),
        "fits": lambda: cluster_size().training_runs(recipe.resources),
        "say": sweep.display.say,
    }


def _population(sweep: Sweep, log: TrialLog, runs: str) -> dict[str, Any]:
    """What makes the trials of a search a population, if the recipe asks for one."""
    recipe, search = sweep.recipe, sweep.recipe.schedule
    if search.scheduler != "pbt":
        return {}
    scheduler = partial(
        Population,
        recipe_space(search.space),
        runs,
        every=search.grace_epochs,
        share=1 / search.reduction,
        epochs=recipe.recovery.epochs,
        slots=sweep.size.training_runs(recipe.resources),
        seed=recipe.seed + len(log.trials),
    )
    known = {digest(member["values"]): member for member in log.members}
    return {"scheduler": scheduler, "population": {"known": known, "every": search.grace_epochs}}


def _first(recipe: Recipe) -> list[dict[str, Any]]:
    """What is tried before the sampler proposes: the recipe's own values, and all of a grid."""
    search, content = recipe.schedule, recipe.model_dump(mode="json")
    own = {name: get(content, name) for name in search.space}
    return search.grid()[: search.runs] if search.sampler == "grid" else [own]


def _stopping(recipe: Recipe) -> Callable[[], TrialScheduler]:
    search = recipe.schedule
    if search.scheduler in ("none", "pbt"):
        return Search.scheduler
    grace, epochs = search.grace_epochs, recipe.recovery.epochs
    return partial(stopping, search.scheduler, "recovery_epochs", grace, search.reduction, epochs)


def _params(recipe: Recipe) -> Mapping[str, Any]:
    return flatten(recipe.model_dump(mode="json", include={"pruning", "recovery", "seed"}))
