"""The rules that stop trials early, after a search was broken off, without Ray's cluster."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from orchestration.search.schedulers import Remembered, stopping
from orchestration.state.trial_log import TrialLog, TrialRecord

LONGEST, TRIALS = 9, 24
CONTROLLER: Any = SimpleNamespace(get_live_trials=list)


def score(number: int, epoch: int) -> float:
    """A curve of each trial's own; they cross."""
    chance = random.Random(number)
    end, haste = chance.random(), chance.uniform(0.1, 1.0)
    return end * (1 - np.exp(-haste * epoch)) + 0.02 * chance.random()


class Life:
    """One driver: trials in turns, ``at_once`` of them, until so many reports have been looked at."""

    def __init__(self, log: TrialLog, kind: str, at_once: int) -> None:
        self.log, self.at_once = log, at_once
        self.rule = stopping(kind, "epochs", 1, 2, LONGEST)
        assert isinstance(self.rule, Remembered)
        self.numbers: dict[str, int] = {}
        self.rule.remember(log, self.numbers, seed=3)
        self.decisions: dict[tuple[int, int], str] = {}

    def start(self, number: int) -> Any:
        trial = SimpleNamespace(trial_id=f"{id(self)}-{number}")  # Tune's names are others in each life
        self.numbers[trial.trial_id] = number
        if str(number) not in self.log._running:
            self.log.ask(number, {"x": number}, given=False)
        self.rule.on_trial_add(CONTROLLER, trial)
        self.log.begin(number, {"x": number}, None)
        return trial

    def run(self, looks: int = 10**6) -> bool:
        """Whether it came to the end."""
        done = {record.number for record in self.log.trials}
        # what was at work goes on from a checkpoint, and says again what it had said since
        waiting = [number for number in range(TRIALS) if number not in done]
        at_work: dict[int, tuple[Any, int]] = {}
        while waiting or at_work:
            while waiting and len(at_work) < self.at_once:
                number = waiting.pop(0)
                at_work[number] = (self.start(number), self.begun_at(number))
            number = min(at_work, key=lambda candidate: (at_work[candidate][1], candidate))
            trial, epoch = at_work[number]
            epoch += 1
            result = {"epochs": epoch, "score": score(number, epoch)}
            decision = TrialScheduler.STOP
            if epoch < LONGEST:
                decision = self.rule.on_trial_result(CONTROLLER, trial, result)
                self.decisions[number, epoch] = decision
            if decision == TrialScheduler.STOP:
                self.rule.on_trial_complete(CONTROLLER, trial, result)
                state: Any = "finished" if epoch == LONGEST else "stopped"
                self.log.add(TrialRecord(number, {"x": number}, state, result["score"], {"epoch": epoch}))
                del at_work[number]
            else:
                at_work[number] = (trial, epoch)
            looks -= 1
            if looks == 0:
                return False
        return True

    def begun_at(self, number: int) -> int:
        """The epoch of the last checkpoint: an epoch before the last that was said."""
        epochs = [rung[1] for rung in self.log._running.get(str(number), {}).get("rungs", [])]
        return max(0, int(max(epochs, default=0)) - 1)


def outcome(log: TrialLog) -> dict[int, tuple[str, int]]:
    return {record.number: (record.state, record.metrics["epoch"]) for record in log.trials}


@pytest.mark.parametrize("cheap", [True, False])
@pytest.mark.parametrize("kind", ["asha", "hyperband", "median"])
def test_schedulers__the_same_trials_are_stopped_at_the_same_time(
    kind: str, cheap: bool, tmp_path: Path
) -> None:
    """One at a time, killed a dozen times: of a cheap trial nothing is known before its end."""
    whole = TrialLog(f"{tmp_path}/whole.json", one_shot=cheap)
    assert Life(whole, kind, 1).run()
    assert {"finished", "stopped"} == {record.state for record in whole.trials}
    chance, uri, lives = random.Random(kind), f"{tmp_path}/killed.json", 0
    while not Life(TrialLog(uri, one_shot=cheap), kind, 1).run(chance.randrange(2, 2 * LONGEST)):
        lives += 1
    assert lives > 4
    assert outcome(TrialLog(uri, one_shot=cheap)) == outcome(whole)


@pytest.mark.parametrize("kind", ["asha", "hyperband", "median"])
def test_schedulers__what_was_looked_at_is_not_looked_at_again(kind: str, tmp_path: Path) -> None:
    """Three dear ones at once: the rungs hold each comparison once, with the score that it was made by."""
    uri = f"{tmp_path}/killed.json"
    chance = random.Random(kind)
    while not Life(TrialLog(uri), kind, 3).run(chance.randrange(5, 30)):
        pass
    log = TrialLog(uri)
    assert sorted(outcome(log)) == list(range(TRIALS))
    for record in log.trials:
        epochs = [time for _, time, _, _ in record.rungs]
        assert epochs == list(range(1, len(epochs) + 1))
        assert [one for _, _, one, _ in record.rungs] == [score(record.number, int(e)) for e in epochs]


def test_schedulers__halving_is_rays_own(tmp_path: Path) -> None:
    """Undisturbed, it decides as Ray's scheduler does that nobody wraps."""
    life = Life(TrialLog(f"{tmp_path}/trials.json"), "asha", 3)
    life.run()
    plain = AsyncHyperBandScheduler(
        time_attr="epochs", metric="score", mode="max", grace_period=1, reduction_factor=2, max_t=LONGEST
    )
    trials: dict[int, Any] = {}
    for event in life.log.history:
        if event.kind == "asked":
            trials[event.number] = SimpleNamespace(trial_id=str(event.number))
            plain.on_trial_add(CONTROLLER, trials[event.number])
        result = {"epochs": event.time, "score": event.score}
        if event.kind == "rung" and not event.at_end:
            decision = plain.on_trial_result(CONTROLLER, trials[event.number], result)
            assert decision == life.decisions[event.number, int(event.time)]
        elif event.ended is not None:
            last = {"epochs": event.ended.metrics["epoch"], "score": event.ended.score}
            plain.on_trial_complete(CONTROLLER, trials[event.number], last)


def test_schedulers__hyperbands_brackets_are_the_seeds(tmp_path: Path) -> None:
    """Ray draws them by NumPy's own generator, which nobody else should feel."""
    brackets = []
    for name in ("one", "two"):
        np.random.seed(len(name + name if name == "two" else name))
        before = np.random.get_state()[1][:5].tolist()
        life = Life(TrialLog(f"{tmp_path}/{name}.json"), "hyperband", 1)
        for number in range(12):
            life.start(number)
        rule: Any = life.rule
        brackets.append([rule._brackets.index(rule._trial_info[str(number)]) for number in range(12)])
        assert np.random.get_state()[1][:5].tolist() == before
    assert brackets[0] == brackets[1]
    assert len(set(brackets[0])) > 1
