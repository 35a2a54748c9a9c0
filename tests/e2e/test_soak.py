"""Sweeps whose processes are killed at random: nothing is lost or repeated, and all records agree."""

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

from orchestration.state.trial_log import TrialLog

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
# the whole way, of which no kill changes what is drawn: every allocation and schedule is given
KILLS, RUNS = 20, 6
WHOLE = (
    "sweep",
    str(SMALL),
    "pruning.methods=[dimap]",
    "allocation.trials=0",
    "schedule.scheduler=none",
    "schedule.sampler=grid",
    f"schedule.trials={RUNS}",
    "schedule.space={recovery.lr.peak: {choice: [1e-4, 1e-3, 2e-3]}, recovery.ema: {choice: [0.9, 0.99]}}",
    "resources.retries=100",
)
OF_TRAINING = ("driver", "driver", "RayTrainWorker", "mlflow")


def victim(command: Command, kind: str, chance: random.Random) -> int | None:
    """A process of the command to kill, if there is one of this kind just now."""
    if kind == "driver":
        return command.process.pid
    pids = [pid for pid, line in command.family.look().items() if kind in line]
    return chance.choice(pids) if pids else None


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


def twenty_kills(
    folder: Path, start_seconds: float, work_seconds: float, chance: random.Random
) -> Counter[str]:
    """Kill a process of the sweep at a random moment, again and again; then let it come to its end.

    Args:
        start_seconds: until the sweep is at work; ``work_seconds``: from then to its end, undisturbed.
    """
    killed: Counter[str] = Counter()
    began = time.monotonic()
    while sum(killed.values()) < KILLS:
        with espalier(*WHOLE, cwd=folder) as command:
            moment = chance.uniform(0.3 * start_seconds, start_seconds + work_seconds / 6)
            while command.process.poll() is None:
                assert time.monotonic() - began < MOST_SECONDS, f"{killed}\n{command.err}"
                ends = time.monotonic() + moment
                while command.process.poll() is None and time.monotonic() < ends:
                    command.family.look()
                    time.sleep(0.1)
                kind = chance.choice(OF_TRAINING)
                pid = victim(command, kind, chance)
                if command.process.poll() is None and pid is not None:
                    os.kill(pid, signal.SIGKILL)
                    killed[kind] += 1
                    if kind == "driver":
                        command.process.wait(10)
                moment = chance.uniform(0.0, work_seconds / 6)
            assert command.process.returncode in (0, -signal.SIGKILL), command.err
            assert command.left(20.0) == {}, killed
    run(*WHOLE, cwd=folder)
    return killed


def weights(folder: Path) -> dict[str, bytes]:
    """Those of the dense model, of the best of each run and of the sweep, by their places.

    Checkpoints to go on from are left out: Ray names them after the time.
    """
    patterns = (
        "dense/*/model",
        "dense/*/train/*/kept/*",
        "sweeps/*/*/train/*/kept/*",
        "sweeps/*/*/recovered",
    )
    models = [path for place in patterns for path in folder.glob(f"runs/{place}/model.safetensors")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in models}


def logged(folder: Path) -> list[tuple[str, str, float | None]]:
    """Of each run in MLflow its name, its state and its top-1, in order."""
    client = mlflow.MlflowClient(f"sqlite:///{folder}/runs/mlflow/mlflow.db")
    experiments = [one.experiment_id for one in client.search_experiments()]
    runs = client.search_runs(experiments, max_results=1000)
    return sorted((one.info.run_name, one.info.status, one.data.metrics.get("val_top1")) for one in runs)


@pytest.mark.long
@pytest.mark.cluster
@pytest.mark.timeout(4000)
def test_soak__twenty_kills_of_one_sweep_lose_and_repeat_nothing(tmp_path: Path) -> None:
    """Its weights are those of the undisturbed one to the bit, and so is what MLflow knows."""
    undisturbed, soaked = tmp_path / "undisturbed", tmp_path / "soaked"
    for folder in (undisturbed, soaked):
        folder.mkdir()
    began = time.monotonic()
    with espalier(*WHOLE, cwd=undisturbed) as command:
        command.until(lambda: bool(command.workers()), what="the first worker")
        start = time.monotonic() - began
        assert command.wait() == 0, command.err
    killed = twenty_kills(soaked, start, time.monotonic() - began - start, random.Random(25))
    assert sum(killed.values()) >= KILLS
    assert killed["driver"] >= KILLS / 4
    expected = weights(undisturbed)
    assert len(expected) == 1 + 1 + RUNS + 1
    after_kills = weights(soaked)
    assert sorted(after_kills) == sorted(expected)
    assert [place for place in expected if after_kills[place] != expected[place]] == []
    assert logged(soaked) == logged(undisturbed)
    assert {status for _, status, _ in logged(soaked)} == {"FINISHED"}


@pytest.mark.long
@pytest.mark.cluster
@pytest.mark.timeout(4000)
def test_soak__soak(tmp_path: Path) -> None:
    run(*SWEEP, "--until", "dense", cwd=tmp_path)
    killed = endured(tmp_path, random.Random(0))
    assert sum(killed.values()) >= 3

    runs = tmp_path / "runs"
    (trials_file,) = runs.glob("sweeps/small/allocation-*/trials.json")
    log = TrialLog(str(trials_file))
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
    entries = client.search_runs(
        experiments, f"tags.`mlflow.parentRunId` = '{log.run_id}'", max_results=2 * TRIALS
    )
    logged = {int(one.data.tags["espalier.number"]): one for one in entries}
    assert len(entries) == len(logged) == len(log.trials)
    for trial in log.trials:
        entry = logged[trial.number]
        assert entry.info.status == {"finished": "FINISHED", "failed": "FAILED"}[trial.state]
        assert entry.data.metrics.get("val_top1") == trial.metrics.get("val_top1")
        assert trial.run_id == entry.info.run_id
    assert len(client.search_model_versions("name='espalier-small'")) == 1
