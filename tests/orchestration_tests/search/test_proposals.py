"""What samplers are told of, and how many trials run at once, without Ray."""

from __future__ import annotations

import itertools
import json
import math
import random
import threading
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from ray import cloudpickle
from ray.tune.search import ConcurrencyLimiter

from orchestration.search import schedulers as search_schedulers
from orchestration.search.samplers import Proposals, best_and_newest, limited, population
from orchestration.search.schedulers import FollowCluster, Remembered, stopping
from orchestration.search.space import WrittenChoice
from orchestration.search.spec import Search
from orchestration.state.trial_log import TrialLog, TrialRecord
from pruners.errors import InputError

SPACE: dict[str, Any] = {"x": optuna.distributions.FloatDistribution(0.0, 1.0)}


def trials(count: int) -> list[TrialRecord]:
    chance = random.Random(0)
    return [
        TrialRecord(number, {"x": chance.random()}, "finished", chance.random() if number % 7 else None)
        for number in range(count)
    ]


def test_proposals__of_few_trials_all_are_told() -> None:
    assert best_and_newest(trials(1000)) == trials(1000)


def test_proposals__of_many_trials_the_best_and_the_newest_are_told() -> None:
    known = trials(5000)
    selected = best_and_newest(known)
    assert len(selected) == 1000
    assert [one.number for one in selected] == sorted({one.number for one in selected})
    scores = sorted((one.score for one in known if one.score is not None), reverse=True)
    assert {one.score for one in selected} >= set(scores[:100])
    assert {one.number for one in selected} >= set(range(4150, 5000))


def search(folder: Path, **options: Any) -> Search:
    return Search("test", None, SPACE, 100, 3, str(folder), seed=5, **options)


def suggested(limiter: ConcurrencyLimiter, name: str) -> float:
    values = limiter.suggest(name)
    assert values is not None
    return float(values["x"])


def test_proposals__what_is_given_comes_first_and_what_was_broken_off_before_it(tmp_path: Path) -> None:
    log = TrialLog(f"{tmp_path}/trials.json")
    log.add(TrialRecord(0, {"x": 0.25}, "finished", 0.5))
    log.begin(1, {"x": 0.75}, None)
    made = limited(Proposals(search(tmp_path, first=[{"x": 0.25}, {"x": 0.5}]), log), 3)
    assert [suggested(made, name) for name in ("a", "b")] == [0.75, 0.5]
    assert 0 <= suggested(made, "c") <= 1
    assert made.suggest("d") is None  # three at once


def test_proposals__two_objectives_reach_the_study(tmp_path: Path) -> None:
    log = TrialLog(f"{tmp_path}/trials.json")
    for number in range(20):
        value = number / 20
        log.add(TrialRecord(number, {"x": value}, "finished", value, {"macs_sparse": 100 * value}))
    made = Proposals(search(tmp_path, sampler="nsga2", cost="macs_sparse"), log)
    suggested(limited(made, 3), "a")
    study = made.study
    assert study.directions == [optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE]
    objectives = [one.values for one in study.trials if one.state.is_finished()]
    assert objectives == [[number / 20, 100 * (number / 20)] for number in range(20)]


def test_proposals__the_limit_follows_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = limited(Proposals(search(tmp_path), TrialLog(f"{tmp_path}/trials.json")), 3)
    fits = iter([5, 1, InputError("nodes", 0, "none"), 2])

    def fit() -> int:
        answer = next(fits)
        if isinstance(answer, InputError):
            raise answer
        return answer

    follow = FollowCluster(made, fit)
    follow.on_step_end(0, [])
    assert made.max_concurrent == 3  # it looks only now and then
    monkeypatch.setattr(search_schedulers, "_LOOK_SECONDS", 0.0)
    for most in (5, 1, 1, 2):
        follow.on_step_end(0, [])
        assert made.max_concurrent == most


WIDE: dict[str, Any] = {
    "x": optuna.distributions.FloatDistribution(0.0, 1.0),
    "y": optuna.distributions.FloatDistribution(1e-3, 1.0, log=True),
    "n": optuna.distributions.IntDistribution(1, 8),
}
MIXED = WIDE | {
    "c": optuna.distributions.CategoricalDistribution((None, True, "a")),
    "m": WrittenChoice(['{"kind": "hard"}', '{"kind": "soft", "weight": 0.5}']),
}
SAMPLERS = ["tpe", "random", "grid", "gp", "cmaes", "nsga2"]
AXES = (0.2, 0.4, 0.6, 0.8), (2, 4, 5, 6, 8), (None, "a")
GRID = [{"x": x, "y": 0.1, "n": n, "c": c, "m": {"kind": "hard"}} for x, n, c in itertools.product(*AXES)]
SCORES = {None: 0.1, True: 0.2, "a": 0.3}


