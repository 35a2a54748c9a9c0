"""What ``--dry-run`` shows: the layers matched, the budget, the trials, the resources."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from orchestration.checks import Prepared
from orchestration.tracking import without_password
from trainers.schedules import pruning_epochs, step_sparsities


def print_plan(console: Console, prepared: Prepared) -> None:
    """Print the plan; nothing is started."""
    recipe = prepared.recipe
    if prepared.layers:
        table = Table(title=f"{recipe.name}: prunable layers", title_justify="left")
        for heading in ("layer", "module", "stage", "shape"):
            table.add_column(heading)
        table.add_column("weights", justify="right")
        for layer in prepared.layers:
            shape = "×".join(map(str, layer.shape))
            table.add_row(layer.name, layer.module, str(layer.stage), shape, f"{layer.numel:,}")
        console.print(table)
    for key, value in _lines(prepared):
        console.print(f"{key + ':':<12}{value}", highlight=False, soft_wrap=True, markup=False)


def _lines(prepared: Prepared) -> list[tuple[str, str]]:
    recipe = prepared.recipe
    pruning, resources = recipe.pruning, recipe.resources
    total = sum(layer.numel for layer in prepared.layers)
    model = recipe.model.architecture or recipe.model.checkpoint
    lines = [("model", f"{model}, {recipe.model.classes} classes")]
    data = recipe.data.source or ", ".join(
        f"{part} {uri}" for part in ("train", "validation", "test") if (uri := getattr(recipe.data, part))
    )
    absent = f" (not on this machine: {', '.join(prepared.missing)})" if prepared.missing else ""
    lines.append(("data", data + absent))
    dense = f"train for {recipe.dense.epochs} epochs" if recipe.dense else "given"
    lines.append(("dense", dense))
    if prepared.layers:
        lines.append(("budget", f"{prepared.pruned:,} of {total:,} weights in {len(prepared.layers)} layers"))
    else:
        lines.append(("budget", f"{100 * pruning.sparsity:g} % of what the fetched model holds"))
    if prepared.costs is not None:
        costs = prepared.costs
        lines.append(
            (
                "costs",
                f"{costs.parameters:,} → {costs.parameters_sparse:,} parameters, "
                f"{costs.macs:,} → about {costs.macs_sparse:,} MACs (at a uniform sparsity)",
            )
        )
    epochs = pruning_epochs(pruning.schedule, recipe.recovery.epochs)
    steps = step_sparsities(pruning.schedule, pruning.sparsity)
    raises = ", ".join(f"{100 * s:.4g} % at epoch {e}" for e, s in zip(epochs, steps, strict=True))
    lines.append(("schedule", f"{raises}; {recipe.recovery.epochs} epochs, {recipe.recovery.lr.kind} LR"))
    methods = " and ".join(pruning.methods)
    lines.append(
        (
            "trials",
            f"{recipe.allocation.trials} allocations and {recipe.schedule.runs} gradual runs "
            f"for each of {methods}",
        )
    )
    gpus = f" and {resources.gpus_per_worker:g} GPU" if resources.gpus_per_worker else ""
    lines.append(
        ("resources", f"{resources.workers} workers of {resources.cpus_per_worker:g} CPU{gpus} a gradual run")
    )
    lines.append(("storage", recipe.storage))
    uri = recipe.tracking.uri
    lines.append(("tracking", without_password(uri) if uri else "an MLflow server of our own, on loopback"))
    return lines
