"""One run of a name at a time: a second one is refused before it touches anything."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from filelock import FileLock, Timeout
from pyarrow import fs

from orchestration.config import digest
from pruners.errors import InputError
from trainers import storage


@contextmanager
def alone_here(place: str, name: str) -> Iterator[None]:
    """Hold the name in a storage on this file system; the system frees it however the process ends.

    Raises:
        InputError: a run of this name is at work there.
    """
    system, path = storage.resolve(place)
    if not isinstance(system, fs.LocalFileSystem):  # where files cannot be locked, the cluster is asked
        yield
        return
    file = Path(path) / "locks" / f"{name}.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    about = file.with_suffix(".json")
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise _refused(name, _read(about)) from None
    try:
        about.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        yield
    finally:
        about.unlink(missing_ok=True)
        lock.release()


@contextmanager
def alone_on_cluster(root: str, name: str) -> Iterator[None]:
    """Hold the name on the Ray cluster, by an actor that goes with this driver.

    Raises:
        InputError: another driver holds it.
    """
    actor = f"espalier-{digest(root)}"
    try:
        holder = ray.remote(_Holder).options(name=actor, namespace="espalier", num_cpus=0).remote()
    except ValueError:  # the name is taken
        raise _refused(name, {}) from None
    try:
        yield
    finally:
        ray.kill(holder)


class _Holder:
    """Is there."""


def _refused(name: str, who: dict[str, Any]) -> InputError:
    by = f" (process {who['pid']} on {who['host']})" if who else ""
    return InputError("name", name, f"a run of this name is at work{by}; wait for it, or choose another name")


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    except (OSError, ValueError):
        return {}
