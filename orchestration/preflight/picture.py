"""The schedule of a run as a picture: in a terminal, or as a PNG."""

from __future__ import annotations

from pathlib import Path

import plotext
from matplotlib.figure import Figure

from orchestration.recipe.schema import Recipe
from orchestration.reporting import plots
from trainers.loop.schedules import learning_rate, pruning_plan

_POINTS = 400


def curves(recipe: Recipe) -> tuple[list[float], list[float], list[float]]:
    """Epochs, and the sparsity and learning rate there, of a recipe's gradual run.

    Raises:
        InputError: the schedule does not fit the run.
    """
    pruning, training = recipe.pruning, recipe.recovery
    epochs = [number * training.epochs / _POINTS for number in range(_POINTS + 1)]
    plan = {}
    if pruning.schedule.unit == "epochs":  # steps are counted when the images are
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
        ("sparsity (%)", [100 * one for one in sparsities]),
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
    """The same as a PNG file."""
    epochs, sparsities, rates = curves(recipe)
    figure: Figure = plots.schedule(epochs, sparsities, list(zip(epochs, rates, strict=True)), unit="epoch")
    figure.savefig(path)
    return path
