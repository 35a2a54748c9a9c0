"""Our own MLflow server on loopback, a process of its own.

All processes of this machine that log to the same folder share one server: two servers that create the
database at the same time would both fail. The first process starts the server. It ends with the last process
that uses it, even if that is killed.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from orchestration.common import defaults
from orchestration.common.network import LOOPBACK, reserve
from pruners.errors import InputError
from pruners.redaction import strip_credentials
from trainers import storage

DEFAULT_PORT = 5000
_READY_SECONDS = 90.0
_END_SECONDS = 12.0  # the keeper gives the server five of them
_LOOK_SECONDS = 2.0
_KEEPER = Path(__file__).with_name("server_keeper.py")


class _Files:
    """Lock files beside the database, for the processes of this machine; no others can reach the server."""

    def __init__(self, folder: Path) -> None:
        host = socket.gethostname()
        self.start = folder / f"start-{host}.lock"  # held to start a server, or to see whether there is one
        self.keeper = folder / f"keeper-{host}.lock"  # held by the keeper, while there is one
        self.users = folder / f"users-{host}.lock"  # shared by all who use the server
        self._about = folder / f"server-{host}.json"

    def write(self, **about: Any) -> None:
        self._about.write_text(json.dumps(about), encoding="utf-8")

    def read(self) -> dict[str, Any]:
        """The server's address, and the ``pid`` of its keeper; outdated unless the keeper lives."""
        content: dict[str, Any] = json.loads(self._about.read_text(encoding="utf-8"))
        return content


