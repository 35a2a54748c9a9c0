"""The allocation search of a method: for each sparsity one-shot trials that read one elimination."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

import ray
from ray import tune

from orchestration.cluster.capacity import cluster_size
from orchestration.common.hashing import digest
from orchestration.preflight.allocation import check_not_sparser
from orchestration.recipe.search import Fastest, Rule
from orchestration.reporting import plots
from orchestration.reporting.display import leading
from orchestration.reporting.search_plots import search_figures
from orchestration.search.limits import Limits
from orchestration.search.one_shot_trial import OneShotInputs, OneShotTrial, Speed
from orchestration.search.pareto import chosen, fastest
from orchestration.search.runner import run_search
from orchestration.search.schedulers import stopping
from orchestration.search.space import AllocationSpace
from orchestration.search.spec import Search
from orchestration.state import latency_store as latency
from orchestration.state.trial_log import TrialLog, TrialRecord
from orchestration.sweep import tasks
from orchestration.sweep.allocation.rounds import Rounds
from orchestration.sweep.artifacts import Allocated, Dense, Study
from orchestration.sweep.context import Sweep
from orchestration.sweep.trial_runs import OneShotRuns
from pruners.allocation.projection import budget
from trainers import storage
from trainers.checkpoint.folder import PRUNING_RECORD
from trainers.config.pruning import PruningSettings
from trainers.engines.latency_table import LatencyTable


def allocation_phase(sweep: Sweep, method: str, dense: Dense) -> Allocated:
    """Search the allocation at each sparsity; each study begins with the best proposal of the one before.

    Args:
        sweep: the sweep.
        method: of pruning.
        dense: the model to prune.

    Returns:
        The studies by sparsity, and the one whose allocation gradual runs use.
    """
    studies: dict[float, Study] = {}
    search = _Searches(sweep, method, dense)
    before: Study | None = None
    for sparsity in search.sparsities:
        before = studies[sparsity] = search.study(sparsity, before)
    goal = studies[sweep.recipe.pruning.sparsity]
    reaches = sweep.recipe.allocation.reach is not None
    return Allocated({goal.sparsity: goal} if reaches else studies, goal)


class _Searches:
    """The studies of one method. Elimination orders are made when the first study needs them."""

    def __init__(self, sweep: Sweep, method: str, dense: Dense) -> None:
        self._sweep, self._method, self._dense = sweep, method, dense
        recipe = sweep.recipe
        self.sparsities = recipe.allocated_sparsities
        self._rounds = Rounds(sweep, method, dense, self.sparsities)

    def study(self, sparsity: float, before: Study | None) -> Study:
        """Search at one sparsity. All trials use one elimination; the first is the method's allocation."""
        sweep, search = self._sweep, self._sweep.recipe.allocation
        pruning = sweep.recipe.pruning.model_copy(update={"sparsity": sparsity})
        moved = None if before is None else before.moved
        key = digest(
            self._dense.weights,
            self._method,
            pruning.model_dump(mode="json", exclude={"methods", "schedule", "keep"}),
            search.decides(),
            moved,
            sweep.recipe.seed,
            sweep.data_hash,
            # another machine has other times, and so other results
            *([] if self._table is None else [self._table.about]),
        )
        name = f"allocation-{self._method}-{key}"
        log = TrialLog(f"{sweep.root}/{name}/trials.json", one_shot=True)
        one_shot = f"{sweep.root}/{name}/one-shot"
        trials, ended = max(search.trials, 1), len(log.ended)
        level = f"{100 * sparsity:g}"
        at = f" at {level} %" if len(self.sparsities) > 1 else ""
        title, label = (
            f"{self._method}: allocation search{at}",
            f"{self._method}-allocation{at and '-' + level}",
        )
        so_far = leading(log.trials)
        sweep.display.phase(title, trials=trials, done=ended, best=so_far, label=label, log=log.uri)
        if ended >= trials and storage.exists(f"{one_shot}/{PRUNING_RECORD}"):
            study = Study(self._best(log), one_shot, log.ended)
            sweep.display.finished(f"known, {study.best.percent} one-shot on validation")
            return study

        sweep.begin("allocation", title)
        inputs = self._inputs(sparsity, pruning)
        shared = {"dense": self._dense.weights, **inputs.order.facts}
        runs = sweep.runs(log, "allocation", shared, self._method, level=at and level, kind=OneShotRuns)
        with sweep.scratch(name) as scratch:
            run_search(self._search(name, scratch, inputs, moved), log, runs)
        best = self._best(log)
        runs.figure(
            plots.allocations(log.trials, f"{self._method}{at}: sparsity of stages and modules"),
            "allocations",
        )
        runs.figure(
            plots.trial_history(log.trials, f"{self._method}{at}: one-shot trials", self._dense.top1),
            "history",
        )
        if search.rule is not None:
            runs.figure(plots.search_front(log.trials, search.rule, best, f"{self._method}{at}"), "pareto")
        runs.figures(search_figures(log.trials, inputs.space.distributions(), f"{self._method}{at}"))
        runs.close(best)
        # last: this folder marks the search as done, with everything in MLflow
        record = {"method": self._method, "figures": {"val_top1": best.metrics["val_top1"]}, **sweep.lineage}
        task, device = sweep.task(tasks.save_one_shot)
        solved = ray.get(task.remote(inputs, best.metrics["allocation"], one_shot, record, device))
        study = Study(best, one_shot, log.ended)
        own = "failed" if study.own is None else study.own.percent
        sweep.display.finished(
            f"{len(log.ended)} trials, own {own} → best {best.percent} one-shot on validation"
            + ("" if solved is None else f", {100 * solved:.2f} % once its weights are solved again")
            + _times(best.metrics)
        )
        return study

    def _best(self, log: TrialLog) -> TrialRecord:
        rule = self._rule
        if rule is None:
            return log.best()
        if isinstance(rule, Fastest):
            return fastest(log.trials, rule)
        cost = rule.cost.removesuffix("_sparse")
        return chosen(log.trials, rule, self._sweep.lineage.get("structured", {}).get(f"dense_{cost}"))

    def _search(
        self, name: str, scratch: str, inputs: OneShotInputs, moved: Mapping[str, float] | None
    ) -> Search:
        sweep, search, space = self._sweep, self._sweep.recipe.allocation, inputs.space
        resources = {"CPU": search.cpus_per_trial, "GPU": search.gpus_per_trial}
        own = space.own_values()
        begun = own if moved is None else space.moved(moved)
        first_values = [own] if begun == own else [own, begun]
        first = search.first_images
        halving = partial(stopping, "asha", "images", first or 1, search.reduction, search.images)
        return Search(
            name=name,
            trainable=tune.with_resources(tune.with_parameters(OneShotTrial, inputs=inputs), resources),
            space=dict(space.distributions()),
            trials=max(search.trials, 1),
            concurrent=sweep.size.allocation_trials(search),
            storage=scratch,
            seed=sweep.recipe.seed,
            sampler=search.sampler,
            first=first_values,
            scheduler=Search.scheduler if first is None else halving,
            cost=None if search.rule is None else search.rule.cost,
            limits=Limits(search, "allocation"),
            fits=lambda: cluster_size().allocation_trials(search),
            reuse_actors=True,
            complete=lambda metrics: bool(metrics["complete"]),
            say=sweep.display.say,
        )

    def _inputs(self, sparsity: float, pruning: PruningSettings) -> OneShotInputs:
        search = self._sweep.recipe.allocation
        last, facts = self._rounds.leading_to(sparsity)
        if search.reach is not None:
            key, most = f"allocation.{search.between_key}", budget(facts.layers, search.reach[1])
            check_not_sparser(key, list(search.reach), facts.layers, sum(facts.pruned.values()), most)
        return OneShotInputs(
            checkpoint=last.checkpoint,
            dense=self._dense.checkpoint,
            data=self._sweep.data,
            seed=self._sweep.recipe.seed,
            search=search,
            space=AllocationSpace.of(search, pruning, facts.layers, facts.own[sparsity], facts.pruned),
            order=last.order,
            costs=facts.costs,
            reconstruct=pruning.reconstruct,
            speed=self._speed,
        )

    @property
    def _rule(self) -> Rule | None:
        return self._sweep.recipe.allocation.rule

    @cached_property
    def _table(self) -> LatencyTable | None:
        """Latency table of the serving machine; ``None`` if the search is not for speed."""
        sweep = self._sweep
        if not isinstance(self._rule, Fastest):
            return None
        target = self._rule.target
        job = latency.LatencyJob(self._dense.checkpoint, sweep.recipe.pruning, target, sweep.storage)
        file, table = latency.on_server(target, latency.LatencyJob.known, job)
        new = False
        if table is None:
            with sweep.making(f"latency/{file}", f"times of {target}"):
                table, new = latency.on_server(target, latency.LatencyJob.run, job)
        sweep.display.say(f"      {'measured' if new else 'known'}: {latency.format_times(table, target)}")
        return table

    @cached_property
    def _speed(self) -> Speed | None:
        """The table, and the top-1 (on the trials' images) of the model to which the loss is relative."""
        sweep, table = self._sweep, self._table
        if table is None:
            return None
        before = sweep.lineage.get("structured", {}).get("dense_top1")
        if before is not None:  # the loss is relative to the model before the structured step
            return Speed(table, before)
        task, device = sweep.task(tasks.measure)
        figures = task.remote(
            [self._dense.checkpoint],
            sweep.data,
            "validation",
            sweep.recipe.seed,
            device,
            most=sweep.recipe.allocation.images,
        )
        return Speed(table, ray.get(figures)[0]["top1"])


def _times(metrics: Mapping[str, Any]) -> str:
    """Latency of the chosen model for the log line; empty unless the search was for speed."""
    if "latency" not in metrics:
        return ""
    return f", {1e3 * metrics['latency_dense']:.2f} → {1e3 * metrics['latency']:.2f} ms by the table"
