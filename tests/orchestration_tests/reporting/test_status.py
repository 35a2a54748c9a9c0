"""What `espalier status`, `logs` and `stop` read from a sweep's folder and leave there."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from orchestration.cli.app import cli
from orchestration.reporting.display import Display
from orchestration.reporting.status import log_lines, overview
from orchestration.state import heartbeat
from orchestration.state.trial_log import TrialLog, TrialRecord
from pruners.errors import InputError


@pytest.fixture
def display() -> Display:
    return Display(Console(file=io.StringIO(), width=200))


def record(number: int, state: str, top1: float | None, error: str | None = None) -> TrialRecord:
    return TrialRecord(
        number=number,
        values={"recovery.lr.peak": 0.001},
        state=state,  # type: ignore[arg-type]
        score=top1,
        metrics={} if top1 is None else {"val_top1": top1},
        seconds=12.0,
        error=error,
        trace=None if error is None else f"Traceback:\n  file.py, line 3\n{error}",
    )


@pytest.fixture
def at_work(tmp_path: Path, display: Display) -> Iterator[Path]:
    """A sweep in its second phase: one trial finished, one failed, one running."""
    log = TrialLog(f"{tmp_path}/sweeps/mine/schedule-ovit-abc/trials.json")
    display.plan(3)
    with heartbeat.Heartbeat(str(tmp_path), "mine", display, "/ray/session/logs"):
        display.phase("dense model")
        display.finished("reused, 90.0 % on validation")
        display.phase("ovit: gradual pruning", trials=4, epochs=10, label="ovit-schedule", log=log.uri)
        for number in range(3):
            log.begin(number, {"recovery.lr.peak": 10.0**-number}, None)
            display.trial_started(f"t{number}", number, {})
        for ended in (record(0, "finished", 0.875), record(1, "failed", None, "RuntimeError: out of memory")):
            log.add(TrialRecord(**{**ended.__dict__, "values": {"recovery.lr.peak": 10.0**-ended.number}}))
            display.trial_ended(f"t{ended.number}", ended)
        display.say("a line of the driver")
        wait_for_beat(tmp_path)
        yield tmp_path


def wait_for_beat(folder: Path) -> None:
    file = folder / "sweeps/mine/state.json"
    deadline = time.monotonic() + 30
    while "a line of the driver" not in file.read_text(encoding="utf-8"):
        assert time.monotonic() < deadline, "the journal is not kept"
        time.sleep(0.1)


def shown(folder: Path, name: str | None = None) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(overview(str(folder), name))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_status__the_table_of_a_sweep_at_work(at_work: Path) -> None:
    lines = shown(at_work).splitlines()
    dense, gradual = (next(line for line in lines if text in line) for text in ("[1/3]", "[2/3]"))
    assert "mine" in dense
    assert "running since" in dense
    cells = [cell.strip() for cell in gradual.split("│")]
    assert cells[3:8] == ["[2/3] ovit: gradual pruning", "1 of 4", "1", "1", "87.5 %"]
    assert cells[8].count(":") == 1, "the time left"
    assert "mine: ovit-schedule-001 failed: RuntimeError: out of memory" in lines


def test_status__the_folder_moves_with_its_logs(at_work: Path) -> None:
    """What the state says of places holds wherever the storage is mounted."""
    state = json.loads((at_work / "sweeps/mine/state.json").read_text(encoding="utf-8"))
    assert [phase["log"] for phase in state["phases"]] == [None, "sweeps/mine/schedule-ovit-abc/trials.json"]


def test_status__a_trial_is_told_by_its_name(at_work: Path) -> None:
    text = "\n".join(log_lines(str(at_work), "mine", "ovit-schedule-1"))
    assert "ovit-schedule-001: failed after 12 s" in text
    assert "  file.py, line 3\nRuntimeError: out of memory" in text
    assert ":/ray/session/logs" in text
    assert "has not ended" in log_lines(str(at_work), "mine", "ovit-schedule-002")[0]
    assert "has not ended" in log_lines(str(at_work), "mine", "002 ovit-schedule")[0]  # as MLflow has it
    with pytest.raises(InputError, match="did you mean 'ovit-schedule-001'"):
        log_lines(str(at_work), "mine", "ovit-shedule-1")


def test_status__the_driver_is_told_by_its_last_lines(at_work: Path) -> None:
    lines = log_lines(str(at_work), "mine", None)
    assert f"process {os.getpid()}" in lines[0]
    assert "a line of the driver" in lines
    assert "more of a failed trial: espalier logs mine ovit-schedule-001" in lines


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (None, "finished", None),
        (KeyboardInterrupt(), "interrupted", None),
        (RuntimeError("no trial ran to its end\nmore"), "failed", "no trial ran to its end"),
    ],
)
def test_status__how_a_sweep_ended(
    tmp_path: Path, display: Display, error: BaseException | None, state: str, reason: str | None
) -> None:
    def body() -> None:
        with heartbeat.Heartbeat(str(tmp_path), "mine", display, "/ray/session/logs"):
            display.say("a line of the driver")
            if error is not None:
                raise error

    if error is None:
        body()
    else:
        with pytest.raises(type(error)):
            body()
    seen_state = heartbeat.read(str(tmp_path), "mine")
    assert seen_state is not None
    assert (seen_state["state"], seen_state["reason"]) == (state, reason)
    assert (reason or state) in shown(tmp_path)
    assert seen_state["said"] == ["a line of the driver"]


def edited(folder: Path, **changes: Any) -> str:
    """The state that is read after the file was changed."""
    file = folder / "sweeps/mine/state.json"
    content = json.loads(file.read_text(encoding="utf-8")) | {"state": "running"} | changes
    file.write_text(json.dumps(content), encoding="utf-8")
    state = heartbeat.read(str(folder), "mine")
    assert state is not None
    return str(state["state"])


def test_status__a_driver_that_was_killed_is_not_at_work(tmp_path: Path, display: Display) -> None:
    with heartbeat.Heartbeat(str(tmp_path), "mine", display, "/ray/session/logs"):
        pass
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert edited(tmp_path) == "running"
    assert edited(tmp_path, pid=child.pid) == "gone"
    assert edited(tmp_path, pid=child.pid, host="elsewhere") == "running"
    assert edited(tmp_path, host="elsewhere", updated=time.time() - 3600) == "gone"
    assert "not heard of since" in shown(tmp_path)
    result = CliRunner().invoke(cli, ["stop", "mine", "--storage", str(tmp_path)])
    assert isinstance(result.exception, InputError)
    assert "is not at work (gone)" in str(result.exception)
    assert not (tmp_path / "sweeps/mine/stop").exists()


STOPPED = """
import io, signal, sys, time
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # as Ray starts a job
from rich.console import Console
from orchestration.cli import app
from orchestration.state import heartbeat
from orchestration.reporting.display import Display
app._end_in_order()
with heartbeat.Heartbeat(sys.argv[1], "mine", Display(Console(file=io.StringIO())), "/"):
    print("at work", flush=True)
    time.sleep(300)
