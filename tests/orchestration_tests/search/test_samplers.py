"""Every sampler and every way of stopping early goes through a whole search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from helpers import Quiet
from ray import tune

from orchestration.search.runner import run_search
from orchestration.search.schedulers import stopping
from orchestration.search.spec import Search
from orchestration.state.trial_log import TrialLog, TrialRecord

SPACE = {name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in ("x", "y")}
BEST = {"x": 0.25, "y": 0.75}
TRIALS = 12


class Bowl(tune.Trainable):  # type: ignore[misc]
    """Three steps, each nearer to what the proposal is worth."""

    def setup(self, config: dict[str, float]) -> None:
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, float]) -> bool:
        self._values, self._done = new_config, 0
        return True

    def step(self) -> dict[str, Any]:
        self._done += 1
        worth = 1 - sum((self._values[key] - BEST[key]) ** 2 for key in BEST)
        done = self._done == 3
        return {"score": worth - 0.01 / self._done, "images": self._done, "complete": done, "done": done}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        return None

    def load_checkpoint(self, checkpoint: Any) -> None:
        return None


class TwoGoals(Bowl):
    """What is good at one goal costs at the other."""

    def step(self) -> dict[str, Any]:
        return {**super().step(), "cost": 100 * self._values["x"]}


def searched(folder: Path, *, trials: int = TRIALS, **changes: Any) -> list[TrialRecord]:
    log = TrialLog(f"{folder}/trials.json", one_shot=True)
    search = Search(
        name="bowl",
        trainable=tune.with_resources(changes.pop("trainable", Bowl), {"CPU": 1}),
        space=dict(SPACE),
        trials=trials,
        concurrent=1,
        storage=f"{folder}/tune",
        seed=3,
        first=[{"x": 0.5, "y": 0.5}],
        reuse_actors=True,
        complete=lambda metrics: bool(metrics["complete"]),
        **changes,
    )
    run_search(search, log, Quiet())
    return log.trials


@pytest.mark.cluster
@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes", "gp", "nsga2"])
def test_samplers__a_sampler_proposes_the_same_for_a_seed_and_begins_with_what_is_given(
    sampler: str, tune_here: None, tmp_path: Path
) -> None:
    first, second = (searched(tmp_path / name, sampler=sampler) for name in ("one", "two"))
    assert [record.values for record in first] == [record.values for record in second]
    assert first[0].values == {"x": 0.5, "y": 0.5}
    assert first[0].given
    assert len({tuple(record.values.items()) for record in first}) == TRIALS
    assert all(0 <= value <= 1 for record in first for value in record.values.values())


@pytest.mark.cluster
@pytest.mark.parametrize("sampler", ["tpe", "random", "gp", "nsga2"])
def test_samplers__two_objectives_are_both_told_to_the_sampler(
    sampler: str, tune_here: None, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"sampler": sampler, "trainable": TwoGoals, "cost": "cost"}
    before = searched(tmp_path, trials=6, **options)
    records = searched(tmp_path, trials=TRIALS, **options)  # goes on with what is known of both
    assert records[:6] == before
    assert len(records) == TRIALS
    assert {record.state for record in records} == {"finished"}
    assert all(record.metrics["cost"] == 100 * record.values["x"] for record in records)


@pytest.mark.cluster
def test_samplers__a_search_goes_on_where_it_was(tune_here: None, tmp_path: Path) -> None:
    before = searched(tmp_path, trials=5)
    after = searched(tmp_path, trials=9)
    assert after[:5] == before
    assert [record.number for record in after] == list(range(9))
    assert len({tuple(record.values.items()) for record in after}) == 9


@pytest.mark.cluster
@pytest.mark.parametrize("kind", ["asha", "hyperband", "median"])
def test_samplers__the_worse_are_stopped_early(kind: str, tune_here: None, tmp_path: Path) -> None:
    records = searched(tmp_path, scheduler=lambda: stopping(kind, "images", 1, 2, 3), sampler="random")
    states = {record.state for record in records}
    assert len(records) == TRIALS
    assert states <= {"finished", "stopped"}
    assert "finished" in states
    if kind != "hyperband":  # it may put all of so few into brackets that begin late
        assert "stopped" in states
        score = {
            record.number: 1 - sum((record.values[k] - BEST[k]) ** 2 for k in BEST) for record in records
        }
        stopped = [score[record.number] for record in records if record.state == "stopped"]
        finished = [score[record.number] for record in records if record.state == "finished"]
        assert sum(finished) / len(finished) > sum(stopped) / len(stopped)


class Broken(Bowl):
    def setup(self, config: dict[str, float]) -> None:
        raise MemoryError("no room for the model")


@pytest.mark.cluster
def test_samplers__a_trial_that_cannot_even_begin_has_failed(tune_here: None, tmp_path: Path) -> None:
    log = TrialLog(f"{tmp_path}/trials.json")
    search = Search(
        name="broken",
        trainable=tune.with_resources(Broken, {"CPU": 1}),
        space=dict(SPACE),
        trials=2,
        concurrent=1,
        storage=f"{tmp_path}/tune",
        seed=0,
    )
    run_search(search, log, Quiet())
    with pytest.raises(RuntimeError, match=r"no trial ran to its end: .*no room for the model"):
        log.best()
    assert [record.state for record in log.trials] == ["failed", "failed"]
