"""What outlives a killed driver is ended, and nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestration.cluster import connect
from orchestration.cluster import keeper as keeper_module

OTHER = 4_194_305  # no process has so large a number


@contextmanager
def process(folder: Path, session: str, how: str = "output") -> Iterator[subprocess.Popen[bytes]]:
    """One that has a log of a session open, under another name, as Ray's do.

    Args:
        how: as its ``output``, by a descriptor ``beside`` that, as Ray's agents, or to be ``read`` alone.
    """
    logs = folder / session / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    (logs / "agent.out").touch()
    with (logs / "agent.out").open("rb" if how == "read" else "ab") as log:
        files = {"stdout": log, "stderr": log} if how == "output" else {"pass_fds": [log.fileno()]}
        made = subprocess.Popen(["sleep", "60"], start_new_session=True, **files)
    try:
        yield made
    finally:
        made.kill()
        made.wait()


@pytest.fixture
def keeper() -> Iterator[subprocess.Popen[bytes]]:
    """A keeper of a driver that lives until its standard input is closed."""
    since = "session_2026-03-01_12-00-00"
    command = [sys.executable, "-m", keeper_module.__name__, str(OTHER), since]
    search_path = os.pathsep.join(folder for folder in sys.path if folder)
    made = subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, "PYTHONPATH": search_path})
    yield made
    made.kill()
    made.wait()


def test_keeper__what_a_killed_driver_leaves_is_ended(
    tmp_path: Path, keeper: subprocess.Popen[bytes]
) -> None:
    assert keeper.stdin is not None
    with ExitStack() as stack:
        left, others = (
            [stack.enter_context(process(tmp_path, *arguments)) for arguments in processes]
            for processes in (
                [(f"session_2026-03-01_12-00-03_123456_{OTHER}", how) for how in ("output", "beside")],
                [
                    (f"session_2026-03-01_12-00-03_123456_{OTHER + 1}",),  # of another driver
                    (f"session_2026-02-28_12-00-03_123456_{OTHER}",),  # of one before it, with its number
                    (f"session_2026-03-01_12-00-03_123456_{OTHER}", "read"),  # somebody looks at a log
                ],
            )
        )
        time.sleep(1)
        assert all(process.poll() is None for process in (*left, *others))  # as long as the driver lives
        keeper.stdin.close()
        assert keeper.wait(20) == 0
        assert [process.wait(1) for process in left] == [-9, -9]
        assert all(process.poll() is None for process in others)


STUBBORN = """
import psutil
from orchestration.cluster import keeper
psutil.Process.kill = lambda process: None  # as one in an uninterruptible wait, or of another user
keeper._GRACE_SECONDS, keeper._SECONDS = 0.1, 1.0
keeper.main()
"""


def test_keeper__what_cannot_be_ended_is_said(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STUBBORN, str(OTHER), "session_2026-03-01_12-00-00"]
    with process(tmp_path, f"session_2026-03-01_12-00-03_123456_{OTHER}") as left:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        message = f"espalier: processes of Ray's could not be ended: {left.pid} (sleep); kill -9 them\n"
        assert (done.returncode, done.stdout, done.stderr) == (1, "", message)


def test_keeper__what_it_says_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "talker.py").write_text("import sys; sys.stdin.read(); print('left', file=sys.stderr)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(connect, "keeper", SimpleNamespace(NAME=keeper_module.NAME, __name__="talker"))
    connect._keep()
    connect._dismiss(connect._keeper_processes.pop())
    assert capfd.readouterr().err == "left\n"