@dataclass
class Server:
    """An ``mlflow server`` of ours: SQLite and artifacts in one local folder, loopback only.

    Attributes:
        shared: whether another process had started it.
    """

    uri: str
    folder: Path
    users: int
    keeper: subprocess.Popen[bytes] | None
    _left: threading.Event = field(default_factory=threading.Event)
    _guard: threading.Thread | None = None

    @property
    def shared(self) -> bool:
        return self.keeper is None

    def wait_ready(self) -> None:
        """Wait until the server answers.

        Raises:
            RuntimeError: it ended, or did not answer in time.
        """
        deadline = time.monotonic() + _READY_SECONDS
        while time.monotonic() < deadline:
            if not self.lives():
                status = "" if self.keeper is None else f" with status {self.keeper.wait(_END_SECONDS)}"
                raise RuntimeError(f"the MLflow server ended{status}; see {self.folder / 'server.log'}")
            if answers(self.uri, timeout=1.0):
                return
            time.sleep(0.2)
        raise RuntimeError(f"the MLflow server at {self.uri} did not answer in {_READY_SECONDS:.0f} s")

    def lives(self) -> bool:
        """Return whether the server's keeper is alive."""
        files = _Files(self.folder)
        with FileLock(files.start):
            held = _locked(files.keeper)
        if held is not None:
            os.close(held)
        return held is None

    def guard(self) -> None:
        """From now on, restart the server at its address if its keeper is killed; requests wait for it."""
        self._guard = threading.Thread(target=self._look_after, name="mlflow-guard", daemon=True)
        self._guard.start()

    def _look_after(self) -> None:
        while not self._left.wait(_LOOK_SECONDS):
            # no room, no port: at the next look, perhaps
            with suppress(OSError, InputError, subprocess.SubprocessError):
                if not self.lives():
                    self._start_again()

    def _start_again(self) -> None:
        files = _Files(self.folder)
        with FileLock(files.start):
            keeper = _locked(files.keeper)
            if keeper is None:  # another user of it was quicker
                return
            try:
                if self.keeper is not None:
                    self.keeper.wait(_END_SECONDS)
                _end_rest(files)
                made = _start(self.folder, files, int(self.uri.rpartition(":")[2]), self.users, keeper)
            finally:
                os.close(keeper)
            self.keeper = made.keeper
            if made.uri != self.uri and made.keeper is not None:  # at an address that no client knows
                os.killpg(made.keeper.pid, signal.SIGKILL)

    def stop(self) -> None:
        """Stop using it; without other users it ends, with its workers, before this returns."""
        self._left.set()
        if self._guard is not None:
            self._guard.join()
        try:
            fcntl.flock(self.users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        else:
            self._end()
        finally:
            os.close(self.users)

    def _end(self) -> None:
        pid = _Files(self.folder).read().get("pid")
        for kind in (signal.SIGTERM, signal.SIGKILL):
            if pid is None or not self.lives():  # while the keeper lives, no other process has its number
                break
            os.killpg(pid, kind)
            deadline = time.monotonic() + _END_SECONDS
            while self.lives() and time.monotonic() < deadline:
                time.sleep(0.05)
        if self.keeper is not None:
            self.keeper.wait(_END_SECONDS)
        _end_rest(_Files(self.folder))


def tracking_folder(storage_uri: str) -> Path:
    """The folder for our own server's files: beside the results, or on this machine if those are remote."""
    where = storage.absolute(storage_uri).removeprefix("file://")
    return Path(defaults.STORAGE if "://" in where else where).absolute() / "mlflow"


def start_server(folder: Path, port: int = DEFAULT_PORT) -> Server:
    """Join the server over ``folder``, or start it; :meth:`Server.wait_ready` waits for its first answer.

    Args:
        folder: of the database and the artifacts.
        port: of a new server; if it is taken, the next free port.

    Returns:
        The server, which stays up while this process uses it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = _Files(folder)
    users = _shared(files.users)
    try:
        with FileLock(files.start):
            keeper = _locked(files.keeper)
            if keeper is None:
                return Server(files.read()["uri"], folder, users, None)
            try:
                _end_rest(files)
                return _start(folder, files, port, users, keeper)
            finally:
                os.close(keeper)  # the keeper inherited it
    except BaseException:
        os.close(users)
        raise


def _start(folder: Path, files: _Files, port: int, users: int, keeper: int) -> Server:
    """Start a keeper, which inherits its lock and the lock of its port, and write its address to a file."""
    free, port_lock = reserve(port)
    uri = f"http://{LOOPBACK}:{free}"
    command = [sys.executable, "-I", str(_KEEPER), str(files.users), sys.executable, "-m", "mlflow", "server"]
    command += ["--host", LOOPBACK, "--port", str(free)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    files.write(uri=uri)
    try:
        with (folder / "server.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(keeper, port_lock),
                start_new_session=True,  # Ctrl-C reaches only us; we end the server in order
                env={**os.environ, **quiet_environment()},
            )
    finally:
        os.close(port_lock)
    files.write(uri=uri, pid=process.pid)
    return Server(uri, folder, users, process)


def _end_rest(files: _Files) -> None:
    """End the servers that a killed keeper has left: they hold the port and the database."""
    import psutil

    try:
        group = files.read().get("pid")
    except (OSError, ValueError):  # there was no keeper
        return
    if group is None or psutil.pid_exists(group):  # its number is somebody else's by now
        return
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            if os.getpgid(process.pid) == group and "mlflow" in " ".join(process.cmdline()):
                process.kill()


def _locked(file: Path) -> int | None:
    """Lock a file; ``None`` where another process holds it."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _shared(file: Path) -> int:
    """Lock a file as one of several users; wait for a server that is about to end.

    Raises:
        RuntimeError: the server does not end.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + 2 * _END_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise RuntimeError(f"the MLflow server of {file.parent} is ending, and does not") from None
            time.sleep(0.1)
        else:
            return descriptor


def answers(uri: str, timeout: float) -> bool:
    """Return whether an HTTP server answers at all (asking for a password is an answer)."""
    try:
        with urllib.request.urlopen(f"{strip_credentials(uri).rstrip('/')}/health", timeout=timeout):
            return True
    except urllib.error.HTTPError as error:
        return error.code in {401, 403}
    except (OSError, ValueError):
        return False


def quiet_environment() -> dict[str, str]:
    """Variables that turn off telemetry and progress bars, and make MLflow fail within seconds."""
    wanted = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # MLflow's job runner would start ten processes
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "GIT_PYTHON_REFRESH": "quiet",
    }
    return {key: os.environ.get(key, value) for key, value in wanted.items()}
