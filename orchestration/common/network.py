"""Addresses and ports: whether a cluster answers, and free ports of loopback for servers that we start."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import tempfile
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from pruners.errors import InputError

_ANSWER_SECONDS = 5.0
LOOPBACK = "127.0.0.1"
_TRIED = 50


def check_reachable(address: str, key: str = "--address") -> None:
    """Check that a cluster answers at ``ray://HOST:PORT``, ``http://…`` or ``HOST:PORT``.

    Ray itself tries for a minute.

    Args:
        address: of the cluster.
        key: names it in errors.

    Raises:
        InputError: none does, within seconds.
    """
    host, colon, port = address.rpartition("://")[2].rstrip("/").rpartition(":")
    scheme = address.partition("://")[0] if "://" in address else "ray"
    if not colon or not port.isdigit() or scheme not in ("ray", "http", "https"):
        expected = "must be auto, HOST:PORT, ray://HOST:PORT or http://HOST:PORT"
        raise InputError(key, address, expected)
    try:
        if scheme in ("http", "https"):
            _ask(f"{address.rstrip('/')}/api/version")
        else:
            socket.create_connection((host, int(port)), _ANSWER_SECONDS).close()
    except (OSError, OverflowError, HTTPException) as error:
        raise InputError(key, address, f"no Ray cluster answers there ({error})") from None


def _ask(url: str) -> None:
    """Connect to an address within a time limit; Ray's own client waits for ever for a silent port."""
    with contextlib.suppress(urllib.error.HTTPError):  # asking for a token is an answer
        urllib.request.urlopen(url, timeout=_ANSWER_SECONDS).close()


def free_port(first: int) -> int:
    """``first``, or the next port that nobody listens on.

    Raises:
        InputError: none within 50 of it.
    """
    for port in range(first, first + _TRIED):
        if _is_free(port):
            return port
    raise InputError("port", first, f"no free port within {_TRIED} of it")


def reserve(first: int) -> tuple[int, int]:
    """:func:`free_port`, and a locked file, so that other commands of this user do not take the same port.

    The lock holds even before a process listens at the port, and also for a process that inherits the file;
    the caller closes it.

    Raises:
        InputError: as :func:`free_port`.
    """
    folder = Path(tempfile.gettempdir()) / f"espalier-ports-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    for port in range(first, first + _TRIED):
        file = os.open(folder / f"{port}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_free(port):
                return port, file
        except BlockingIOError:
            pass
        os.close(file)
    raise InputError("port", first, f"no free port within {_TRIED} of it")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True
