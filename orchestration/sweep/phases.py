"""The phases of a sweep, from the dense model to the registry's aliases, top to bottom."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from orchestration.cluster.capacity import ClusterSize
from orchestration.common.hashing import digest
from orchestration.common.redaction import redact
from orchestration.preflight.checks import Prepared
from orchestration.preflight.deploy import check_deployable
from orchestration.recipe.dotted_keys import flatten
from orchestration.recipe.phases import PhaseRange
from orchestration.reporting import plots
from orchestration.reporting.display import Display
from orchestration.state.stored_recipe import RESULTS, content_of, folder_of, store
from orchestration.sweep.allocation.search import allocation_phase
from orchestration.sweep.artifacts import Allocated, Results
from orchestration.sweep.context import SCRATCH, Sweep
from orchestration.sweep.dense import dense_phase
from orchestration.sweep.deploy import export_phase, quantize_phase
from orchestration.sweep.gradual import long_run_phase, schedule_phase
from orchestration.sweep.report import Row, as_json, make_rows
from orchestration.sweep.structured import structured_phase
from orchestration.tracking.lineage import RECIPE
from orchestration.tracking.promotion import Decision, settle
from orchestration.tracking.registry import Registry
from orchestration.tracking.tracker import Tracker
from trainers import storage
from trainers.checkpoint.folder import load_checkpoint
from trainers.loop.prune_step import prunable_layers


@dataclass(frozen=True)
class Ended:
    """The results of a sweep that has run all its phases, as they are printed at its end."""

    sweep: Sweep
    rows: Sequence[Row]
    decisions: Sequence[Decision]


def run_phases(
    prepared: Prepared, display: Display, tracker: Tracker, size: ClusterSize, phase_range: PhaseRange
) -> Ended | None:
    """Run the phases of a sweep.

    Args:
        prepared: the recipe, checked.
        display: shows progress.
        tracker: logs to MLflow.
        size: capacity of the cluster.
        phase_range: the phases to run.

    Returns:
        The results; ``None`` if the range ends before the last phase.

    Raises:
        InputError: a phase before the range has no result yet, or the recipe cannot run.
        RuntimeError: a phase failed: no trial finished, or too many failed.
    """
    sweep = _open(prepared, display, tracker, size, phase_range)
    results = _results(sweep)
    return None if results is None else _finish(sweep, results)


def _results(sweep: Sweep) -> Results | None:
    """Run each phase for all methods; ``None`` if the range ends before the last phase."""
    recipe, reaches = sweep.recipe, sweep.phase_range.reaches
    original = dense = dense_phase(sweep)
    if recipe.model.is_fetched:  # others were looked at before anything started
        loaded = load_checkpoint(dense.checkpoint, layers=recipe.pruning.layers)
        check_deployable(recipe, loaded.model, prunable_layers(loaded.model, recipe.pruning))
    structured = None
    if recipe.structured is not None and reaches("structured"):
        structured, facts = structured_phase(sweep, original)
        dense, sweep = structured, sweep.with_lineage({"structured": facts})
    allocated: dict[str, Allocated | None] = dict.fromkeys(recipe.pruning.methods)
    if recipe.allocated_sparsities and reaches("allocation"):
        for method in allocated:
            allocated[method] = allocation_phase(sweep, method, dense)
    if not reaches("schedule"):
        return None
    recovered = {}
    for method, given in allocated.items():
        runs = schedule_phase(sweep, method, dense, given)
        if recipe.long_run and reaches("long_run"):
            runs = long_run_phase(sweep, method, dense, given, runs)
        if reaches("long_run") or not recipe.long_run:
            recovered[method] = runs.register()
    if not recovered:
        return None
    quantized = {}
    if recipe.quantize is not None and reaches("quantize"):
        quantized = {
            method: quantize_phase(sweep, method, recovered_method)
            for method, recovered_method in recovered.items()
        }
    exported = {}
    if recipe.export and reaches("export"):
        exported = {method: export_phase(sweep, method, of_method) for method, of_method in recovered.items()}
    return Results(original, structured, allocated, recovered, quantized, exported)


def _promote(sweep: Sweep, rows: Sequence[Row]) -> list[Decision]:
    """Set the registry's aliases. They are decided on validation metrics only."""
    recipe, registry = sweep.recipe, Registry(sweep.tracker.client)
    registry.set_rule(recipe.registered_model, recipe.promotion)
    ours = {row.version for row in rows}
    versions = [version for version in registry.versions(recipe.registered_model) if version.version in ours]
    return settle(registry, versions, recipe.promotion)


