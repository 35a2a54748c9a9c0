"""The front of two objectives, and the rules that take one of it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestration.recipe.search import Pareto
from orchestration.reporting import plots
from orchestration.search.pareto import chosen, front
from orchestration.state.trial_log import State, TrialRecord

DENSE = 1000


def trial(number: int, score: float, cost: int, state: State = "finished") -> TrialRecord:
    metrics = {"val_top1": score, "macs": DENSE, "macs_sparse": cost, "parameters_sparse": 7}
    return TrialRecord(number, {}, state, score, metrics)


TRIALS = [
    trial(0, 0.70, 400),
    trial(1, 0.72, 500),
    trial(2, 0.69, 450),  # beaten by 0 in both
    trial(3, 0.80, 900),
    trial(4, 0.72, 520),  # as good as 1, but dearer
    trial(5, 0.99, 100, "failed"),
    trial(6, 0.79, 700),
]


def test_pareto__the_front_is_what_nobody_beats() -> None:
    assert [one.number for one in front(TRIALS, "macs_sparse")] == [0, 1, 6, 3]


@pytest.mark.parametrize(
    ("rule", "taken"),
    [
        ({"tolerance": 0.0}, 3),
        ({"tolerance": 0.02}, 6),
        ({"tolerance": 0.05}, 6),
        ({"tolerance": 0.085}, 1),
        ({"tolerance": 0.5}, 0),
        ({"at_most": 1.0}, 3),
        ({"at_most": 0.7}, 6),
        ({"at_most": 0.69}, 1),
        ({"at_most": 0.4}, 0),
    ],
)
def test_pareto__rules(rule: dict[str, float], taken: int) -> None:
    assert chosen(TRIALS, Pareto.model_validate(rule)).number == taken


@pytest.mark.parametrize(("at_most", "taken"), [(0.6, 3), (0.47, 6), (0.34, 1), (0.27, 0)])
def test_pareto__shares_are_of_the_dense_model_that_was_cut_in_width_before(
    at_most: float, taken: int
) -> None:
    """It had 1,500 where the trials' own model has 1,000."""
    assert chosen(TRIALS, Pareto(at_most=at_most), 1500).number == taken


def test_pareto__nothing_so_cheap() -> None:
    with pytest.raises(RuntimeError, match=re.escape("at_most (0.3 of the dense model's macs)")) as raised:
        chosen(TRIALS, Pareto(at_most=0.3))
    assert str(raised.value).endswith("the cheapest has 0.400")


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, DENSE)), min_size=1, max_size=30))
def test_pareto__every_trial_is_on_the_front_or_beaten(points: list[tuple[float, int]]) -> None:
    on_front = {
        (one.score, one.metrics["macs_sparse"])
        for one in front([trial(number, *point) for number, point in enumerate(points)], "macs_sparse")
    }
    for score, cost in points:
        beaten = any(other != (score, cost) and other[0] >= score and other[1] <= cost for other in points)
        assert beaten != ((score, cost) in on_front)


def test_pareto__the_figure_shows_all_the_front_and_the_chosen_one() -> None:
    rule = Pareto(tolerance=0.085)
    axes = plots.search_front(TRIALS, rule, chosen(TRIALS, rule), "ovit").axes[0]
    drawn = {str(line.get_label()): list(line.get_xdata()) for line in axes.lines}
    assert len(drawn["trial"]) == 6
    assert [round(1e6 * x) for x in drawn["front"]] == [400, 500, 700, 900]
    assert [round(1e6 * x) for x in drawn["chosen"]] == [500]
