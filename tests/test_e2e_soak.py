"""500 cheap trials, a random process killed every 20 seconds: all are there once, and all records agree."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import mlflow
import pytest
from commands import SMALL, Command, espalier, run

from orchestration.trial_log import TrialLog

TRIALS, EVERY, MOST_SECONDS = 500, 20.0, 3000.0
SWEEP = (
    "sweep",
    str(SMALL),
    "pruning.methods=[dimap]",
    f"allocation.trials={TRIALS}",
    "allocation.sampler=random",
    "allocation.images=64",
    "schedule.trials=1",
    "schedule.space={}",
)
VICTIMS = ("driver", "OneShotTrial", "mlflow", "raylet")


def victim(command: Command, kind: str, chance: random.Random) -> int | None:
    """A process of the command to kill, if there is one of this kind just now."""
    if kind == "driver":
        return command.process.pid
    found = [pid for pid, line in command.family.look().items() if kind in line]
    return chance.choice(found) if found else None


def endured(folder: Path, chance: random.Random) -> Counter[str]:
    """Run the command again and again until it ends well; and tell what was killed."""
    killed: Counter[str] = Counter()
    began = time.monotonic()
    while True:
        with espalier(*SWEEP, cwd=folder) as command:
            while command.process.poll() is None:
                assert time.monotonic() - began < MOST_SECONDS, f"{killed}\n{command.err}"
                ends = time.monotonic() + EVERY
                while command.process.poll() is None and time.monotonic() < ends:
                    time.sleep(0.25)
                kind = chance.choice(VICTIMS)
                pid = victim(command, kind, chance)
                if command.process.poll() is None and pid is not None:
                    os.kill(pid, signal.SIGKILL)
                    killed[kind] += 1
            if command.process.returncode == 0:
                return killed


@pytest.mark.long
@pytest.mark.cluster
@pytest.mark.timeout(4000)
def test_soak(tmp_path: Path) -> None:
    run(*SWEEP, "--until", "dense", cwd=tmp_path)
    killed = endured(tmp_path, random.Random(0))
    assert sum(killed.values()) >= 3

    runs = tmp_path / "runs"
    (place,) = runs.glob("sweeps/small/allocation-*/trials.json")
    log = TrialLog(str(place))
    numbers = [trial.number for trial in log.trials]
    assert len(set(numbers)) == len(numbers)
    failed = [trial for trial in log.trials if trial.state == "failed"]
    assert TRIALS - len(failed) <= len(log.ended) <= TRIALS
    proposals = Counter(tuple(sorted(trial.values.items())) for trial in log.ended)
    assert max(proposals.values()) == 1  # none was run again
    assert {trial.state for trial in log.trials} <= {"finished", "failed"}
    # what failed is what lost its actor: on two processors, two at most with each process
    assert len(failed) <= 2 * (killed["OneShotTrial"] + killed["raylet"])

    client = mlflow.MlflowClient(f"sqlite:///{runs}/mlflow/mlflow.db")
    experiments = [one.experiment_id for one in client.search_experiments()]
    found = client.search_runs(
        experiments, f"tags.`mlflow.parentRunId` = '{log.run_id}'", max_results=2 * TRIALS
    )
    logged = {int(one.data.tags["espalier.number"]): one for one in found}
    assert len(found) == len(logged) == len(log.trials)
    for trial in log.trials:
        one = logged[trial.number]
        assert one.info.status == {"finished": "FINISHED", "failed": "FAILED"}[trial.state]
        assert one.data.metrics.get("val_top1") == trial.metrics.get("val_top1")
        assert trial.run_id == one.info.run_id
    assert len(client.search_model_versions("name='espalier-small'")) == 1
