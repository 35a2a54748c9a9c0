"""State of a sweep's driver, kept in the sweep's folder so that other processes can read it."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Literal, Protocol, TypedDict, cast

from orchestration.state.stored_recipe import folder_of
from pruners.errors import first_line
from trainers import storage

_BEAT_SECONDS = 5.0
_JOIN_SECONDS = 30.0
_SILENCE_SECONDS = 120.0  # clocks differ, object stores are slow
_STATE, _STOP = "state.json", "stop"

State = Literal["running", "finished", "interrupted", "failed", "gone"]


class PhaseProgress(TypedDict):
    """A phase that has begun.

    Attributes:
        name: as it is shown.
        trials: how many it has in all.
        label: what its trials are called by, before their numbers.
        log: the file of its trials; ``None``: it has none.
        summary: the line at its end; ``None``: it has not ended.
    """

    name: str
    trials: int
    label: str
    log: str | None
    summary: str | None


class SweepProgress(TypedDict):
    """How far a sweep is.

    Attributes:
        planned: how many phases there will be.
        phases: those that have begun.
        running: how many trials are at work.
        left: the time that the phase still takes, where it can be told.
        said: the last lines that the display printed.
    """

    planned: int
    phases: list[PhaseProgress]
    running: int
    left: str | None
    said: list[str]


class SweepState(SweepProgress):
    """The content of ``state.json``; its times are seconds since 1970.

    Attributes:
        host: of the driver; ``pid`` is its process there.
        began: when the driver began.
        ray_logs: where Ray writes its own logs on that host.
        state: ``gone`` is never written: it is read where a driver ended without a word.
        reason: why it failed.
        updated: when this was written.
    """

    host: str
    pid: int
    began: float
    ray_logs: str
    state: State
    reason: str | None
    updated: float


class Progress(Protocol):
    """An object that knows the progress of a sweep: the display."""

    def snapshot(self) -> SweepProgress:
        """What is known now."""


class Heartbeat:
    """Keeps ``state.json`` while a sweep runs: what its display shows, and how it ended.

    A thread writes the file every few seconds, so that its age also shows whether the driver lives. It also
    checks whether :func:`ask_to_stop` was called on any machine; the sweep then ends as after Ctrl-C. This
    needs only the storage.
    """

    def __init__(self, storage_uri: str, name: str, display: Progress, ray_logs: str) -> None:
        """Prepare the state file of the sweep ``name``; ``ray_logs`` is the folder of Ray's own logs."""
        self._root, self._display = folder_of(storage_uri, name), display
        self._prefix = f"{storage.absolute(storage_uri)}/"
        self._ended = threading.Event()
        self._beat = threading.Thread(target=self._keep, name="heartbeat", daemon=True)
        self._host, self._pid = socket.gethostname(), os.getpid()
        self._began, self._ray_logs = time.time(), ray_logs

    def __enter__(self) -> Heartbeat:
        if storage.exists(f"{self._root}/{_STOP}"):  # a request to stop an earlier run
            storage.remove_file(f"{self._root}/{_STOP}")
        self._write("running")
        self._beat.start()
        # Ray starts jobs and tasks with SIGINT blocked; the thread sends it to this one
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._beat.join(_JOIN_SECONDS)  # its last write must not come after ours
        state: State = "interrupted" if error is not None else "finished"
        if isinstance(error, Exception):
            state = "failed"
        with suppress(OSError):  # an error of the storage must not hide the one that ended the sweep
            self._write(state, first_line(error) if state == "failed" and error is not None else None)

    def _keep(self) -> None:
        while not self._ended.wait(_BEAT_SECONDS):
            try:
                self._write("running")
                asked = storage.exists(f"{self._root}/{_STOP}")
            except OSError:  # the storage is away for a moment; whoever needs it raises
                continue
            if asked:
                main = threading.main_thread().ident
                assert main is not None, "the main thread has begun"
                signal.pthread_kill(main, signal.SIGINT)
                return

    def _write(self, state: State, reason: str | None = None) -> None:
        progress = self._display.snapshot()
        for phase in progress["phases"]:
            phase["log"] = phase["log"] and phase["log"].removeprefix(self._prefix)
        content: SweepState = {
            **progress,
            "host": self._host,
            "pid": self._pid,
            "began": self._began,
            "ray_logs": self._ray_logs,
            "state": state,
            "reason": reason,
            "updated": time.time(),
        }
        storage.write_json(f"{self._root}/{_STATE}", content)


def read(storage_uri: str, name: str) -> SweepState | None:
    """The last state that a sweep's driver wrote; ``state`` is ``gone`` if the driver was killed since."""
    file = f"{folder_of(storage_uri, name)}/{_STATE}"
    if not storage.exists(file):
        return None
    state = cast(SweepState, storage.read_json(file))
    if state["state"] == "running" and not _lives(state):
        state["state"] = "gone"
    return state


def ask_to_stop(storage_uri: str, name: str) -> None:
    """Ask the driver of a sweep to end, by a file for which it looks."""
    storage.write_bytes(f"{folder_of(storage_uri, name)}/{_STOP}", b"")


def _lives(state: SweepState) -> bool:
    if time.time() - state["updated"] > _SILENCE_SECONDS:
        return False
    if state["host"] != socket.gethostname():
        return True
    try:
        os.kill(state["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
