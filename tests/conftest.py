"""What the tests of the whole share: one small sweep by the real command line, run once, and its MLflow."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from swept import Swept

if TYPE_CHECKING:
    from commands import Run
    from mlflow import MlflowClient

# read when torch is loaded: threads that wait for each other leave the cores to whoever else works there
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# images that tests copy to this machine are gone with them
_cache = tempfile.TemporaryDirectory(prefix="espalier-cache-")
os.environ.setdefault("ESPALIER_CACHE", _cache.name)


@pytest.fixture(scope="session")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """The sweep that most tests of the whole read; its tests fail together if it did not end well."""
    from commands import SMALL, run

    folder = tmp_path_factory.mktemp("sweep")
    return Swept(folder, run("sweep", str(SMALL), cwd=folder))


@pytest.fixture(scope="session")
def mlflow_uri(swept: Swept) -> Iterator[str]:
    """A server over what the sweep left, as ``espalier ui`` starts it."""
    from orchestration.tracking.server import tracking_folder
    from orchestration.tracking.tracker import server_for

    with server_for(None, tracking_folder(str(swept.storage))) as (uri, ready):
        ready()
        yield uri


@pytest.fixture(scope="session")
def client(mlflow_uri: str) -> MlflowClient:
    import mlflow

    return mlflow.MlflowClient(mlflow_uri)


@pytest.fixture
def run(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """The command line in this process, in an empty folder; ``@`` is the test file's fixture ``files``."""
    from orchestration.cli import app as cli

    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "ESPALIER_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(kind) for kind in kinds]

    def command(text: str) -> tuple[int, str, str]:
        typed = [
            part.replace("@", str(files)) if part.startswith("@") else part for part in shlex.split(text)
        ]
        monkeypatch.setattr(sys, "argv", ["espalier", *typed])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    yield command
    for kind, handler in zip(kinds, before, strict=True):
        signal.signal(kind, handler)


@pytest.fixture(scope="module")
def tune_here(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ray on this machine, for trainables that the test module itself defines."""
    from ray import cloudpickle

    from orchestration.cluster.connect import connect

    cloudpickle.register_pickle_by_value(request.module)  # workers do not find the tests
    try:
        with connect(None):
            yield
    finally:
        cloudpickle.unregister_pickle_by_value(request.module)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Any]:
    """Ray's head and one more node (``other``), a processor each; only the main thread may add nodes."""
    from commands import Family
    from ray.cluster_utils import Cluster

    from orchestration.common.network import LOOPBACK, free_port

    before = set(Family(os.getpid(), tmp_path, "none").look())
    head = {
        "num_cpus": 1,
        "include_dashboard": True,
        "dashboard_host": LOOPBACK,
        "dashboard_port": free_port(8265),
    }
    made = Cluster(initialize_head=True, head_node_args=head)
    family = Family(os.getpid(), tmp_path, "none")
    try:
        made.other = made.add_node(num_cpus=1)
        family.look()
        yield made
    finally:
        made.shutdown()
        family.end(but=before)
