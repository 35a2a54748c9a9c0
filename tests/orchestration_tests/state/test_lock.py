"""Two runs of the same name: the second is refused before it touches anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestration.state.lock import local_lock
from pruners.errors import InputError

SECOND = """
import sys
from orchestration.state.lock import local_lock
with local_lock(sys.argv[1], sys.argv[2]):
    print("held")
"""


def second(folder: Path, name: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SECOND, str(folder), name]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_lock__a_second_process_is_refused(tmp_path: Path) -> None:
    with local_lock(str(tmp_path), "mine"):
        refused = second(tmp_path, "mine")
        assert f"process {os.getpid()} on" in refused.stderr
        assert "name = 'mine'" in refused.stderr
        assert second(tmp_path, "another").stdout == "held\n"
    assert second(tmp_path, "mine").stdout == "held\n"


def test_lock__a_process_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    code = SECOND.replace('print("held")', 'print("held", flush=True); import os; os.kill(os.getpid(), 9)')
    subprocess.run([sys.executable, "-c", code, str(tmp_path), "mine"], timeout=60, check=False)
    assert second(tmp_path, "mine").stdout == "held\n"


def test_lock__an_error_inside_frees_the_name(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), local_lock(str(tmp_path), "mine"):
        raise ZeroDivisionError
    with local_lock(str(tmp_path), "mine"):
        pass
    with (
        local_lock(str(tmp_path), "mine"),
        pytest.raises(InputError, match="is at work"),
        local_lock(str(tmp_path), "mine"),
    ):
        pass
