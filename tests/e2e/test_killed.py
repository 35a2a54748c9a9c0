"""A sweep whose driver is killed at random moments is the undisturbed one: proposals, stops, weights."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from commands import SMALL, espalier, run
from swept import Swept

from orchestration.state.trial_log import TrialLog

pytestmark = [pytest.mark.long, pytest.mark.cluster, pytest.mark.timeout(4000)]
SEARCHES = ("allocation search", "gradual pruning")
KILLS, MOST_SECONDS = 8, 3000.0


def sweep(swept: Swept) -> tuple[str, ...]:
    """Both searches, one trial at a time, with samplers of generations; trials are stopped early."""
    (dense,) = swept.storage.glob("dense/*/model")
    cores = os.cpu_count()
    return (
        "sweep",
        str(SMALL),
        f"model={{checkpoint: 'file://{dense}', classes: 10}}",
        "dense=null",
        "pruning.methods=[dimap]",
        "allocation={trials: 24, sampler: cmaes, images: 256, first_images: 64}",
        f"allocation.cpus_per_trial={cores}",
        "schedule.trials=5",
        "schedule.sampler=nsga2",
        "schedule.scheduler=asha",
        "recovery.epochs=4",
        f"resources={{workers: 1, cpus_per_worker: {cores}}}",
    )


def searches(storage: Path) -> dict[str, TrialLog]:
    """The trial logs by phase."""
    files = storage.glob("sweeps/small/*/trials.json")
    return {place.parent.name.split("-")[0]: TrialLog(str(place), one_shot=True) for place in files}


def outcomes(log: TrialLog) -> list[tuple[Any, ...]]:
    return [
        (one.number, one.values, one.state, one.score, [rung[1:] for rung in one.rungs]) for one in log.trials
    ]


def weights(storage: Path) -> dict[str, bytes]:
    files = sorted(storage.glob("sweeps/small/*/recovered/model.safetensors"))
    return {place.parent.parent.name: place.read_bytes() for place in files}


def killed(arguments: tuple[str, ...], folder: Path, chance: random.Random) -> Counter[str]:
    """Kill the driver a while after a search has begun, again and again; then let it end. Where it was."""
    kills: Counter[str] = Counter()
    began = time.monotonic()
    while True:
        with espalier(*arguments, cwd=folder) as command:
            while command.process.poll() is None and not any(name in command.err for name in SEARCHES):
                time.sleep(0.1)
            ends = time.monotonic() + chance.uniform(1.0, 14.0)
            last = sum(kills.values()) >= KILLS
            while command.process.poll() is None and (last or time.monotonic() < ends):
                assert time.monotonic() - began < MOST_SECONDS, f"{kills}\n{command.err}"
                time.sleep(0.1)
            if command.process.poll() is not None:
                assert command.process.returncode == 0, command.err
                return kills
            at = "schedule" if "gradual pruning" in command.err else "allocation"
            os.kill(command.process.pid, signal.SIGKILL)
            kills[at] += 1


def test_killed__killed_at_random_moments(swept: Swept, tmp_path: Path) -> None:
    arguments = sweep(swept)
    run(*arguments, f"storage={tmp_path}/whole", cwd=tmp_path)
    kills = killed((*arguments, f"storage={tmp_path}/killed"), tmp_path, random.Random(1))
    assert sum(kills.values()) >= KILLS / 2
    whole, resumed = searches(tmp_path / "whole"), searches(tmp_path / "killed")
    assert {record.state for log in whole.values() for record in log.trials} == {"finished", "stopped"}
    assert set(whole) == set(resumed) == {"allocation", "schedule"}
    for phase, log in whole.items():
        assert outcomes(resumed[phase]) == outcomes(log), kills
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
