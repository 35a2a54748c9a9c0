"""Ctrl-C, SIGTERM and SIGKILL at any moment: what ends, what stays, and how it goes on."""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest
from commands import SMALL, Command, espalier

from orchestration.state.trial_log import TrialLog

pytestmark = pytest.mark.cluster

OVERRIDES = (
    "pruning.methods=[dimap]",
    "allocation.trials=12",
    "schedule.trials=2",
    "schedule.scheduler=none",
)
SWEEP = ("sweep", str(SMALL), *OVERRIDES)


@dataclass(frozen=True)
class SweepFolder:
    """A folder in which one sweep is started, broken off and resumed, test after test."""

    folder: Path

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def trials(self) -> dict[str, list[dict[str, Any]]]:
        """What is known of each phase; a file is written whole or not at all."""
        logs = [*self.runs.glob("dense/*/trials.json"), *self.runs.glob("sweeps/*/*/trials.json")]
        return {
            str(log.relative_to(self.runs)): [asdict(trial) for trial in TrialLog(str(log)).trials]
            for log in logs
        }

    def ended(self, phase: str) -> int:
        return sum(len(trials) for name, trials in self.trials().items() if phase in name)

    def keeps(self, before: dict[str, list[dict[str, Any]]]) -> None:
        """No trial that was known has been changed, or run again."""
        after = self.trials()
        for name, trials in before.items():
            for old, new in zip(trials, after[name], strict=False):
                # cheap trials learn their MLflow runs at the end of their phase
                assert {**new, "run_id": old["run_id"] and new["run_id"]} == old
            assert len(after[name]) >= len(trials)
            numbers = [trial["number"] for trial in after[name]]
            assert sorted(set(numbers)) == sorted(numbers)

    def status(self) -> dict[str, str]:
        """State of each MLflow run, read from the database as it lies."""
        client = mlflow.MlflowClient(f"sqlite:///{self.runs}/mlflow/mlflow.db")
        ids = [experiment.experiment_id for experiment in client.search_experiments()]
        return {entry.info.run_id: entry.info.status for entry in client.search_runs(ids, max_results=1000)}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> SweepFolder:
    return SweepFolder(tmp_path_factory.mktemp("interrupted"))


def has_begun(sweep: SweepFolder, command: Command) -> bool:
    """Ray is on its way up."""
    return any("gcs_server" in line for line in command.family.look().values())


def in_dense(sweep: SweepFolder, command: Command) -> bool:
    return bool(command.workers()) and "[1/3] dense model" in command.err


def in_allocation(sweep: SweepFolder, command: Command) -> bool:
    return sweep.ended("allocation") > 2


def in_gradual(sweep: SweepFolder, command: Command) -> bool:
    """The second gradual run is at work."""
    return sweep.ended("schedule") == 1 and bool(command.workers())


@pytest.mark.parametrize(
    ("moment", "kind"),
    [
        pytest.param(has_begun, signal.SIGINT, marks=pytest.mark.long),
        pytest.param(in_dense, signal.SIGINT, marks=pytest.mark.long),
        pytest.param(in_allocation, signal.SIGTERM, marks=pytest.mark.long),
        (in_gradual, signal.SIGINT),
    ],
)
def test_interrupt__an_interrupt_ends_everything_in_seconds(
    sweep: SweepFolder, moment: Callable[[SweepFolder, Command], bool], kind: int
) -> None:
    before = sweep.trials()
    with espalier(*SWEEP, cwd=sweep.folder) as command:
        command.until(lambda: moment(sweep, command), what=moment.__name__)
        known = sweep.trials()
        time.sleep(1)
        status, seconds = command.interrupt(kind)
        assert command.left() == {}
        assert status == 130, command.err
        assert seconds < 15
    assert "Traceback" not in command.err
    last = command.err.rstrip().splitlines()[-1]
    message, _, again = last.partition("To go on: ")
    assert message == "interrupted; finished trials are kept. "
    assert tuple(shlex.split(again)) == ("espalier", *SWEEP)
    sweep.keeps(before)
    sweep.keeps(known)
    if moment is not has_begun:
        assert "RUNNING" not in sweep.status().values()


@pytest.mark.long
def test_interrupt__a_killed_driver_leaves_nothing_that_is_in_the_way(sweep: SweepFolder) -> None:
    """SIGKILL, and then the same command again: it ends well, and repeats no finished trial."""
    with espalier(*SWEEP, cwd=sweep.folder) as command:
        command.until(lambda: in_gradual(sweep, command), what="the second gradual run")
        known = sweep.trials()
        status, _ = command.interrupt(signal.SIGKILL)
        assert status == -signal.SIGKILL
        # Ray's own agents would try for a minute to tell the cluster, which is gone, that it is
        assert command.left(20.0) == {}
        with espalier(*SWEEP, cwd=sweep.folder) as again:
            assert again.wait() == 0, again.err
            assert again.left() == {}
    sweep.keeps(known)
    assert sweep.ended("allocation") == 12
    assert sweep.ended("schedule") == 2
    assert "1 of 2 trials known" in again.err
    assert "champion: dimap" in again.out
    assert "RUNNING" not in sweep.status().values()
    assert not list(sweep.runs.glob("sweeps/*/scratch/*"))
