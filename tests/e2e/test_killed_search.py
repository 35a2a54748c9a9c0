"""A search on Ray Tune whose driver is killed at random moments is the undisturbed one, to the bit."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from commands import ELSEWHERE, MARK, Family

from orchestration.state.trial_log import TrialLog

DRIVER = Path(__file__).parents[1] / "faults" / "search_drive.py"
TRIALS, KILLS, SECONDS = 30, 5, 300.0
pytestmark = [pytest.mark.long, pytest.mark.cluster, pytest.mark.timeout(3000)]


def lived(folder: Path, sampler: str, rule: str, until: int | None = None, wait: float = 0.0) -> None:
    """Run the driver to its end, or kill it ``wait`` seconds after so many trials have ended."""
    folder.mkdir(exist_ok=True)
    mark = uuid.uuid4().hex
    kept = {key: value for key, value in os.environ.items() if key not in ELSEWHERE}
    command = [sys.executable, str(DRIVER), str(folder), sampler, rule]
    log = folder / f"{mark}.txt"
    with log.open("wb") as out:
        process = subprocess.Popen(command, env={**kept, MARK: mark}, stdout=out, stderr=out)
    family = Family(process.pid, folder, mark)
    try:
        deadline = time.monotonic() + SECONDS
        while process.poll() is None and (until is None or ended(folder) < until):
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            family.look()
            time.sleep(0.05)
        time.sleep(wait)
        assert until is not None or process.returncode == 0, log.read_text()[-3000:]
    finally:
        process.kill()
        family.look()
        family.end()
        process.wait(20)


def ended(folder: Path) -> int:
    return len(TrialLog(f"{folder}/trials.json", one_shot=True).trials)


def outcomes(folder: Path) -> list[tuple[Any, ...]]:
    """All that a search has found, with each comparison that stopped a trial or did not."""
    trials = TrialLog(f"{folder}/trials.json", one_shot=True).trials
    return [
        (one.number, one.values, one.state, one.score, [rung[1:] for rung in one.rungs]) for one in trials
    ]


@pytest.mark.parametrize(("sampler", "rule"), [("cmaes", "asha"), ("tpe", "hyperband"), ("nsga2", "median")])
def test_killed_search__killed_at_random_moments(sampler: str, rule: str, tmp_path: Path) -> None:
    whole, killed, chance = tmp_path / "whole", tmp_path / "killed", random.Random(sampler)
    lived(whole, sampler, rule)
    assert {"finished", "stopped"} == {state for _, _, state, _, _ in outcomes(whole)}
    for until in sorted(chance.sample(range(1, TRIALS - 1), KILLS)):
        lived(killed, sampler, rule, until, chance.uniform(0, 0.4))
    lived(killed, sampler, rule)
    assert len(outcomes(killed)) == TRIALS
    assert outcomes(killed) == outcomes(whole)
