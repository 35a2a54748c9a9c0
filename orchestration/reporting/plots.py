"""Figures of a sweep, drawn without a screen and without global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from orchestration.recipe.search import Rule
from orchestration.search.pareto import front, unbeaten
from orchestration.state.trial_log import TrialRecord

_SIZE = (7.0, 4.2)
_COSTS = {
    "macs": ("MACs of weights that are not zero (M)", 1e-6),
    "size": ("parameters not zero (M)", 1e-6),
    "latency": ("latency of a batch by the table (ms)", 1e3),
}  # words on an axis, and what costs are multiplied by


def allocations(trials: Sequence[TrialRecord], title: str, most: int | None = None) -> Figure:
    """Sparsity of each stage and module in every trial, best trials to the left.

    Args:
        trials: the trials; those without ``shares`` among their metrics are left out.
        title: of the figure.
        most: the largest number of trials to show, the best ones.

    Returns:
        The figure.
    """
    ranked = sorted(
        (trial for trial in trials if trial.score is not None and "shares" in trial.metrics),
        key=lambda trial: -(trial.score or 0.0),
    )[:most]
    keys = sorted({key for trial in ranked for key in trial.metrics["shares"]})
    values = [[100 * trial.metrics["shares"][key] for trial in ranked] for key in keys]
    figure = Figure((max(_SIZE[0], 0.22 * len(ranked) + 2), _SIZE[1]), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(keys)), keys)
    axes.set_xticks(
        range(len(ranked)), [f"{100 * trial.metrics['val_top1']:.1f}" for trial in ranked], rotation=90
    )
    axes.set_xlabel("validation top-1 of the trial (%), best first")
    axes.set_title(title)
    figure.colorbar(image, label="sparsity (%)")
    return figure


def trial_history(trials: Sequence[TrialRecord], title: str, dense_top1: float | None) -> Figure:
    """Validation top-1 of each trial in the order they ended, and the best so far.

    Args:
        trials: in that order.
        title: of the figure.
        dense_top1: of the dense model, in 0…1, drawn as a line.

    Returns:
        The figure.
    """
    done = [trial for trial in trials if "val_top1" in trial.metrics]
    points = [100 * trial.metrics["val_top1"] for trial in done]
    best = [max(points[: index + 1]) for index in range(len(points))]
    figure = Figure(_SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(len(points)), points, "o", label="trial")
    axes.step(range(len(best)), best, where="post", label="best so far")
    if dense_top1 is not None:
        axes.axhline(100 * dense_top1, linestyle="--", color="grey", label="dense")
    axes.set_xlabel("trial, in the order they ended")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("validation top-1 (%)")
    axes.set_title(title)
    axes.legend()
    return figure


def schedule(
    times: Sequence[float],
    sparsity: Sequence[float],
    rates: Sequence[tuple[float, float]],
    unit: str = "step",
) -> Figure:
    """Sparsity and learning rate over the steps of a run.

    Args:
        times: at which ``sparsity`` was measured, in ``unit``.
        sparsity: in 0…1.
        rates: (time, learning rate).
        unit: of the times, named on the axis.

    Returns:
        The figure.
    """
    figure = Figure(_SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.step([0, *times], [100 * sparsity[0], *(100 * value for value in sparsity)], where="pre", color="C0")
    axes.set_xlabel(unit)
    axes.set_ylabel("sparsity (%)", color="C0")
    axes.set_ylim(0, 100)
    other = axes.twinx()
    other.plot([step for step, _ in rates], [rate for _, rate in rates], color="C1")
    other.set_ylabel("learning rate", color="C1")
    axes.set_title("Sparsity and learning rate")
    return figure


def accuracy_over_sparsity(
    points: Mapping[str, Sequence[tuple[float, float]]], dense: Mapping[str, float], part: str = "validation"
) -> Figure:
    """Top-1 against sparsity, a colour for each series, dense models as lines.

    Args:
        points: (sparsity, top-1), both in 0…1, of the models of each series.
        dense: top-1 in 0…1 of dense models by name.
        part: the images that top-1 was measured on, ``validation`` or ``test``.

    Returns:
        The figure.
    """
    figure = Figure(_SIZE, layout="constrained")
    axes = figure.add_subplot()
    for name, values in points.items():
        axes.plot([100 * x for x, _ in values], [100 * y for _, y in values], "o", label=name, alpha=0.7)
    for (name, top1), style in zip(dense.items(), cycle(("--", ":", "-.")), strict=False):
        axes.axhline(100 * top1, linestyle=style, color="grey", label=name)
    axes.set_xlabel("sparsity of the prunable weights (%)")
    axes.set_ylabel(f"{part} top-1 (%)")
    axes.set_title("Accuracy against sparsity")
    axes.legend()
    return figure


def search_front(trials: Sequence[TrialRecord], rule: Rule, chosen: TrialRecord, title: str) -> Figure:
    """Validation top-1 against a cost, the front as a line, the chosen trial marked.

    Args:
        trials: of a search with two objectives.
        rule: says which metric is the cost.
        chosen: the trial that the rule chose.
        title: of the figure.

    Returns:
        The figure.
    """
    done = [trial for trial in trials if trial.state == "finished"]
    best = front(trials, rule.cost)
    words, scale = _COSTS[rule.against]
    figure = Figure(_SIZE, layout="constrained")
    axes = figure.add_subplot()
    for series, style, label in ((done, "o", "trial"), (best, ".-", "front"), ([chosen], "D", "chosen")):
        costs = [scale * trial.cost(rule.cost) for trial in series]
        axes.plot(costs, [100 * trial.metrics["val_top1"] for trial in series], style, label=label)
    axes.set_xlabel(words)
    axes.set_ylabel("validation top-1 (%)")
    axes.set_title(f"{title}: top-1 against {rule.against}")
    axes.legend()
    return figure


def pareto(
    points: Mapping[str, Sequence[tuple[float, float]]],
    cost: str = "MACs of weights that are not zero (millions)",
    scale: float = 1e-6,
) -> Figure:
    """Validation top-1 against a cost, a colour for each series; the front of all series is a line.

    Args:
        points: (cost, top-1 in 0…1) of the models of each series.
        cost: named on the axis, with its unit.
        scale: what costs are multiplied by to be in that unit.

    Returns:
        The figure.
    """
    figure = Figure(_SIZE, layout="constrained")
    axes = figure.add_subplot()
    for name, values in points.items():
        axes.plot([scale * x for x, _ in values], [100 * y for _, y in values], "o", label=name, alpha=0.5)
    everything = [point for values in points.values() for point in values]
    best = unbeaten(everything, cost=lambda point: point[0], worth=lambda point: point[1])
    axes.step([scale * x for x, _ in best], [100 * y for _, y in best], "k-", where="post", label="front")
    axes.set_xlabel(cost)
    axes.set_ylabel("validation top-1 (%)")
    axes.set_title("Accuracy against cost")
    axes.legend()
    return figure