"""


def test_status__stop_ends_the_driver_as_ctrl_c_does(tmp_path: Path) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "at work\n"
        result = CliRunner().invoke(cli, ["stop", "mine", "--storage", str(tmp_path)])
        assert result.output == "mine: interrupted; to go on: espalier resume mine\n"
        assert driver.wait(30) != 0
        assert "KeyboardInterrupt" in driver.communicate()[1]
    finally:
        driver.kill()
        driver.wait()


def test_status__a_word_for_the_run_before_stops_nothing(
    tmp_path: Path, display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "_BEAT_SECONDS", 0.05)
    heartbeat.ask_to_stop(str(tmp_path), "mine")
    with heartbeat.Heartbeat(str(tmp_path), "mine", display, "/ray/session/logs"):
        time.sleep(0.5)
    state = heartbeat.read(str(tmp_path), "mine")
    assert state is not None
    assert state["state"] == "finished"


def test_status__status_without_a_terminal_is_printed_once(at_work: Path) -> None:
    result = CliRunner().invoke(cli, ["status", "--storage", str(at_work)])
    assert (result.exit_code, result.exception) == (0, None)
    assert "ovit: gradual pruning" in result.output
    result = CliRunner().invoke(cli, ["status", "mien", "--storage", str(at_work)])
    assert "did you mean 'mine'?" in str(result.exception)


def test_status__a_sweep_of_before_is_listed(tmp_path: Path) -> None:
    (tmp_path / "sweeps/old").mkdir(parents=True)
    assert "not known" in shown(tmp_path)
    with pytest.raises(InputError, match="no journal"):
        log_lines(str(tmp_path), "old", None)
