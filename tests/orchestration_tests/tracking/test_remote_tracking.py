"""An MLflow server that others run: behind a login, below a path of a host that serves other things too."""

from __future__ import annotations

import base64
import http.client
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from matplotlib.figure import Figure
from mlflow import MlflowClient

from orchestration.tracking import registry
from orchestration.tracking.check import check_uri
from orchestration.tracking.datasets import Dataset
from orchestration.tracking.registry import open_registry
from orchestration.tracking.server import answers, start_server
from orchestration.tracking.tracker import Tracker, server_for
from pruners.errors import InputError

USER, PASSWORD = "somebody", "correct-horse-battery"
TOKEN = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
PREFIX = "/tools/mlflow"
LOGIN = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")


def proxy(port: int) -> ThreadingHTTPServer:
    """A reverse proxy on loopback: asks for a login, takes the prefix off the path, hands the rest on."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def hand_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if not self.path.startswith(f"{PREFIX}/"):
                self.answer(404, {}, b"another service")
            elif self.headers.get("Authorization") != f"Basic {TOKEN}":
                self.answer(401, {"WWW-Authenticate": 'Basic realm="mlflow"'}, b"who are you?")
            else:
                wanted = {key: value for key, value in self.headers.items() if key != "Authorization"}
                wanted["Host"] = f"127.0.0.1:{port}"
                server = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                server.request(self.command, self.path.removeprefix(PREFIX), body, wanted)
                response = server.getresponse()
                self.answer(response.status, dict(response.getheaders()), response.read())
                server.close()

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = hand_on  # noqa: N815  # as http.server calls them

        def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for key, value in headers.items():
                if key.lower() not in {"transfer-encoding", "content-length", "connection"}:
                    self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that the server keeps and says."""
    return tmp_path_factory.mktemp("remote")


@pytest.fixture(scope="module")
def remote(folder: Path) -> Iterator[str]:
    server = start_server(folder)
    server.wait_ready()
    front = proxy(int(server.uri.rpartition(":")[2]))
    Thread(target=front.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{front.server_address[1]}{PREFIX}"
    finally:
        front.shutdown()
        front.server_close()
        server.stop()


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The login is in the environment, and there alone."""
    for name, value in zip(LOGIN, (USER, PASSWORD), strict=True):
        monkeypatch.setenv(name, value)


@pytest.mark.cluster
@pytest.mark.usefixtures("known")
def test_remote_tracking__all_that_a_sweep_logs_arrives_and_no_login_with_it(
    remote: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with server_for(remote, tmp_path / "mlflow") as (uri, ready):
        ready()
        assert uri == remote
    tracker = Tracker(remote, "tests")
    run = tracker.start("sweep", None, {"tracking.uri": remote.replace("://", f"://{USER}:{PASSWORD}@")}, {})
    figure = Figure()
    figure.add_subplot().plot([0, 1])
    tracker.inputs(run, [Dataset("train", "0123", "train.parquet", 3, "train")])
    tracker.monitor(run)
    tracker.metrics(run, {"loss": [(0, 1.0), (1, 0.5)]})
    tracker.figure(run, figure, "line")
    tracker.table(run, [{"method": "ovit"}], "results.json")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('"ovit"')
    (tmp_path / "model/model.safetensors").write_bytes(bytes(2 << 20))
    tracker.folder(run, tmp_path / "model", "checkpoint")
    version = registry.register(tracker, "espalier-remote", run, {"method": "ovit"})
    tracker.close("FINISHED")

    client = MlflowClient(remote)
    logged = client.get_run(run)
    assert (logged.info.status, logged.data.metrics["loss"]) == ("FINISHED", 0.5)
    assert logged.data.params["tracking.uri"] == remote
    assert [entry.dataset.name for entry in logged.inputs.dataset_inputs] == ["train"]
    assert {file.path for file in client.list_artifacts(run)} == {"figures", "results.json", "checkpoint"}
    assert tracker.link(run).startswith(f"{remote}/#/experiments/")
    with registry.pulled(f"models:/espalier-remote/{version}", remote) as pulled:
        assert (pulled / "config.json").read_text() == '"ovit"'
        assert (pulled / "model.safetensors").stat().st_size == 2 << 20
    with open_registry(remote) as versions:
        assert versions.names() == ["espalier-remote"]

    written = b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())
    output = "".join(capfd.readouterr())
    for secret in (PASSWORD, TOKEN):
        assert secret.encode() not in written
        assert secret not in output


@pytest.mark.cluster
@pytest.mark.parametrize("password", [None, "wrong-guess"])
def test_remote_tracking__a_login_that_is_missing_or_wrong_is_one_line(
    remote: str, password: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(LOGIN, (USER, password), strict=True):
        monkeypatch.delenv(name, raising=False)
        if password is not None:
            monkeypatch.setenv(name, str(value))
    assert answers(remote, 5.0)
    with pytest.raises(InputError, match="MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD") as refused:
        check_uri(remote)
    assert len(str(refused.value).splitlines()) == 1
    assert "wrong-guess" not in str(refused.value)


@pytest.mark.cluster
@pytest.mark.usefixtures("known")
def test_remote_tracking__another_path_of_the_host_is_no_mlflow(remote: str) -> None:
    with pytest.raises(InputError, match="no MLflow server answers there"):
        check_uri(remote.removesuffix(PREFIX))
