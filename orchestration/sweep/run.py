"""Run a sweep, from its lock to its table, with the servers and the cluster around its phases."""

from __future__ import annotations

import ray

from orchestration.cluster.capacity import check_local, check_size
from orchestration.cluster.check import check_storage
from orchestration.cluster.connect import cluster_address, connect
from orchestration.cluster.ray_internals import logs_folder
from orchestration.common.terminal import Console
from orchestration.preflight.checks import Prepared
from orchestration.preflight.training import remarks
from orchestration.recipe.phases import ALL_PHASES, PHASES, PhaseRange
from orchestration.recipe.schema import Recipe
from orchestration.reporting.display import Display
from orchestration.state.heartbeat import Heartbeat
from orchestration.state.lock import cluster_lock, local_lock
from orchestration.state.stored_recipe import folder_of
from orchestration.tracking.server import tracking_folder
from orchestration.tracking.tracker import Tracker, server_for


def run_sweep(
    prepared: Prepared,
    display: Display,
    out: Console,
    *,
    address: str | None,
    recipe_name: str,
    phase_range: PhaseRange = ALL_PHASES,
) -> None:
    """Dense → structured step → allocation, schedules, long run, INT8, export of each method → table.

    Args:
        phase_range: the phases to run; without the last one there is no table.

    Raises:
        InputError: the cluster or MLflow cannot serve the recipe, or a run of the same name is active.
        KeyboardInterrupt: after Ray, MLflow and the display have ended in order.
    """
    recipe = prepared.recipe
    local = cluster_address(address) is None
    if local:
        check_local(recipe)
    display.plan(_searches_and_runs(recipe, phase_range))
    name, root = recipe.name, folder_of(recipe.storage, recipe.name)
    with (
        local_lock(recipe.storage, name),
        server_for(recipe.tracking.uri, tracking_folder(recipe.storage)) as (uri, ready),
    ):
        # takes seconds, in which MLflow starts
        from orchestration.sweep.context import task_of
        from orchestration.sweep.phases import run_phases
        from orchestration.sweep.report import print_end
        from orchestration.sweep.tasks import warm_up

        with (
            connect(address) as size,
            cluster_lock(root, name),
            Heartbeat(recipe.storage, name, display, logs_folder()),
        ):
            check_size(recipe, size)
            warmed = []
            if local:
                for line in remarks(recipe):
                    display.say(line)
                # beside MLflow's start; on a cluster it might wait for a GPU, or have a node started for it
                warmed = [task_of(recipe.resources.of("dense"), warm_up)[0].remote()]
            else:
                check_storage(recipe.storage)
            ready()
            ray.get(warmed)  # another task would get a process of its own meanwhile
            tracker = Tracker(uri, recipe.tracking.experiment, display.say)
            try:
                ended = run_phases(prepared, display, tracker, size, phase_range)
                tracker.close("FINISHED")
            except BaseException as error:
                tracker.abandon("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
                raise
    display.close()
    if ended is None:
        go_on = f"espalier resume {name} --storage {recipe.storage}"
        out.print(
            f"done until {phase_range.last}; to go on: {go_on}", highlight=False, soft_wrap=True, markup=False
        )
    else:
        print_end(out, ended.sweep, ended.rows, ended.decisions, recipe_name)


def _searches_and_runs(recipe: Recipe, phase_range: PhaseRange) -> int:
    """Number of searches and runs, which the display counts."""
    searches, methods = len(recipe.allocated_sparsities), len(recipe.pruning.methods)
    phases = {
        "dense": 1,
        "structured": int(recipe.structured is not None),
        "allocation": methods * searches,
        "schedule": methods,
        "long_run": methods * bool(recipe.long_run),
        "quantize": methods * (recipe.quantize is not None),
        "export": methods * bool(recipe.export),
    }
    return sum(phases[phase] for phase in PHASES if phase_range.reaches(phase))
