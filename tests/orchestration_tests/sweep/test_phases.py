"""What a sweep logs to when it is started or goes on, and what it began was deleted in MLflow since."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.cli import gc

from orchestration.recipe.phases import ALL_PHASES
from orchestration.recipe.validation import validate
from orchestration.state.trial_log import TrialLog, TrialRecord
from orchestration.sweep.context import Sweep
from orchestration.sweep.phases import _open
from orchestration.sweep.trial_runs import TrialRuns
from orchestration.tracking.tracker import Tracker
from trainers.config.data import DataSettings


class MLflow:
    """A database of MLflow's, without a server, and the sweeps that log to it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.uri = folder, f"sqlite:///{folder}/mlflow.db"
        self.lines: list[str] = []
        self.client = MlflowClient(self.uri)

    def begun(self, name: str = "mine") -> tuple[Sweep, TrialRuns]:
        """A sweep as it is started, or goes on, in its first phase, whose folder all sweeps share."""
        recipe = validate(
            {
                "name": name,
                "storage": f"{self.folder}/runs",
                "model": {"architecture": "vit_tiny_patch16_224"},
                "data": {"train": "/none"},
                "dense": {"epochs": 1},
                "tracking": {"uri": self.uri, "experiment": "digits"},
            }
        )
        self.lines.clear()
        tracker = Tracker(self.uri, "digits", self.lines.append)
        prepared: Any = SimpleNamespace(recipe=recipe, data=DataSettings(train="/none"), data_hash="d")
        display: Any = SimpleNamespace(say=self.lines.append)
        size: Any = SimpleNamespace(nodes=((2.0, 0.0),))
        sweep = _open(prepared, display, tracker, size, ALL_PHASES)
        return sweep, sweep.runs(TrialLog(f"{sweep.storage}/dense/key/trials.json"), "dense", {})

    def opened(self) -> tuple[Sweep, str]:
        """A sweep that has ended in order after its first phase; that phase's run."""
        sweep, runs = self.begun()
        sweep.tracker.metrics(runs.run, {"loss": [(0, 1.0)]})
        sweep.tracker.close("FINISHED")
        return sweep, runs.run

    def state(self, run: str) -> tuple[str, str]:
        info = self.client.get_run(run).info
        return info.lifecycle_stage, info.status

    def parent(self, run: str) -> str:
        return str(self.client.get_run(run).data.tags["mlflow.parentRunId"])

    def collect(self, *given: str) -> None:
        """What was deleted goes for good, as by an administrator."""
        where = ["--backend-store-uri", self.uri, "--tracking-uri", self.uri]
        done = CliRunner().invoke(gc, [*where, *given])
        assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, which take seconds to make."""
    folder = tmp_path_factory.mktemp("empty")
    MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def mlflow(empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MLflow:
    monkeypatch.chdir(tmp_path)  # artifacts lie beside
    monkeypatch.setattr(Tracker, "monitor", lambda self, run: None)
    monkeypatch.setattr(Sweep, "datasets", [])
    shutil.copy(empty, tmp_path)
    return MLflow(tmp_path)


def test_phases__a_sweep_goes_on_over_what_was_deleted(mlflow: MLflow) -> None:
    """Restored with its runs, and that is said: an experiment, and single runs."""
    before, phase = mlflow.opened()
    mlflow.client.delete_run(phase)
    mlflow.client.delete_run(before.run)
    mlflow.client.delete_experiment(before.tracker.experiment)
    again, same = mlflow.opened()
    assert (again.run, same, again.tracker.experiment) == (before.run, phase, before.tracker.experiment)
    assert mlflow.state(again.run) == mlflow.state(phase) == ("active", "FINISHED")
    assert "the MLflow experiment digits had been deleted; it is restored, with its runs" in mlflow.lines


def test_phases__a_run_that_was_deleted_is_restored_and_that_is_said(mlflow: MLflow) -> None:
    before, phase = mlflow.opened()
    mlflow.client.delete_run(phase)
    again, same = mlflow.opened()
    assert (again.run, same) == (before.run, phase)
    assert mlflow.state(phase) == ("active", "FINISHED")
    assert mlflow.lines == ["the MLflow run dense had been deleted; it is restored"]


def test_phases__a_run_that_is_gone_for_good_is_made_anew(mlflow: MLflow) -> None:
    before, phase = mlflow.opened()
    mlflow.client.delete_run(phase)
    mlflow.collect("--run-ids", phase)
    again, new = mlflow.opened()
    assert again.run == before.run
    assert new != phase
    assert mlflow.parent(new) == before.run
    mlflow.client.delete_run(new)
    mlflow.client.delete_run(before.run)
    mlflow.collect("--run-ids", f"{before.run},{new}")
    last, third = mlflow.opened()
    assert len({before.run, last.run, phase, new, third}) == 5
    assert mlflow.parent(third) == last.run
    assert mlflow.opened()[0].run == last.run  # and it is known from now on
    assert mlflow.state(last.run) == mlflow.state(third) == ("active", "FINISHED")


def test_phases__an_experiment_that_is_gone_for_good_is_made_anew(mlflow: MLflow) -> None:
    before, _ = mlflow.opened()
    mlflow.client.delete_experiment(before.tracker.experiment)
    mlflow.collect("--experiment-ids", before.tracker.experiment)
    again, phase = mlflow.opened()
    assert mlflow.client.get_experiment(again.tracker.experiment).name == "digits"
    assert again.run != before.run
    assert mlflow.parent(phase) == again.run
    assert mlflow.client.get_run(phase).info.experiment_id == again.tracker.experiment
    assert mlflow.client.get_run(phase).data.metrics == {"loss": 1.0}
    assert mlflow.lines == []
    assert mlflow.opened()[0].run == again.run


BEST = TrialRecord(0, {}, "finished", 0.5, metrics={"val_top1": 0.5})


def test_phases__a_phase_that_a_second_sweep_has_ended_stays_finished_when_that_is_interrupted(
    mlflow: MLflow,
) -> None:
    """As the dense model, whose training the first sweep had begun when it was killed."""
    first, begun = mlflow.begun("one")
    first.tracker.flush()  # and is killed
    second, taken = mlflow.begun("two")
    assert taken.run == begun.run
    taken.close(BEST)
    second.tracker.abandon("KILLED")  # in a later phase
    assert mlflow.state(taken.run) == ("active", "FINISHED")
    assert mlflow.state(second.run) == ("active", "KILLED")
    assert mlflow.client.get_run(taken.run).data.metrics == {"best.val_top1": 0.5}


def test_phases__a_phase_that_a_second_sweep_was_interrupted_in_is_ended_by_the_first(
    mlflow: MLflow,
) -> None:
    first, begun = mlflow.begun("one")
    first.tracker.flush()
    second, _ = mlflow.begun("two")
    assert mlflow.parent(begun.run) == second.run
    second.tracker.abandon("KILLED")
    assert mlflow.state(begun.run) == ("active", "KILLED")
    again, back = mlflow.begun("one")
    assert (again.run, back.run) == (first.run, begun.run)
    assert mlflow.parent(back.run) == first.run
    back.close(BEST)
    again.tracker.close("FINISHED")
    assert mlflow.state(back.run) == mlflow.state(first.run) == ("active", "FINISHED")
    assert mlflow.state(second.run) == ("active", "KILLED")
