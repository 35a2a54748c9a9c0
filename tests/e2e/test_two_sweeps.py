"""Two real sweeps of one storage, started together; and one that is killed while the other waits for it."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import mlflow
import pytest
from commands import SMALL, Command, espalier

SECONDS = 1000.0  # two sweeps share two processors
pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(2400)]

SWEEP = (
    "sweep",
    str(SMALL),
    "pruning.methods=[ovit]",
    "allocation.trials=3",
    "schedule.trials=1",
)
WAITS = "dense model: another sweep is making it (process "


def status(folder: Path) -> dict[str, list[str]]:
    """States of the runs of each sweep, read from the database as it lies."""
    client = mlflow.MlflowClient(f"sqlite:///{folder}/runs/mlflow/mlflow.db")
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    states: dict[str, list[str]] = {"one": [], "two": []}
    for run in client.search_runs(ids, max_results=1000):
        states[run.data.tags["espalier.sweep"]].append(run.info.status)
    return states


def in_order(commands: list[Command]) -> tuple[Command, Command]:
    """Who makes the dense model, and who waits for it."""
    first, second = commands
    waits = [WAITS in command.err for command in commands]
    return (first, second) if waits[1] else (second, first)


def known(folder: Path, pattern: str) -> list[Any]:
    return sorted((folder / "runs").glob(pattern))


def test_two_sweeps__two_that_start_together_share_what_one_of_them_makes(tmp_path: Path) -> None:
    with (
        espalier(*SWEEP, "--as", "one", cwd=tmp_path) as command_one,
        espalier(*SWEEP, "--as", "two", cwd=tmp_path) as command_two,
    ):
        assert command_one.wait(SECONDS) == 0, command_one.err
        assert command_two.wait(SECONDS) == 0, command_two.err
        assert command_one.left() == {}
        assert command_two.left() == {}
    first, second = in_order([command_one, command_two])
    assert WAITS in second.err
    assert WAITS not in first.err
    assert re.search(r"trained in \d+ s, ", first.err)
    assert "made by another sweep, " in second.err
    assert len(known(tmp_path, "dense/*/trials.json")) == 1
    assert len(known(tmp_path, "orders/*/facts.json")) == 1
    states = status(tmp_path)
    assert states["one"]
    assert states["two"]
    assert {*states["one"], *states["two"]} == {"FINISHED"}
    tables = [Path(tmp_path, "runs/sweeps", name, "results.json").read_text() for name in ("one", "two")]
    figures = [re.findall(r'"(?:dense|one_shot|sparsity)": [\d.]+', table) for table in tables]
    assert figures[0] == figures[1]


def test_two_sweeps__who_waits_makes_it_itself_when_the_other_is_killed(tmp_path: Path) -> None:
    with (
        espalier(*SWEEP, "--as", "one", cwd=tmp_path) as command_one,
        espalier(*SWEEP, "--as", "two", cwd=tmp_path) as command_two,
    ):
        command_one.until(lambda: WAITS in command_one.err + command_two.err, what="one that waits")
        first, second = in_order([command_one, command_two])
        first.until(lambda: bool(first.workers()), what="training")
        assert first.interrupt(signal.SIGKILL)[0] == -signal.SIGKILL
        assert second.wait(SECONDS) == 0, second.err
        assert not [line for line in second.left().values() if "mlflow" in line]
        name = "one" if first is command_one else "two"
        assert re.search(r"trained in \d+ s, ", second.err)
        assert "made by another sweep" not in second.err
        assert set(status(tmp_path)["two" if name == "one" else "one"]) == {"FINISHED"}
        # the killed one goes on with what the other made, and ends none of its runs
        with espalier(*SWEEP, "--as", name, cwd=tmp_path) as again:
            assert again.wait() == 0, again.err
    assert "reused, " in again.err
    states = status(tmp_path)
    assert {*states["one"], *states["two"]} == {"FINISHED"}
