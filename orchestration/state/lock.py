"""Locks: one run of a name at a time, and one sweep at a time that makes a shared artifact.

A second run of the same name is refused before it changes anything. A second sweep that needs an artifact
which another sweep is making waits for it. A lock is free as soon as its holder has ended, even if it was
killed.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
from filelock import FileLock, Timeout
from pyarrow import fs
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestration.common.hashing import digest
from pruners.errors import InputError
from trainers import storage

_LOOK_SECONDS = 1.0
_HOLDER_SECONDS = 0.5


class TakenError(Exception):
    """Another process holds the lock; ``by`` names its process and host, if they are known."""

    def __init__(self, who: dict[str, Any]) -> None:
        self.by = f" (process {who['pid']} on {who['host']})" if who else ""


@contextmanager
def local_lock(storage_uri: str, name: str) -> Iterator[None]:
    """Lock the name of a run in a storage on this file system; the system frees it even after a kill.

    Raises:
        InputError: a run of this name is active there.
    """
    with ExitStack() as held:
        try:
            held.enter_context(_file_lock(storage_uri, name))
        except TakenError as taken:
            raise _refused(name, taken) from None
        yield


@contextmanager
def cluster_lock(root: str, name: str) -> Iterator[None]:
    """Lock the name of a run on the Ray cluster, by an actor that ends with this driver.

    Raises:
        InputError: another driver holds it.
    """
    with ExitStack() as held:
        try:
            held.enter_context(_actor_lock(root))
        except TakenError as taken:
            raise _refused(name, taken) from None
        yield


@contextmanager
def artifact_lock(
    storage_uri: str, artifact: str, wait: Callable[[str], None], *, by_cluster: bool
) -> Iterator[None]:
    """Lock a shared artifact of a storage; if another process holds the lock, wait, and be interruptible.

    Lock one artifact at a time: two processes that wait for each other would wait for ever.

    Args:
        storage_uri: the storage.
        artifact: its folder in the storage (``dense/KEY``).
        wait: called once before waiting, with the holder's process and host.
        by_cluster: also lock by the Ray cluster, which is done anyway if the storage has no file locks.

    Returns:
        A context manager; it is entered when the artifact is free.
    """
    waiting = False
    while True:
        with ExitStack() as held:
            try:
                held.enter_context(_file_lock(storage_uri, f"shared/{artifact}"))
                if by_cluster or not storage.is_local(storage_uri):
                    held.enter_context(_actor_lock(f"{storage.absolute(storage_uri)}/{artifact}"))
            except TakenError as taken:
                if not waiting:
                    wait(taken.by)
                waiting = True
            else:
                yield
                return
        time.sleep(_LOOK_SECONDS)


@contextmanager
def _file_lock(storage_uri: str, name: str) -> Iterator[None]:
    """Lock a file of the storage, if it is a local file system; otherwise do nothing.

    Raises:
        TakenError: another process holds it.
    """
    system, path = storage.resolve(storage_uri)
    if not isinstance(system, fs.LocalFileSystem):  # without file locks the lock is by the cluster
        yield
        return
    file = Path(path) / "locks" / f"{name}.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    about = file.with_suffix(".json")
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise TakenError(_read(about)) from None
    try:
        about.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        yield
    finally:
        about.unlink(missing_ok=True)
        lock.release()


@contextmanager
def _actor_lock(key: str) -> Iterator[None]:
    """Take a name on the Ray cluster.

    Raises:
        TakenError: another driver of the cluster holds it.
    """
    # on the driver's own node: another node may be lost while the driver continues
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"name": f"espalier-{digest(key)}", "namespace": "espalier", "num_cpus": 0}
    try:
        holder = ray.remote(_Holder).options(**options, scheduling_strategy=here, max_restarts=-1).remote()
    except ValueError:  # the name is taken
        raise TakenError({}) from None
    try:
        yield
    finally:
        ray.kill(holder)


class _Holder:
    """Empty actor: its name on the cluster is the lock."""


def _refused(name: str, taken: TakenError) -> InputError:
    expected = f"a run of this name is at work{taken.by}; wait for it, or choose another name"
    return InputError("name", name, expected)


def _read(path: Path) -> dict[str, Any]:
    """Read process and host of the holder from a file, which it writes just after it has the lock."""
    deadline = time.monotonic() + _HOLDER_SECONDS
    while True:
        try:
            holder: dict[str, Any] = json.loads(path.read_text())
            return holder
        except (OSError, ValueError):
            if time.monotonic() > deadline:
                return {}
        time.sleep(0.05)