def played(
    log: TrialLog, sampler: str, trials: int, *, at_once: int = 1, until: int | None = None, **options: Any
) -> Proposals:
    """A search without Ray: proposals are begun at once, and end in turns that their numbers decide.

    Args:
        until: it is broken off after so many ends, with all that was at work.
    """
    space = WIDE if sampler == "cmaes" else MIXED
    options |= {"first": GRID} if sampler == "grid" else {}  # all its points are given
    wanted = Search("test", None, space, trials, at_once, "", seed=5, sampler=sampler, **options)
    made = Proposals(wanted, log)
    cost = wanted.cost
    at_work: list[dict[str, Any]] = []
    ended = len(log.trials)
    while len(log.ended) < trials:
        while len(at_work) < at_once and len(log.ended) + len(at_work) < trials:
            values = made.ask(f"t{made._log.proposed}-{len(at_work)}-{ended}")
            at_work.append({"number": list(made.numbers.values())[-1], "values": values})
        now = min(at_work, key=lambda begun: (begun["number"] * 7) % 5)
        at_work.remove(now)
        values = now["values"]
        score = -((values["x"] - 0.3) ** 2) - abs(math.log(values["y"] / 0.1)) / 9 - abs(values["n"] - 5) / 9
        score += SCORES[values["c"]] + len(values["m"]) if "c" in values else 0.0
        metrics = {} if cost is None else {cost: values["x"] + values["n"]}
        log.begin(now["number"], values, None)
        made.tell(log.add(TrialRecord(now["number"], values, "finished", score, metrics)))
        ended += 1
        if until is not None and ended >= until:
            break
    return made


def listed(log: TrialLog) -> list[tuple[int, dict[str, Any], float | None]]:
    return [(record.number, record.values, record.score) for record in log.trials]


@pytest.mark.parametrize("cost", [None, "macs_sparse"])
@pytest.mark.parametrize("cheap", [True, False])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_proposals__a_search_broken_off_at_any_moment_is_the_undisturbed_one(
    sampler: str, cheap: bool, cost: str | None, tmp_path: Path
) -> None:
    """To the bit, with one trial at a time: killed four times, before or after a trial has begun."""
    if sampler == "cmaes" and cost:
        pytest.skip("knows one objective")
    trials = 12 if sampler == "gp" else 40  # gp: ten at random, and its own proposals are slow
    options: dict[str, Any] = {"cost": cost, "first": [{"x": 0.5, "y": 0.1, "n": 3, "c": True, "m": "?"}]}
    whole = TrialLog(f"{tmp_path}/whole.json", one_shot=cheap)
    played(whole, sampler, trials, **options)
    chance = random.Random(sampler)
    uri = f"{tmp_path}/killed.json"
    for kill in sorted(chance.sample(range(1, trials), 4)):
        log = TrialLog(uri, one_shot=cheap)
        made = played(log, sampler, trials, until=kill, **options)
        made.ask("lost")  # killed now
        if chance.random() < 0.5:
            log.begin(log.proposed - 1, log.broken[log.proposed - 1], None)
    log = TrialLog(uri, one_shot=cheap)
    played(log, sampler, trials, **options)
    assert listed(log) == listed(whole)
    assert len({json.dumps(record.values, sort_keys=True) for record in log.trials}) == trials


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_proposals__what_was_at_work_goes_on_with_its_proposals(sampler: str, tmp_path: Path) -> None:
    """Three at once: what had been proposed when the driver was killed is proposed again, nothing else."""
    trials, kills = (14, (4, 5, 11)) if sampler == "gp" else (36, (4, 5, 11, 20, 29))
    whole = TrialLog(f"{tmp_path}/whole.json", one_shot=True)
    played(whole, sampler, trials, at_once=3)
    uri = f"{tmp_path}/killed.json"
    for kill in kills:
        made = played(TrialLog(uri, one_shot=True), sampler, trials, at_once=3, until=kill)
        proposed = made._log.broken  # what this driver was at
        again = TrialLog(uri, one_shot=True)
        assert again.broken == proposed
        assert [*Proposals(made._search, again)._waiting] == [*proposed.items()]
    log = TrialLog(uri, one_shot=True)
    played(log, sampler, trials, at_once=3)
    assert sorted(record.number for record in log.trials) == list(range(trials))
    assert sorted(listed(log)) == sorted(listed(whole))


def generations(made: Proposals) -> list[int]:
    """Of the trials that have ended; an attempt that was tried before counts as failed."""
    key = optuna.samplers.NSGAIISampler._get_generation_key()
    return [one.system_attrs[key] for one in made.study.trials if one.state.name == "COMPLETE"]


def test_proposals__nsga2_breeds_generations_within_few_trials(tmp_path: Path) -> None:
    """The guide's example: 30 trials; Optuna's own first generation is 50 random ones."""
    assert [population(trials) for trials in (2, 4, 30, 100, 625, 10**5)] == [2, 4, 10, 20, 50, 50]
    made = played(TrialLog(f"{tmp_path}/trials.json"), "nsga2", 30, cost="macs_sparse")
    assert generations(made) == [0] * 10 + [1] * 10 + [2] * 10


