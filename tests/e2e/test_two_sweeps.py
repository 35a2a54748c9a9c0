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
    found: dict[str, list[str]] = {"one": [], "two": []}
    for run in client.search_runs(ids, max_results=1000):
        found[run.data.tags["espalier.sweep"]].append(run.info.status)
    return found


def in_order(commands: list[Command]) -> tuple[Command, Command]:
    """Who makes the dense model, and who waits for it."""
    one, two = commands
    waits = [WAITS in command.err for command in commands]
    return (one, two) if waits[1] else (two, one)


def known(folder: Path, pattern: str) -> list[Any]:
    return sorted((folder / "runs").glob(pattern))


def test_two_sweeps__two_that_start_together_share_what_one_of_them_makes(tmp_path: Path) -> None:
    with (
        espalier(*SWEEP, "--as", "one", cwd=tmp_path) as one,
        espalier(*SWEEP, "--as", "two", cwd=tmp_path) as two,
    ):
        assert one.wait(SECONDS) == 0, one.err
        assert two.wait(SECONDS) == 0, two.err
        assert one.left() == {}
        assert two.left() == {}
    first, second = in_order([one, two])
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
        espalier(*SWEEP, "--as", "one", cwd=tmp_path) as one,
        espalier(*SWEEP, "--as", "two", cwd=tmp_path) as two,
    ):
        one.until(lambda: WAITS in one.err + two.err, what="one that waits")
        first, second = in_order([one, two])
        first.until(lambda: bool(first.workers()), what="training")
        assert first.interrupt(signal.SIGKILL)[0] == -signal.SIGKILL
        assert second.wait(SECONDS) == 0, second.err
        assert not [line for line in second.left().values() if "mlflow" in line]
        name = "one" if first is one else "two"
        assert re.search(r"trained in \d+ s, ", second.err)
        assert "made by another sweep" not in second.err
        assert set(status(tmp_path)["two" if name == "one" else "one"]) == {"FINISHED"}
        # the killed one goes on with what the other made, and ends none of its runs
        with espalier(*SWEEP, "--as", name, cwd=tmp_path) as again:
            assert again.wait() == 0, again.err
    assert "reused, " in again.err
    states = status(tmp_path)
    assert {*states["one"], *states["two"]} == {"FINISHED"}
