"""An MLflow server of ours on loopback, and whether one answers at all; it is run, not imported."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from orchestration.ports import LOOPBACK, free_port
from orchestration.public import without_password
from trainers import storage

DEFAULT_PORT = 5000
_READY_SECONDS = 90.0

# Its standard input closes when we end, however we end; then the server, in the same group, ends too. One
# that somebody killed is started again: what waits for it is sent then.
_KEEPER = """
import os, subprocess, sys, threading, time
def end():
    sys.stdin.buffer.read()
    os.killpg(0, 15)
threading.Thread(target=end, daemon=True).start()
while True:
    began = time.monotonic()
    status = subprocess.call(sys.argv[1:], stdin=subprocess.DEVNULL)
    if status > 0 and time.monotonic() - began < 20:  # it cannot start; a signal has a negative one
        sys.exit(status)
    time.sleep(0.5)
"""


@dataclass
class Server:
    """An ``mlflow server`` of ours: SQLite and artifacts in one local folder, loopback only."""

    uri: str
    process: subprocess.Popen[bytes]

    def wait_ready(self) -> None:
        """Raises:
        RuntimeError: it ended, or did not answer in time.
        """
        deadline = time.monotonic() + _READY_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the MLflow server ended with status {self.process.returncode}")
            if answers(self.uri, timeout=1.0):
                return
            time.sleep(0.2)
        raise RuntimeError(f"the MLflow server at {self.uri} did not answer in {_READY_SECONDS:.0f} s")

    def stop(self) -> None:
        """End it and its workers, which share its process group."""
        for stop, seconds in ((15, 5.0), (9, 5.0)):
            try:
                os.killpg(self.process.pid, stop)
            except ProcessLookupError:
                break
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                continue
        self.process.wait(5.0)


def tracking_folder(place: str) -> Path:
    """Where a server of ours keeps its files: beside the results, or here if those are remote."""
    where = storage.absolute(place).removeprefix("file://")
    return Path("runs" if "://" in where else where).absolute() / "mlflow"


def start_server(folder: Path, port: int = DEFAULT_PORT) -> Server:
    """Start a server over ``folder``, at ``port`` or the next free one; :meth:`Server.wait_ready` waits."""
    folder.mkdir(parents=True, exist_ok=True)
    free = free_port(port)
    command = [sys.executable, "-c", _KEEPER, sys.executable, "-m", "mlflow", "server"]
    command += ["--host", LOOPBACK, "--port", str(free)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    log = (folder / "server.log").open("ab")
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        start_new_session=True,  # Ctrl-C reaches us first; we end it in order
        env={**os.environ, **quiet_environment()},
    )
    log.close()
    return Server(f"http://{LOOPBACK}:{free}", process)


def answers(uri: str, timeout: float) -> bool:
    """Whether an HTTP server answers at all (asking for a password is an answer)."""
    try:
        with urllib.request.urlopen(f"{without_password(uri).rstrip('/')}/health", timeout=timeout):
            return True
    except urllib.error.HTTPError as error:
        return error.code in {401, 403}
    except (OSError, ValueError):
        return False


def quiet_environment() -> dict[str, str]:
    """No telemetry, no progress bars, and failures in seconds rather than minutes."""
    wanted = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # its job runner costs ten processes
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "GIT_PYTHON_REFRESH": "quiet",
    }
    return {key: os.environ.get(key, value) for key, value in wanted.items()}
