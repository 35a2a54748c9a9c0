"""What samplers are told of, and how many trials run at once, without Ray."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import optuna
import pytest
from ray.tune.search import ConcurrencyLimiter

from orchestration import elastic
from orchestration.elastic import FollowCluster
from orchestration.search import Search
from orchestration.search_proposals import proposals, telling
from orchestration.trial_log import TrialLog, TrialRecord
from pruners.errors import InputError

SPACE: dict[str, Any] = {"x": optuna.distributions.FloatDistribution(0.0, 1.0)}


def trials(count: int) -> list[TrialRecord]:
    chance = random.Random(0)
    return [
        TrialRecord(number, {"x": chance.random()}, "finished", chance.random() if number % 7 else None)
        for number in range(count)
    ]


def test_of_few_trials_all_are_told() -> None:
    assert telling(trials(1000)) == trials(1000)


def test_of_many_trials_the_best_and_the_newest_are_told() -> None:
    known = trials(5000)
    told = telling(known)
    assert len(told) == 1000
    assert [one.number for one in told] == sorted({one.number for one in told})
    scores = sorted((one.score for one in known if one.score is not None), reverse=True)
    assert {one.score for one in told} >= set(scores[:100])
    assert {one.number for one in told} >= set(range(4150, 5000))


def search(folder: Path, **options: Any) -> Search:
    return Search("test", None, SPACE, 100, 3, str(folder), seed=5, **options)


def suggested(limiter: ConcurrencyLimiter, name: str) -> float:
    found = limiter.suggest(name)
    assert found is not None
    return float(found["x"])


def test_what_is_given_comes_first_and_what_was_broken_off_before_it(tmp_path: Path) -> None:
    log = TrialLog(f"{tmp_path}/trials.json")
    log.add(TrialRecord(0, {"x": 0.25}, "finished", 0.5))
    log.begin(1, {"x": 0.75}, None)
    made = proposals(search(tmp_path, first=[{"x": 0.25}, {"x": 0.5}]), log)
    assert made is not None
    assert [suggested(made, name) for name in ("a", "b")] == [0.75, 0.5]
    assert 0 <= suggested(made, "c") <= 1
    assert made.suggest("d") is None  # three at once


def test_two_objectives_reach_the_study(tmp_path: Path) -> None:
    log = TrialLog(f"{tmp_path}/trials.json")
    for number in range(20):
        value = number / 20
        log.add(TrialRecord(number, {"x": value}, "finished", value, {"macs_sparse": 100 * value}))
    made = proposals(search(tmp_path, sampler="nsga2", cost="macs_sparse"), log)
    assert made is not None
    suggested(made, "a")
    study = made.searcher._ot_study
    assert study.directions == [optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE]
    told = [one.values for one in study.trials if one.state.is_finished()]
    assert told == [[number / 20, 100 * (number / 20)] for number in range(20)]


def test_the_limit_follows_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = proposals(search(tmp_path), TrialLog(f"{tmp_path}/trials.json"))
    assert made is not None
    fits = iter([5, 1, InputError("nodes", 0, "none"), 2])

    def fit() -> int:
        found = next(fits)
        if isinstance(found, InputError):
            raise found
        return found

    follow = FollowCluster(made, fit)
    follow.on_step_end(0, [])
    assert made.max_concurrent == 3  # it looks only now and then
    monkeypatch.setattr(elastic, "_LOOK_SECONDS", 0.0)
    for most in (5, 1, 1, 2):
        follow.on_step_end(0, [])
        assert made.max_concurrent == most
