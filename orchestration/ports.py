"""Ports for the servers that we start: on loopback only."""

from __future__ import annotations

import socket

from pruners.errors import InputError

LOOPBACK = "127.0.0.1"
_TRIED = 50


def free_port(first: int) -> int:
    """``first``, or the next port that nobody listens on.

    Raises:
        InputError: none within 50 of it.
    """
    for port in range(first, first + _TRIED):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return port
    raise InputError("--port", first, f"no free port within {_TRIED} of it")
