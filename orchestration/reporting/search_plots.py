"""Figures of a search: the importance of each searched value, and the values of all trials as lines."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from optuna.distributions import BaseDistribution, CategoricalDistribution

from orchestration.search.space import Space, contains, to_optuna
from orchestration.state.trial_log import TrialRecord

_SIZE = (7.0, 4.2)
_STRONG = 40  # trials whose lines can be told apart


def search_figures(records: Sequence[TrialRecord], space: Space, title: str) -> dict[str, Figure]:
    """``importance`` and ``parallel_coordinates`` of the finished trials.

    Args:
        records: the trials.
        space: the searched keys and their distributions.
        title: of the figures.

    Returns:
        The figures by name. There are none for fewer than two trials or an empty space, and no importance if
        all scores are equal.
    """
    done = [record for record in records if _counts(record) and contains(space, record.values)]
    if len(done) < 2 or not space:
        return {}
    shares = importance(done, space)
    drawn = {"importance": _bars(shares, title)} if shares else {}
    return drawn | {"parallel_coordinates": _lines(done, space, title)}


def importance(records: Sequence[TrialRecord], space: Space) -> dict[str, float]:
    """The importance of each searched value for the score, by Optuna's PED-ANOVA.

    The study is rebuilt from the records, because the study that proposed the trials is not kept.

    Returns:
        Shares by key, which add up to 1; empty if no value matters, or all scores are equal.
    """
    searched = {key: distribution for key, distribution in space.items() if not distribution.single()}
    study = optuna.create_study(direction="maximize")
    for record in records:
        values = to_optuna(searched, record.values)
        study.add_trial(optuna.create_trial(params=values, distributions=searched, value=record.score))
    if not searched or len({record.score for record in records}) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        importances = optuna.importance.get_param_importances(study, normalize=False)
    total = sum(importances.values())
    return {key: value / total for key, value in importances.items()} if total > 0 else {}


def _counts(record: TrialRecord) -> bool:
    return record.state == "finished" and record.score is not None and math.isfinite(record.score)


def _bars(shares: dict[str, float], title: str) -> Figure:
    figure = Figure((_SIZE[0], max(_SIZE[1], 0.28 * len(shares) + 1.2)), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(list(shares), [100 * share for share in shares.values()])
    axes.bar_label(bars, fmt="%.0f %%", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("importance (%)")
    axes.set_title(title)
    return figure


def _lines(records: Sequence[TrialRecord], space: Space, title: str) -> Figure:
    """A line for each trial through its values, coloured by accuracy; of many, the best are drawn on top."""
    figure = Figure((max(_SIZE[0], 0.9 * len(space) + 2), _SIZE[1] + 0.8), layout="constrained")
    axes = figure.add_subplot()
    ranked = sorted(records, key=lambda record: record.metrics["val_top1"])
    top1 = np.array([100 * record.metrics["val_top1"] for record in ranked])
    scale = ScalarMappable(Normalize(top1.min(), top1.max()), "viridis")
    colours = scale.to_rgba(top1)
    for left, (record, colour) in enumerate(zip(ranked, colours, strict=True), start=-len(ranked)):
        values = to_optuna(space, record.values)
        heights = [_height(distribution, values[key]) for key, distribution in space.items()]
        alpha, width = (0.8, 1.5) if -left <= _STRONG else (0.15, 0.7)
        axes.plot(heights, color=colour, alpha=alpha, linewidth=width)
    for position, distribution in enumerate(space.values()):
        axes.axvline(position, color="lightgrey", zorder=0)
        for height, text in _marks(distribution):
            axes.annotate(
                text, (position, height), (3, 0), textcoords="offset points", fontsize=7, va="center"
            )
    axes.set_xticks(range(len(space)), list(space), rotation=30, ha="right")
    axes.set_yticks([])
    axes.set_title(title)
    figure.colorbar(scale, ax=axes, label="validation top-1 (%)")
    return figure


def _height(distribution: BaseDistribution, value: Any) -> float:
    """Position of a value between the ends of its distribution, 0…1."""
    if isinstance(distribution, CategoricalDistribution):
        return float(distribution.choices.index(value) / max(len(distribution.choices) - 1, 1))
    low, high = distribution.low, distribution.high
    if distribution.log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return float((value - low) / (high - low)) if high > low else 0.5


def _marks(distribution: BaseDistribution) -> list[tuple[float, str]]:
    if isinstance(distribution, CategoricalDistribution):
        return [(_height(distribution, choice), str(choice)) for choice in distribution.choices]
    return [(_height(distribution, end), f"{end:.4g}") for end in {distribution.low, distribution.high}]
