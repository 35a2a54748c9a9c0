"""The plan of a recipe, shown by ``--dry-run``: layers, budget, trials, resources."""

from __future__ import annotations

from pathlib import Path

import plotext
from matplotlib.figure import Figure
from rich.table import Table

from orchestration.common.terminal import Console
from orchestration.preflight.checks import Prepared
from orchestration.recipe.schema import Recipe
from orchestration.recipe.search import Fastest
from orchestration.reporting import plots
from pruners.arithmetic import ceil_div
from pruners.elimination.memory import fisher_bytes, layer_groups
from pruners.methods.registry import SECOND_ORDER, create_pruner
from pruners.redaction import strip_secrets
from trainers.loop.schedules import learning_rate, pruning_plan


def print_plan(console: Console, prepared: Prepared, *, picture: bool = False) -> None:
    """Print the plan; nothing is started.

    Args:
        console: to print on.
        prepared: the recipe, checked.
        picture: with the schedule in characters, and what the run will need.
    """
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
    lines = _lines(prepared)
    if picture:
        pass

        console.print(terminal(recipe, console.width), highlight=False, markup=False)
        lines += _needs(prepared)
    for key, value in lines:
        line = strip_secrets(f"{key + ':':<13}{value}")
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _lines(prepared: Prepared) -> list[tuple[str, str]]:
    recipe = prepared.recipe
    pruning, resources = recipe.pruning, recipe.resources
    total = sum(layer.numel for layer in prepared.layers)
    model = recipe.model.architecture or recipe.model.checkpoint
    if recipe.model.architecture is not None and recipe.model.checkpoint is not None:
        model = f"{model} with the weights of {recipe.model.checkpoint}"
    lines = [("model", f"{model}, {recipe.model.classes} classes")]
    data = recipe.data.source or ", ".join(
        f"{part} {uri}" for part in ("train", "validation", "test") if (uri := getattr(recipe.data, part))
    )
    absent = f" (not on this machine: {', '.join(prepared.missing)})" if prepared.missing else ""
    lines.append(("data", data + absent))
    dense = f"train for {recipe.dense.epochs} epochs" if recipe.dense else "given"
    lines.append(("dense", dense))
    lines += _structured(prepared)
    if prepared.layers:
        lines.append(("budget", f"{prepared.pruned:,} of {total:,} weights in {len(prepared.layers)} layers"))
        lines.append(("left dense", f"{prepared.dense} (pruning.layers takes others)"))
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
    lines.append(("schedule", _schedule(recipe)))
    methods = " and ".join(pruning.methods)
    lines.append(
        (
            "trials",
            f"{recipe.allocation.trials} allocations and {recipe.schedule.runs} gradual runs "
            f"for each of {methods}",
        )
    )
    lines += _more(recipe)
    gpus = f" and {resources.gpus_per_worker:g} GPU" if resources.gpus_per_worker else ""
    lines.append(
        ("resources", f"{resources.workers} workers of {resources.cpus_per_worker:g} CPU{gpus} a gradual run")
    )
    lines.append(("storage", recipe.storage))
    uri = recipe.tracking.uri
    lines.append(("tracking", uri or "an MLflow server of our own, on loopback"))
    return lines


def _structured(prepared: Prepared) -> list[tuple[str, str]]:
    """The structured step, if the recipe has one: widths, counts, recovery."""
    settings, cut = prepared.recipe.structured, prepared.cut
    if settings is None:
        return []
    training = settings.recovery
    rest = f"by {settings.importance}, " + (f"{training.epochs} epochs" if training else "no recovery")
    if cut is None:
        return [("structured", f"widths of the fetched model; {rest}")]
    counts = (
        f"{cut.dense.parameters:,} → {cut.costs.parameters:,} parameters, "
        f"{cut.dense.macs:,} → {cut.costs.macs:,} MACs"
    )
    if settings.objective == "latency":
        choices = f"{len(settings.candidates)} on {settings.serves}"
        rule = f"the fastest of {choices} that loses at most {settings.loss:g}"
        return [("structured", f"{rule}; {rest}"), ("the first", f"{cut}; {counts} (as all below)")]
    return [("structured", f"{cut}; {counts}; {rest}")]


def _more(recipe: Recipe) -> list[tuple[str, str]]:
    """Optional parts that the recipe asks for: rounds, reconstruction, a second objective, long run, INT8."""
    lines, rule = _rounds(recipe), recipe.allocation.rule
    if rule is not None and recipe.allocation.trials:
        reach = f" from {rule.between[0]:g} to {rule.between[1]:g}" if rule.between else ""
        if isinstance(rule, Fastest):
            taken = (
                f"on {rule.target}; the fastest that loses at most {rule.loss:g} of the dense model's top-1"
            )
        elif rule.tolerance is not None:
            taken = f"the cheapest within {rule.tolerance:g} of the best top-1"
        else:
            taken = f"the best within {rule.at_most:g} of the dense model's"
        sign = " " if isinstance(rule, Fastest) else "; "
        lines.append(("objectives", f"top-1 against {rule.against}{reach}{sign}{taken}"))
    if recipe.long_run:
        changed = ", ".join(f"{key}={value}" for key, value in recipe.long_run.items())
        lines.append(("long run", f"the best gradual run's values, and {changed}"))
    if recipe.quantize is not None:
        training = recipe.quantize.training
        length = f", {training.epochs} epochs, zeros held" if training is not None else ""
        lines.append(("INT8", f"{recipe.quantize.mode}{length}"))
    if recipe.export:
        lines.append(("export", ", ".join(recipe.export)))
    return lines


