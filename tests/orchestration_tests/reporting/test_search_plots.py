"""Figures of a search, drawn from its records alone."""

from __future__ import annotations

import io
import math
import random

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from orchestration.reporting.search_plots import importance, search_figures
from orchestration.search.space import Space
from orchestration.state.trial_log import TrialRecord

SPACE: Space = {
    "recovery.lr.peak": FloatDistribution(1e-5, 1e-2, log=True),
    "pruning.schedule.steps": IntDistribution(1, 4),
    "recovery.distill.kind": CategoricalDistribution(("soft", "hard", "none")),
    "fixed": FloatDistribution(0.5, 0.5),
}


def records(count: int) -> list[TrialRecord]:
    """Trials whose score is the logarithm of one value, and hardly the others."""
    drawn = random.Random(0)
    made = []
    for number in range(count):
        rate, steps = 10 ** drawn.uniform(-5, -2), drawn.randint(1, 4)
        kind = drawn.choice(("soft", "hard", "none"))
        score = 0.9 + 0.02 * math.log10(rate) + 1e-4 * steps
        values = {"recovery.lr.peak": rate, "pruning.schedule.steps": steps, "recovery.distill.kind": kind}
        metrics = {"val_top1": score}
        made.append(TrialRecord(number, {**values, "fixed": 0.5}, "finished", score, metrics))
    return made


def size(figure: Figure) -> int:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return len(file.getvalue())


def test_search_plots__what_matters_is_the_most_important() -> None:
    shares = importance(records(40), SPACE)
    assert next(iter(shares)) == "recovery.lr.peak"
    assert shares["recovery.lr.peak"] > 0.5
    assert sum(shares.values()) == pytest.approx(1)
    assert "fixed" not in shares


@pytest.mark.parametrize("count", [2, 3, 40])
def test_search_plots__both_figures_are_drawn_and_nothing_is_left_behind(count: int) -> None:
    style = dict(plt.rcParams)
    drawn = search_figures(records(count), SPACE, "a search")
    assert "parallel_coordinates" in drawn
    assert set(drawn) <= {"importance", "parallel_coordinates"}
    assert count < 40 or len(drawn) == 2
    assert all(size(figure) > 5000 for figure in drawn.values())
    assert plt.get_fignums() == []
    assert dict(plt.rcParams) == style


def test_search_plots__the_lines_lie_between_the_ends_of_each_value() -> None:
    (axes, _) = search_figures(records(10), SPACE, "a search")["parallel_coordinates"].axes
    lines = [line for line in axes.lines if len(line.get_xdata()) == len(SPACE)]  # type: ignore[arg-type]
    assert len(lines) == 10
    assert all(0 <= height <= 1 for line in lines for height in line.get_ydata())  # type: ignore[union-attr]
    assert [label.get_text() for label in axes.get_xticklabels()] == list(SPACE)


def test_search_plots__of_many_lines_the_best_are_seen() -> None:
    (axes, _) = search_figures(records(200), SPACE, "a search")["parallel_coordinates"].axes
    lines = [line for line in axes.lines if len(line.get_xdata()) == len(SPACE)]  # type: ignore[arg-type]
    assert [line.get_alpha() for line in lines] == [0.15] * 160 + [0.8] * 40


def test_search_plots__too_little_gives_no_figure() -> None:
    two = records(2)
    assert search_figures(records(1), SPACE, "") == {}
    assert search_figures(two, {}, "") == {}
    failed = [TrialRecord(trial.number, trial.values, "failed", None) for trial in two]
    stopped = [TrialRecord(trial.number, trial.values, "stopped", 0.1, trial.metrics) for trial in two]
    elsewhere = [TrialRecord(5, {"another": 1}, "finished", 0.5, {"val_top1": 0.5})]
    assert search_figures([*failed, *stopped, two[0], *elsewhere], SPACE, "") == {}


def test_search_plots__trials_that_are_alike_have_no_importance() -> None:
    trial = records(1)[0]
    assert set(search_figures([trial, trial], SPACE, "")) == {"parallel_coordinates"}
