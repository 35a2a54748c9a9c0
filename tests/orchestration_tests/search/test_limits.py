"""A trial that hangs is ended, a search whose trials fail is given up; both go on where they were."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from helpers import Quiet
from ray import tune

from orchestration.recipe.search import SearchLimits
from orchestration.search.limits import Limits
from orchestration.search.runner import run_search
from orchestration.search.spec import Search
from orchestration.state.trial_end import reason
from orchestration.state.trial_log import TrialLog, TrialRecord

SPACE = {"x": optuna.distributions.FloatDistribution(0.0, 1.0)}
HANGS, FAILS = 0.125, 0.25


class Trial(tune.Trainable):  # type: ignore[misc]
    """Hangs, fails or does well, as its proposal says."""

    def setup(self, config: dict[str, float]) -> None:
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, float]) -> bool:
        self._x = new_config["x"]
        return True

    def step(self) -> dict[str, Any]:
        if self._x == HANGS:
            time.sleep(3600)
        if self._x == FAILS:
            raise ValueError("no such layer")
        return {"score": self._x, "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        return None

    def load_checkpoint(self, checkpoint: Any) -> None:
        return None


def run(folder: Path, first: list[float], trials: int, **limits: float) -> list[TrialRecord]:
    log = TrialLog(f"{folder}/trials.json", one_shot=True)
    search = Search(
        name="limits",
        trainable=tune.with_resources(Trial, {"CPU": 1}),
        space=dict(SPACE),
        trials=trials,
        concurrent=1,
        storage=f"{folder}/tune",
        seed=3,
        first=[{"x": x} for x in first],
        limits=Limits(SearchLimits.model_validate(limits), "allocation"),
        reuse_actors=True,
    )
    run_search(search, log, Quiet())
    return log.trials


@pytest.mark.cluster
def test_limits__a_trial_that_hangs_has_failed_after_its_time(tune_here: None, tmp_path: Path) -> None:
    began = time.monotonic()
    records = run(tmp_path, [0.5, HANGS, 0.75], trials=4, trial_minutes=0.1)
    assert time.monotonic() - began < 100
    assert [record.state for record in records] == ["finished", "failed", "finished", "finished"]
    assert records[1].error == "no end after 0.1 minutes (allocation.trial_minutes)"
    assert 6 <= records[1].seconds < 20


@pytest.mark.cluster
def test_limits__a_trial_that_fails_is_marked_and_the_search_goes_on(tune_here: None, tmp_path: Path) -> None:
    records = run(tmp_path, [0.5, FAILS, 0.75], trials=4, failures=0.25)
    assert [record.state for record in records] == ["finished", "failed", "finished", "finished"]
    assert "no such layer" in str(records[1].error)


@pytest.mark.cluster
def test_limits__too_many_failures_end_the_search(tune_here: None, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as raised:
        run(tmp_path, [0.5, FAILS, FAILS, 0.75, 0.875], trials=8, failures=0.2)
    message = str(raised.value)
    assert message.startswith("2 of 8 trials failed, more than allocation.failures (0.2) allows; the last: ")
    assert "no such layer" in message
    log = TrialLog(f"{tmp_path}/trials.json", one_shot=True)
    assert [record.state for record in log.trials] == ["finished", "failed", "failed"]
    again = run(tmp_path, [0.5, 0.75], trials=3, failures=0.2)  # what failed may have been mended
    assert [record.state for record in again] == ["finished", "failed", "failed", "finished", "finished"]


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (["Traceback", "  File a", "ValueError: no such layer"], "ValueError: no such layer"),
        (
            ["ray.exceptions.OutOfMemoryError: low on memory (node 1)", "", "Refer to https://docs"],
            "ray.exceptions.OutOfMemoryError: low on memory (node 1)",
        ),
        (["it was ended after 2 minutes"], "it was ended after 2 minutes"),
        (
            [
                "Failure # 1 (occurred at 2026-01-01)",
                "Refer to the documentation on how to address the out of memory issue: https://x. Consider …",
            ],
            "killed by Ray's memory monitor, as the node ran low on memory",
        ),
    ],
)
def test_limits__the_reason_is_the_line_that_names_an_error(lines: list[str], named: str) -> None:
    assert reason(lines) == named
