"""A sweep whose gradual runs are a population: the worse one goes on from the better one's checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import pytest
from commands import SMALL, run

from orchestration.state.trial_log import TrialLog, TrialRecord

pytestmark = [pytest.mark.long, pytest.mark.cluster, pytest.mark.timeout(900)]
EPOCHS = 6
# The recipe's own rate teaches next to nothing: whoever draws another one is better.
SWEEP = (
    "sweep",
    str(SMALL),
    "pruning.methods=[dimap]",
    "allocation.trials=0",
    "resources.workers=1",
    f"recovery.epochs={EPOCHS}",
    "recovery.lr={kind: constant, peak: 1e-6, floor: 0}",
    "schedule.scheduler=pbt",
    "schedule.sampler=random",
    "schedule.trials=2",
    "schedule.grace_epochs=1",
    "schedule.space={recovery.lr.peak: {log: [1e-6, 2e-3]}}",
)


def runs_of(trials: list[TrialRecord]) -> dict[int, Path]:
    """The folder of the Train run that each trial ended with."""
    return {trial.number: Path(str(trial.checkpoint)).parent.parent for trial in trials}


def test_pbt__the_worse_run_goes_on_from_the_better_ones_checkpoint(tmp_path: Path) -> None:
    command = run(*SWEEP, cwd=tmp_path, seconds=850)
    assert "Traceback" not in command.err
    assert "Warning" not in command.err
    assert "2 runs (0 stopped early)" in command.err
    (phase_folder,) = tmp_path.glob("runs/sweeps/small/schedule-dimap-*")
    trials = TrialLog(f"{phase_folder}/trials.json").trials
    assert {trial.state for trial in trials} == {"finished"}
    assert {trial.number for trial in trials} == {0, 1}
    (taker,) = [trial for trial in trials if trial.number == 0]
    taken = taker.metrics["pbt.taken"]
    assert taker.metrics["pbt.exploits"] == len(taken) >= 1
    assert all(1e-6 <= trial.values["recovery.lr.peak"] <= 2e-3 for trial in trials)

    # its own reports begin behind the epoch that it took over, and with the rate that it has now
    first = taken[0]
    assert first["trial"] == 1
    assert first["values"]["recovery.lr.peak"] > 1e-6
    assert 2 < first["epoch"] < EPOCHS
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow/mlflow.db")
    assert taker.run_id is not None
    tags = client.get_run(taker.run_id).data.tags
    assert tags["pbt.exploits"] == str(len(taken))
    assert tags["pbt.taken"].startswith(f"trial 1 after epoch {first['epoch']}")
    assert json.loads(tags["pbt.values"]) == taker.values

    # the checkpoints that are left say what they were trained with, and nothing is left of the first run
    folders = runs_of(trials)
    runs = phase_folder / "train"
    assert {one.name for one in runs.iterdir()} - {"origins"} == {one.name for one in folders.values()}
    assert not list((runs / "origins").iterdir())
    for trial in trials:
        record = json.loads((Path(str(trial.checkpoint)) / "pruning.json").read_text())
        assert record["recipe"]["training"]["lr"]["peak"] == trial.values["recovery.lr.peak"]
    left = sorted(folders[0].glob("checkpoint_*/trainer.json"))
    states = [json.loads(file.read_text())["state"] for file in left]
    assert [state["last"]["epoch"] for state in states] == list(range(taken[-1]["epoch"] + 1, EPOCHS + 1))
    kept = min(figures["epoch"] for figures in states[-1]["kept"].values())
    assert kept > taken[-1]["epoch"], "what was best before is the other run's"

    again = run(*SWEEP, cwd=tmp_path, seconds=300)  # all is known
    assert "known, 2 runs" in again.err
