"""Addresses of clusters that do not answer are told in seconds."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from orchestration.common import network
from orchestration.common.network import LOOPBACK, check_reachable
from pruners.errors import InputError


@contextmanager
def listening(answer: bytes) -> Iterator[int]:
    """A port that takes requests and says ``answer``; without one it keeps them waiting."""
    with socket.socket() as server:
        server.bind((LOOPBACK, 0))
        server.listen()
        taken: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                taken.append(connection)
                if answer:
                    connection.recv(4096)
                    connection.sendall(answer)
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_network__a_jobs_port_that_answers(answer: bytes) -> None:
    with listening(answer) as port:
        check_reachable(f"http://{LOOPBACK}:{port}")


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH_9.6\r\n"])
def test_network__a_jobs_port_that_is_none(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_ANSWER_SECONDS", 0.5)
    began = time.monotonic()
    with listening(answer) as port, pytest.raises(InputError, match="no Ray cluster answers there"):
        check_reachable(f"http://{LOOPBACK}:{port}")
    assert time.monotonic() - began < 5.0


def test_network__a_client_port_that_listens() -> None:
    with listening(b"") as port:
        check_reachable(f"ray://{LOOPBACK}:{port}")


def test_network__nobody_listens() -> None:
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        for scheme in ("", "ray://", "http://"):
            with pytest.raises(InputError, match="no Ray cluster answers there"):
                check_reachable(f"{scheme}{LOOPBACK}:{free.getsockname()[1]}")
