"""Two objectives: the Pareto front of the trials, and the trial that the recipe's rule chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from orchestration.recipe.search import Fastest, Pareto
from orchestration.state.trial_log import TrialRecord

T = TypeVar("T")
_ROUNDING = 1e-9


def unbeaten(items: Sequence[T], *, cost: Callable[[T], float], worth: Callable[[T], float]) -> list[T]:
    """The Pareto front: items for which no other item is both cheaper and better; of equal items the first.

    Args:
        items: any objects.
        cost: the cost of an item, which is minimised.
        worth: the worth of an item, which is maximised.

    Returns:
        The items by ascending cost, and so by ascending worth.
    """
    front: list[T] = []
    for item in sorted(items, key=lambda item: (cost(item), -worth(item))):
        if not front or worth(item) > worth(front[-1]):
            front.append(item)
    return front


def front(trials: Sequence[TrialRecord], cost: str) -> list[TrialRecord]:
    """The finished trials on the Pareto front, by ascending cost.

    Args:
        trials: the trials of a search.
        cost: the metric that is minimised.
    """
    done = [trial for trial in trials if trial.state == "finished" and trial.score is not None]
    return unbeaten(done, cost=lambda item: item.cost(cost), worth=lambda item: item.score or 0.0)


def chosen(trials: Sequence[TrialRecord], rule: Pareto, whole: float | None = None) -> TrialRecord:
    """The trial on the front that the rule chooses.

    Args:
        trials: the trials of a search.
        rule: the recipe's rule.
        whole: cost of the dense model, if the trials prune a model that was cut in width before.

    Raises:
        RuntimeError: no trial has finished, or none is as cheap as the rule asks.
    """
    best = front(trials, rule.cost)
    if not best:
        raise RuntimeError("no trial ran to its end")
    if rule.tolerance is not None:
        least = best[-1].metrics["val_top1"] - rule.tolerance
        return next(trial for trial in best if trial.metrics["val_top1"] >= least)
    assert rule.at_most is not None, "a rule has one of the two"
    cheap = [trial for trial in best if _share(trial, rule, whole) <= rule.at_most]
    if not cheap:
        raise RuntimeError(
            f"no trial is as cheap as allocation.pareto.at_most ({rule.at_most:g} of the dense model's "
            f"{rule.against}) asks; the cheapest has {_share(best[0], rule, whole):.3f}"
        )
    return cheap[-1]


def _share(trial: TrialRecord, rule: Pareto, whole: float | None) -> float:
    """A trial's cost as a share of the dense model's."""
    return trial.cost(rule.cost) / (whole or trial.cost(rule.cost.removesuffix("_sparse")))


def fastest(trials: Sequence[TrialRecord], rule: Fastest) -> TrialRecord:
    """The front's fastest trial that loses at most ``rule.loss`` of the dense model's top-1.

    Raises:
        RuntimeError: no trial has finished, or all lose more; names the loss of the nearest.
    """
    best = front(trials, rule.cost)
    if not best:
        raise RuntimeError("no trial ran to its end")
    losses = [1 - trial.metrics["val_top1"] / max(trial.metrics["dense_top1"], 1e-12) for trial in best]
    for trial, loss in zip(best, losses, strict=True):
        if loss <= rule.loss + _ROUNDING:
            return trial
    raise RuntimeError(
        f"no trial is within allocation.loss ({rule.loss:g} of the dense model's top-1); the nearest loses "
        f"{losses[-1]:.3f}, at {best[-1].cost(rule.cost) * 1e3:.2f} ms"
    )