def _rounds(recipe: Recipe) -> list[tuple[str, str]]:
    """The rounds of one-shot pruning, and the number of images for the reconstruction after each."""
    pruning, lines = recipe.pruning, []
    second_order = [method for method in pruning.methods if method in SECOND_ORDER]
    end = pruning.sparsity if recipe.allocation.reach is None else recipe.allocation.reach[0]
    levels = pruning.rounds(second_order[0], 0.0, end) if second_order else []
    if len(levels) > 1:
        shown = ", ".join(f"{100 * level:.4g} %" for level in levels)
        lines.append(("rounds", f"{shown} for each of {' and '.join(second_order)}"))
    if pruning.reconstruct:
        trials = recipe.allocation.reconstruct
        rest = f", and on {trials:,} in each trial" if trials else ""
        lines.append(("reconstruct", f"on {pruning.reconstruct:,} images after each pruning step{rest}"))
    return lines


def _schedule(recipe: Recipe) -> str:
    schedule, training = recipe.pruning.schedule, recipe.recovery
    end = f"{training.epochs} epochs, {training.lr.kind} LR"
    if schedule.unit == "steps":
        return f"{schedule.kind}, by steps; {end}"
    plan = pruning_plan(schedule, recipe.pruning.sparsity, training.epochs)
    raises = ", ".join(f"{100 * sparsity:.4g} % at epoch {epoch}" for epoch, sparsity in plan.items())
    return f"{raises or 'zeros held'}; {end}"


def _needs(prepared: Prepared) -> list[tuple[str, str]]:
    """Memory of the Fisher on each worker, and the number of checkpoints that the run will write."""
    recipe, lines = prepared.recipe, []
    pruning, training = recipe.pruning, recipe.recovery
    for method in pruning.methods:
        fisher = create_pruner(method, **pruning.options(method)).fisher(prepared.layers)
        if fisher is None or not prepared.layers:
            continue
        number = 8 if pruning.fisher.double else 4
        sizes = {layer.name: fisher.block_size(layer.name) for layer in prepared.layers}
        whole = sum(fisher_bytes(layer, sizes[layer.name], number) for layer in prepared.layers)
        memory = f"{whole / 1e9:.2f} GB on each worker"
        if pruning.fisher.memory is not None:
            groups = layer_groups(prepared.layers, sizes, pruning.fisher.memory, number)
            memory += f", in {len(groups)} passes within {pruning.fisher.memory / 1e9:.2f} GB"
        lines.append(("Fisher", f"{method}: {memory}"))
    count = ceil_div(training.epochs, training.checkpoint_every)
    between = [f"every {training.checkpoint_minutes:g} minutes"] if training.checkpoint_minutes else []
    between += [f"every {training.checkpoint_steps} steps"] if training.checkpoint_steps else []
    within = f", and within epochs {' and '.join(between)}" if between else ""
    kept = ", ".join(f"{100 * sparsity:g} %" for sparsity in sorted({*pruning.keep, pruning.sparsity}))
    lines.append(("checkpoints", f"{count} at the ends of epochs{within}; the best is kept at {kept}"))
    return lines


_POINTS = 400


def curves(recipe: Recipe) -> tuple[list[float], list[float], list[float]]:
    """Epochs, and the sparsity and learning rate there, of a recipe's gradual run.

    Raises:
        InputError: the schedule does not fit the run.
    """
    pruning, training = recipe.pruning, recipe.recovery
    epochs = [number * training.epochs / _POINTS for number in range(_POINTS + 1)]
    plan = {}
    if pruning.schedule.unit == "epochs":  # steps are known when the images are counted
        plan = pruning_plan(pruning.schedule, pruning.sparsity, training.epochs)
    held = pruning.sparsity if pruning.schedule.kind == "constant" else 0.0
    sparsities = [max((s for at, s in plan.items() if at <= epoch), default=held) for epoch in epochs]
    rates = [
        learning_rate(training.lr, min(epoch, training.epochs * (1 - 1e-9)), training.epochs, list(plan))
        for epoch in epochs
    ]
    return epochs, sparsities, rates


def terminal(recipe: Recipe, width: int) -> str:
    """Sparsity and learning rate over the epochs, in characters."""
    epochs, sparsities, rates = curves(recipe)
    parts = []
    for title, values in (
        ("sparsity (%)", [100 * sparsity for sparsity in sparsities]),
        ("learning rate", rates),
    ):
        plotext.clear_figure()
        plotext.theme("clear")
        plotext.plot_size(min(width, 90), 9)
        plotext.plot(epochs, values, marker="braille")
        if title.startswith("sparsity"):
            plotext.ylim(0, 100)
        plotext.title(f"{title} over {recipe.recovery.epochs} epochs")
        parts.append(plotext.uncolorize(plotext.build()))
    return "\n".join(parts)


def png(recipe: Recipe, path: Path) -> Path:
    """Write sparsity and learning rate over the epochs as a PNG file."""
    epochs, sparsities, rates = curves(recipe)
    figure: Figure = plots.schedule(epochs, sparsities, list(zip(epochs, rates, strict=True)), unit="epoch")
    figure.savefig(path)
    return path