def test_proposals__nsga2_keeps_its_generations_when_the_search_goes_on_with_more_trials(
    tmp_path: Path,
) -> None:
    uri = f"{tmp_path}/trials.json"
    played(TrialLog(uri), "nsga2", 12, cost="macs_sparse")
    lines: list[str] = []
    made = played(TrialLog(uri), "nsga2", 30, cost="macs_sparse", say=lines.append)
    assert generations(made) == [number // 6 for number in range(30)]
    assert lines == []


@pytest.mark.parametrize("sampler", ["cmaes", "nsga2"])
def test_proposals__a_log_whose_order_is_not_known_is_told_and_that_is_said(
    sampler: str, tmp_path: Path
) -> None:
    log = TrialLog(f"{tmp_path}/trials.json")
    for number in range(20):  # as an earlier version wrote it
        values = {"x": number / 20, "y": 0.1, "n": 3, "c": "a", "m": {"kind": "hard"}}
        log.add(TrialRecord(number, values, "finished", number / 20))
    lines: list[str] = []
    made = Proposals(Search("t", None, WIDE, 30, 1, "", 5, sampler, say=lines.append), log)
    assert len(lines) == 1
    assert f"{sampler} begins with new generations" in lines[0]
    made.ask("a")
    assert [one.value for one in made.study.trials][:20] == [number / 20 for number in range(20)]


@pytest.mark.parametrize("sampler", ["random", "nsga2"])
def test_proposals__nothing_is_tried_twice_as_long_as_there_is_more(sampler: str, tmp_path: Path) -> None:
    space = {"n": optuna.distributions.IntDistribution(1, 4), "c": MIXED["c"]}
    log = TrialLog(f"{tmp_path}/trials.json", one_shot=True)
    proposed = []
    for number in range(14):  # of twelve points
        made = Proposals(Search("t", None, space, 14, 1, "", 5, sampler), log)
        values = made.ask("a")
        made.tell(log.add(TrialRecord(number, values, "finished", values["n"])))
        proposed.append(json.dumps(values))
    assert len(set(proposed[:8])) == 8
    assert len(set(proposed)) >= 10


def test_proposals__what_is_given_lies_in_the_space(tmp_path: Path) -> None:
    """The recipe's own values, as far as they do: the rest is left to the sampler."""
    log = TrialLog(f"{tmp_path}/trials.json")
    first = [{"x": 0.25, "y": 5.0, "n": None, "c": None, "m": {"weight": 0.5, "kind": "soft"}}]
    proposal = Proposals(Search("t", None, MIXED, 9, 1, "", 5, first=first), log).ask("a")
    assert (proposal["x"], proposal["c"], proposal["m"]) == (0.25, None, {"kind": "soft", "weight": 0.5})
    assert 1e-3 <= proposal["y"] <= 1
    assert proposal["n"] in range(1, 9)
    assert [event.given for event in log.history] == [True]


def test_proposals__a_failed_trial_is_no_result_before_a_kill_and_after(tmp_path: Path) -> None:
    uri = f"{tmp_path}/trials.json"
    log = TrialLog(uri)
    made = Proposals(search(tmp_path), log)
    for number, state in enumerate(("finished", "failed")):
        values = made.ask(str(number))
        made.tell(log.add(TrialRecord(number, values, state, 0.5)))  # type: ignore[arg-type]
    again = Proposals(search(tmp_path), TrialLog(uri))
    for proposals in (made, again):
        assert [trial.value for trial in proposals.study.trials if trial.state.name == "COMPLETE"] == [0.5]


def test_proposals__a_search_of_thousands_goes_on_at_once_and_as_it_was(tmp_path: Path) -> None:
    """TPE is told the best and the newest of a round's beginning, and all since, in every life alike."""
    uri = f"{tmp_path}/trials.json"
    log = TrialLog(uri, one_shot=True)
    log.trials = trials(2300)
    log.save()
    began = time.monotonic()
    made = Proposals(search(tmp_path), TrialLog(uri))
    assert time.monotonic() - began < 5
    in_study = [one.params["x"] for one in made.study.trials]
    known = [record for record in trials(2300) if record.score is not None]
    assert in_study[-250:] == [record.values["x"] for record in known][-250:]
    assert len(in_study) < 1000 + 300
    undisturbed = Proposals(search(tmp_path), TrialLog(f"{tmp_path}/empty.json"))
    undisturbed._log.trials = list(trials(2000))
    undisturbed.begin_round()
    for record in trials(2300)[2000:]:
        undisturbed._log.ask(record.number, record.values, given=False)
        undisturbed._add(record.values, values=[record.score]) if record.score is not None else None
    assert [one.params for one in undisturbed.study.trials] == [one.params for one in made.study.trials]


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_proposals__tune_s_copy_of_a_search_leaves_the_display_out(sampler: str, tmp_path: Path) -> None:
    """A terminal's lock cannot be pickled, and Tune pickles whatever proposes and stops trials."""
    lock = threading.RLock()
    given = search(tmp_path, sampler=sampler, say=lambda text: lock.release())
    made = Proposals(given, TrialLog(str(tmp_path / "trials.json")))
    rule = stopping("asha", "epoch", 1, 2, 10)
    assert isinstance(rule, Remembered)
    rule.remember(TrialLog(str(tmp_path / "trials.json")), made.numbers, 0)
    for kept in (limited(made, 2), rule):
        assert len(cloudpickle.dumps(kept)) < 5000
