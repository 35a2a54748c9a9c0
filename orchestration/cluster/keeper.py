"""``python -m orchestration.cluster.keeper DRIVER SINCE``: ends what is left of a local Ray cluster.

The keeper's standard input closes when the driver ends, even if it is killed. Ray's servers then end by
themselves. Its agents do not: for a minute they try to report to the cluster that has ended. Workers that are
just starting notice the end only after their imports. The keeper recognises all these processes, and their
children, by the log files of the cluster's session that they have open for writing. Name, parent and
environment do not help: those of an agent change.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

_GRACE_SECONDS = 3.0  # for processes to end by themselves
_SECONDS = 15.0
_SESSION = re.compile(r"/(session_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d)_\d+_(\d+)/logs/")
NAME = "session_%Y-%m-%d_%H-%M-%S"
"""Begin of the name that Ray gives a session: its start time; microseconds and the driver's id follow."""


def leftover_processes(driver: int, since: str) -> list[psutil.Process]:
    """Processes of the sessions that a driver began at ``since`` (a :data:`NAME`) or later."""
    return [
        process
        for process in psutil.process_iter()
        if process.pid != os.getpid() and _belongs(process, driver, since)
    ]


def _belongs(process: psutil.Process, driver: int, since: str) -> bool:
    for path in _written(process):
        if (session := _SESSION.search(path)) and int(session[2]) == driver and session[1] >= since:
            return bool(process.pid != driver)
    return False


def _written(process: psutil.Process) -> Iterator[str]:
    """Ray's log files that a process has open for writing; without ``/proc`` all files that it has open.

    Standard output and error are not enough: those of an agent are pipes to itself, and it writes its log
    from them.
    """
    if not Path("/proc/self/fd").exists():
        with suppress(psutil.Error):
            yield from [file.path for file in process.open_files()]
        return
    folder = Path(f"/proc/{process.pid}")
    with suppress(OSError):  # the process has ended, or belongs to another user
        for descriptor in (folder / "fd").iterdir():
            with suppress(OSError):  # this file was closed meanwhile
                path = str(descriptor.readlink())
                if _SESSION.search(path) and _is_for_writing(folder / "fdinfo" / descriptor.name):
                    yield path


def _is_for_writing(information: Path) -> bool:
    """Return whether a process has a file open for writing; other processes have a log open to read it."""
    flags = re.search(r"^flags:\s*([0-7]+)$", information.read_text(), re.MULTILINE)
    return flags is None or int(flags[1], 8) & os.O_ACCMODE != os.O_RDONLY


def end(driver: int, since: str) -> list[psutil.Process]:
    """Wait for processes, and kill those that are still there; returns what lives even so."""
    began = time.monotonic()
    while processes := leftover_processes(driver, since):
        waited = time.monotonic() - began
        if waited > _SECONDS:
            return processes
        if waited > _GRACE_SECONDS:
            for process in processes:
                with suppress(psutil.Error):
                    process.kill()
        time.sleep(0.25)
    return []


def _described(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return f"{process.pid} ({process.name()})"
    return str(process.pid)


def main() -> None:
    """Wait for the driver's end, and then for that of its cluster; say what of it cannot be ended."""
    for kind in (signal.SIGINT, signal.SIGTERM):  # these signals end the driver, not its keeper
        signal.signal(kind, signal.SIG_IGN)
    sys.stdin.buffer.read()
    left = end(int(sys.argv[1]), sys.argv[2])
    if left:
        named = ", ".join(map(_described, left))
        with suppress(OSError):  # the terminal is gone
            sys.stderr.write(f"espalier: processes of Ray's could not be ended: {named}; kill -9 them\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
