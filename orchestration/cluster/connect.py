"""The Ray cluster of a command: joined at an address, or started on this machine until the command ends."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray

from orchestration.cluster import keeper
from orchestration.cluster.capacity import ClusterSize, cluster_size
from orchestration.common.network import LOOPBACK, check_reachable, reserve
from pruners.errors import InputError, first_line

# Our own display shows progress; Ray's display would print a line for each report and worker into it.
_QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # we handle Ctrl-C ourselves: the command must end within seconds
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}

# Ray Train asks this address whether the controller of a trial is alive, and frees the resources of a trial
# that was stopped early. Without the variable it does not find the address if two Ray clusters share a
# machine, and the next trial waits for ever.
_STATE_API = "RAY_API_SERVER_ADDRESS"
# Ray Train starts an actor for each run that watches for preempted nodes; this machine is not preempted
_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
_DASHBOARD_PORT = 8265
_STARTS = 3
_KEEPER_SECONDS = 5.0

_JOIN_SECONDS = "RAY_gcs_server_port_wait_time_s"
# Ray waits half a minute for each of its servers to start, which is too short on a busy machine
_START_SECONDS = {"RAY_raylet_start_wait_time_s": "120", _JOIN_SECONDS: "120"}
_WRONG_TOKEN = "the cluster's token is missing or another one: see RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH"


def cluster_address(given: str | None) -> str | None:
    """The cluster's address: as given, or as ``ray job submit`` says; ``None`` is this machine."""
    return given or os.environ.get("RAY_ADDRESS") or None


@contextmanager
def connect(address: str | None) -> Iterator[ClusterSize]:
    """Join the cluster at ``address`` (or ``RAY_ADDRESS``), or start one here; leave it at the end.

    A local cluster keeps its dashboard on, on loopback: without it Ray Train cannot free the resources of
    a trial that was stopped early, and the next trial would wait for ever.

    Raises:
        InputError: no cluster answers at the address.
    """
    os.environ.update({key: os.environ.get(key, value) for key, value in _QUIET.items()})
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # we print a line for a failed trial
    if ray.is_initialized():  # the driver runs as a task on the cluster
        yield cluster_size()
        return
    joined = cluster_address(address)
    if joined and joined not in ("auto", "local"):
        check_reachable(joined, "--address" if address else "RAY_ADDRESS")
    try:
        with _own_signals():
            if joined:
                _join(joined)
            else:
                _start_local()
    except (ConnectionError, RuntimeError, TimeoutError, ValueError, OSError) as error:
        reason = _WRONG_TOKEN if _is_refused(error) else first_line(error)
        raise InputError(
            "--address", joined or "local", f"no Ray cluster could be joined ({reason})"
        ) from None
    try:
        yield cluster_size()
    finally:
        ray.shutdown()
        for variable in (_STATE_API, _WATCHER):
            os.environ.pop(variable, None)
        for process in _keeper_processes:
            _dismiss(process)
        _keeper_processes.clear()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep our handler of SIGTERM while Ray starts, which replaces it; SIGTERM ends the new cluster then."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # raised by Ray's handler of SIGTERM
        ray.shutdown()
        raise KeyboardInterrupt from None
    except KeyboardInterrupt:
        ray.shutdown()
        raise
    else:
        signal.signal(signal.SIGTERM, before)


_keeper_processes: list[subprocess.Popen[bytes]] = []


def _keep() -> None:
    """Start the keeper, a process that outlives us, and then ends what is left of the cluster."""
    began = time.strftime(keeper.NAME)  # before Ray begins
    command = [sys.executable, "-m", keeper.__name__, str(os.getpid()), began]
    search_path = os.pathsep.join(
        folder for folder in sys.path if folder
    )  # the keeper must find us where we are not installed
    _keeper_processes.append(
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # on our standard error it says what it could not end
            start_new_session=True,  # Ctrl-C reaches us alone
            env={**os.environ, "PYTHONPATH": search_path},
        )
    )


def _dismiss(process: subprocess.Popen[bytes]) -> None:
    """Let the keeper look for leftover processes once more, and end."""
    assert process.stdin is not None, "made with a pipe"
    process.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_KEEPER_SECONDS)


def _start_local() -> None:
    """Start a cluster on this machine; try another port if another process took the first one meanwhile."""
    _keep()
    for left in range(_STARTS - 1, -1, -1):
        try:
            _start_at_free_port()
            return
        except Exception as error:  # Ray raises a plain Exception with its log
            if not left or "address already in use" not in str(error):
                raise
            ray.shutdown()


def _start_at_free_port() -> None:
    """Start a cluster with all processors; its dashboard is on loopback, other ports require a token."""
    port, lock = reserve(_DASHBOARD_PORT)
    # before the start, so that every process of the cluster inherits it
    os.environ[_STATE_API] = f"http://{LOOPBACK}:{port}"
    os.environ[_WATCHER] = "0"
    try:
        with _patient():
            ray.init(
                address="local",
                include_dashboard=True,
                dashboard_host=LOOPBACK,
                dashboard_port=port,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    finally:
        os.close(lock)


@contextmanager
def _patient() -> Iterator[None]:
    """Let Ray wait longer for its servers, unless an environment variable already says how long."""
    added = {key: value for key, value in _START_SECONDS.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            del os.environ[key]


def _join(address: str) -> None:
    """Join an existing cluster; the job's environment tells its processes where the dashboard is."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with _impatient():
        dashboard = ray.init(address=address, **quiet).dashboard_url
    variables = dict(_QUIET) | ({_STATE_API: f"http://{dashboard}"} if dashboard else {})
    ray.shutdown()
    ray.init(address=address, runtime_env={"env_vars": variables}, **quiet)


@contextmanager
def _impatient() -> Iterator[None]:
    """Let Ray try to join for 5 seconds instead of 20, and hide the lines that it prints meanwhile."""
    given = os.environ.get(_JOIN_SECONDS)
    os.environ[_JOIN_SECONDS] = given or "5"
    sys.stderr.flush()
    seen = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # Ray's lines come from compiled code
    try:
        yield
    finally:
        os.dup2(seen, 2)
        os.close(seen)
        if given is None:
            del os.environ[_JOIN_SECONDS]


def _is_refused(error: BaseException | None) -> bool:
    """Return whether a token was missing or wrong, which only the innermost of Ray's errors says."""
    while error is not None:
        if any(word in str(error) for word in ("Unauthenticated", "AuthToken", "authentication")):
            return True
        error = error.__cause__
    return False


@contextmanager
def joined(address: str) -> Iterator[None]:
    """Join a cluster through Ray's client at ``address``, and leave it at the end.

    Raises:
        InputError: no cluster answers there.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray also raises an error for what it warns of
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError, OSError) as error:
        reason = first_line(error)
        raise InputError("--address", address, f"no Ray cluster could be joined ({reason})") from None
    try:
        yield
    finally:
        ray.shutdown()
