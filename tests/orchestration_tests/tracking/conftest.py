"""An MLflow server that the tests of a module share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from orchestration.tracking.server import Server, start_server
from orchestration.tracking.tracker import Tracker


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_server(tmp_path_factory.mktemp("mlflow"))
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture
def tracker(running: Server) -> Iterator[Tracker]:
    made = Tracker(running.uri, "tests")
    yield made
    made.abandon("KILLED")
