"""Keeps an MLflow server up while any process uses it; a program of its own, run and not imported.

Each process that uses the server holds a shared lock on a file, which the system frees even after a kill. If
the server itself is killed it is started again, and waiting requests are sent then.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from typing import NoReturn

_LOOK_SECONDS = 0.25
_END_SECONDS = 5.0
_START_SECONDS = 20.0


def keep(users: str, command: list[str]) -> int:
    """Run ``command`` until no process holds ``users``; if it cannot start, return its exit status."""
    file = os.open(users, os.O_RDWR)
    asked: list[int] = []  # the last user asks it to end
    signal.signal(signal.SIGTERM, lambda kind, frame: asked.append(kind))
    while True:
        began = time.monotonic()
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        while (status := server.poll()) is None and not asked:
            if unused(file):
                end(server)
            time.sleep(_LOOK_SECONDS)
        if asked or status is None:
            end(server)
        if status > 0 and time.monotonic() - began < _START_SECONDS:  # negative after a signal
            return status
        end_rest()
        time.sleep(2 * _LOOK_SECONDS)


def end_rest() -> None:
    """End the processes that a killed server has left: its worker holds the port."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)


def unused(file: int) -> bool:
    """Return whether no process holds the lock; if so, none can take it until this process has ended."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def end(server: subprocess.Popen[bytes]) -> NoReturn:
    """End the process group: the server, its workers and us."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    try:
        server.wait(_END_SECONDS)
    finally:
        os.killpg(0, signal.SIGKILL)
    raise SystemExit


if __name__ == "__main__":
    sys.exit(keep(sys.argv[1], sys.argv[2:]))
