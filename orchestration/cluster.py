"""The Ray cluster: joined where an address says so, else started on this machine for as long as we run."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from orchestration import cluster_keeper
from orchestration.config import Resources
from orchestration.ports import LOOPBACK, check_reachable, reserve
from orchestration.search_config import AllocationSearch
from pruners.errors import InputError, first_line

# Our own display shows progress; Ray's would print a line a report and worker over it.
_QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours: it must end in seconds
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}

# Ray Train asks this address whether the controller of a trial is alive, and frees the resources of one that
# was stopped early. Left to find the address itself it gives up where two Ray clusters share a machine, and
# the next trial waits for ever.
_STATE_API = "RAY_API_SERVER_ADDRESS"
_DASHBOARD_PORT = 8265
_STARTS = 3
_KEEPER_SECONDS = 5.0

_JOIN_SECONDS = "RAY_gcs_server_port_wait_time_s"
# Ray waits half a minute for each of its servers to start, which is too short on a machine that is busy
_START_SECONDS = {"RAY_raylet_start_wait_time_s": "120", _JOIN_SECONDS: "120"}
_WRONG_TOKEN = "the cluster's token is missing or another one: see RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH"


@dataclass(frozen=True)
class ClusterSize:
    """What the cluster can give: CPUs and GPUs, counting what autoscaling may add.

    ``nodes`` holds the CPUs and GPUs of each node, or nothing where more of them may come.
    """

    cpus: float
    gpus: float
    nodes: tuple[tuple[float, float], ...] = ()

    def _pieces(self, cpus: float, gpus: float) -> int:
        """How many pieces of so much the nodes hold; a piece is not shared out over two."""
        return sum(
            int(min(node[0] / cpus, node[1] / gpus if gpus else math.inf) + 1e-6) for node in self.nodes
        )

    def training_runs(self, resources: Resources) -> int:
        """How many training runs fit at once.

        Raises:
            InputError: not even one.
        """
        for key, each, there in (
            ("CPUs", resources.cpus_per_worker, self.cpus),
            ("GPUs", resources.gpus_per_worker, self.gpus),
        ):
            if each * resources.least > there + 1e-6:
                raise InputError(
                    "resources.workers",
                    resources.least,
                    f"need {each * resources.least:g} {key}, the cluster can give {there:g}",
                )
        fit = [self.cpus / (resources.cpus_per_worker * resources.most)]
        if resources.gpus_per_worker:
            fit.append(self.gpus / (resources.gpus_per_worker * resources.most))
        if self.nodes:
            placed = self._pieces(resources.cpus_per_worker, resources.gpus_per_worker)
            if placed < resources.least:
                size = f"{resources.cpus_per_worker:g} CPUs and {resources.gpus_per_worker:g} GPUs"
                expected = f"the nodes hold {placed} workers of {size} each"
                raise InputError("resources.workers", resources.least, expected)
            fit.append(placed / resources.most)
        return max(int(min(fit) + 1e-6), 1)

    def allocation_trials(self, search: AllocationSearch) -> int:
        """How many cheap trials fit at once.

        Raises:
            InputError: not even one.
        """
        for key, each, there in (
            ("cpus_per_trial", search.cpus_per_trial, self.cpus),
            ("gpus_per_trial", search.gpus_per_trial, self.gpus),
        ):
            if each > there + 1e-6:
                raise InputError(f"allocation.{key}", each, f"the cluster can give {there:g}")
        if self.nodes and not self._pieces(search.cpus_per_trial, search.gpus_per_trial):
            size = f"{search.cpus_per_trial:g} CPUs and {search.gpus_per_trial:g} GPUs"
            raise InputError("allocation.cpus_per_trial", search.cpus_per_trial, f"no node has {size}")
        fit = [self.cpus / search.cpus_per_trial]
        if search.gpus_per_trial:
            fit.append(self.gpus / search.gpus_per_trial)
        return int(min(fit) + 1e-6)


def cluster_address(given: str | None) -> str | None:
    """Where the cluster is: as given, or as ``ray job submit`` says; ``None`` is this machine."""
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
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a failed trial is our own line
    if ray.is_initialized():  # a driver that runs as a task on the cluster
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
        os.environ.pop(_STATE_API, None)
        for keeper in _keepers:
            _dismiss(keeper)
        _keepers.clear()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray, as it starts, makes SIGTERM its own; here it stays what it was, and ends what has begun."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # Ray's handler
        ray.shutdown()
        raise KeyboardInterrupt from None
    except KeyboardInterrupt:
        ray.shutdown()
        raise
    else:
        signal.signal(signal.SIGTERM, before)


_keepers: list[subprocess.Popen[bytes]] = []


def _keep() -> None:
    """A process that outlives us, and ends what is left of the cluster then."""
    began = time.strftime(cluster_keeper.NAME)  # before Ray does
    command = [sys.executable, "-m", cluster_keeper.__name__, str(os.getpid()), began]
    places = os.pathsep.join(place for place in sys.path if place)  # also where we are not installed
    _keepers.append(
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches us alone
            env={**os.environ, "PYTHONPATH": places},
        )
    )


def _dismiss(keeper: subprocess.Popen[bytes]) -> None:
    """Let it look once more, and end."""
    assert keeper.stdin is not None, "made with a pipe"
    keeper.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        keeper.wait(_KEEPER_SECONDS)


def _start_local() -> None:
    """A cluster on this machine; another port is tried where somebody else was quicker to take the one."""
    _keep()
    for left in range(_STARTS - 1, -1, -1):
        try:
            _start_at_free_port()
            return
        except Exception as error:  # Ray raises its own log as a plain one
            if not left or "address already in use" not in str(error):
                raise
            ray.shutdown()


def _start_at_free_port() -> None:
    """All of this machine's processors, the dashboard on loopback, other ports behind a token."""
    port, lock = reserve(_DASHBOARD_PORT)
    # before the start, so that every process of the cluster inherits it
    os.environ[_STATE_API] = f"http://{LOOPBACK}:{port}"
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
    """Ray waits longer for its servers, unless the environment says for how long."""
    added = {key: value for key, value in _START_SECONDS.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            del os.environ[key]


def _join(address: str) -> None:
    """An existing cluster, whose processes learn from the job's environment where its dashboard is."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with _impatient():
        dashboard = ray.init(address=address, **quiet).dashboard_url
    variables = dict(_QUIET) | ({_STATE_API: f"http://{dashboard}"} if dashboard else {})
    ray.shutdown()
    ray.init(address=address, runtime_env={"env_vars": variables}, **quiet)


@contextmanager
def _impatient() -> Iterator[None]:
    """Ray tries for some seconds to join, not for twenty, and its lines about it are not seen."""
    given = os.environ.get(_JOIN_SECONDS)
    os.environ[_JOIN_SECONDS] = given or "5"
    sys.stderr.flush()
    seen = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # they come from compiled code
    try:
        yield
    finally:
        os.dup2(seen, 2)
        os.close(seen)
        if given is None:
            del os.environ[_JOIN_SECONDS]


def logs_folder() -> str:
    """Where the cluster that is joined keeps its logs on this machine."""
    return str(ray._private.worker._global_node.get_logs_dir_path())


def _is_refused(error: BaseException | None) -> bool:
    """Whether a token was missing or wrong, which Ray says at the bottom of its errors only."""
    while error is not None:
        if any(word in str(error) for word in ("Unauthenticated", "AuthToken", "authentication")):
            return True
        error = error.__cause__
    return False


def cluster_size() -> ClusterSize:
    """What the cluster that is joined can give just now."""
    there = dict(ray.cluster_resources())
    # an autoscaling cluster can give more than it has now
    possible = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return ClusterSize(
        cpus=max(there.get("CPU", 0.0), possible.get("CPU", 0.0)),
        gpus=max(there.get("GPU", 0.0), possible.get("GPU", 0.0)),
        nodes=() if possible else tuple((node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in alive),
    )