def _finish(sweep: Sweep, results: Results) -> Ended:
    """Evaluate on test images, set the registry's aliases, and log the figures of the whole sweep."""
    rows = make_rows(sweep, results)
    decisions = sweep.tracker.patiently(_promote, sweep, rows)
    dense, allocated, recovered = results.dense, results.allocated, results.recovered
    series = {
        f"{method}, one shot": [trial for study in allocation.studies.values() for trial in study.trials]
        for method, allocation in allocated.items()
        if allocation is not None
    } | {f"{method}, recovered": runs.trials for method, runs in recovered.items()}
    points = {
        name: [
            (trial.metrics["sparsity"], trial.metrics["val_top1"])
            for trial in trials
            if "val_top1" in trial.metrics  # one may have been stopped before it reported
        ]
        for name, trials in series.items()
    }
    levels = {"dense": dense.top1}
    if results.structured is not None:
        levels["structured"] = results.structured.top1
    figure = plots.accuracy_over_sparsity(points, levels)
    sweep.tracker.figure(sweep.run, figure, "accuracy_over_sparsity")
    table = as_json(rows, sweep.storage)
    sweep.tracker.table(sweep.run, table, RESULTS)
    storage.write_json(f"{sweep.root}/{RESULTS}", table)
    for row in rows:
        figures = {"dense": row.dense, "recovered": row.recovered, "sparsity": row.sparsity}
        if row.int8 is not None:
            figures["int8"] = row.int8
        level = f".{100 * row.sparsity:.0f}" if row.kept else ""
        named = {f"{row.method}{level}.{row.part}.{key}": [(0, value)] for key, value in figures.items()}
        sweep.tracker.metrics(sweep.run, named)
    return Ended(sweep, rows, decisions)


def _open(
    prepared: Prepared, display: Display, tracker: Tracker, size: ClusterSize, phase_range: PhaseRange
) -> Sweep:
    recipe = prepared.recipe
    storage.remove(f"{folder_of(recipe.storage, recipe.name)}/{SCRATCH}")  # left by a killed run
    store(recipe)
    content = recipe.model_dump(mode="json", exclude={"storage", "tracking"})
    shown = redact(content)
    lineage = {
        "git_commit": git_commit(),
        "data": prepared.data_hash,
        "sweep": recipe.name,
        "recipe_digest": digest(shown),
    }
    sweep = Sweep(
        recipe=recipe,
        data=prepared.data,
        data_hash=prepared.data_hash,
        size=size,
        tracker=tracker,
        display=display,
        run="",
        lineage=lineage,
        phase_range=phase_range,
    )
    same = content_of(recipe) | {"tracking": None}  # also where a resumed one stands in another folder
    known = f"{sweep.root}/sweep-{digest(same, prepared.data_hash)}.json"
    run = storage.read_json(known)["run_id"] if storage.exists(known) else None
    if run is None or not tracker.resume(run):
        tags = sweep.tags("sweep") | {"espalier.level": "sweep", "mlflow.note.content": recipe.description}
        run = tracker.start(recipe.name, None, flatten(content), tags)
        storage.write_json(known, {"run_id": run})
    if not tracker.has(run, RECIPE):
        tracker.table(run, shown, RECIPE)
    tracker.inputs(run, sweep.datasets)
    tracker.monitor(run)
    sweep.run = run
    return sweep


def git_commit() -> str | None:
    """The git commit of the folder in which the command runs, if it is a checkout."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
