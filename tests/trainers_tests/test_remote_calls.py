"""Remote places that do not answer: a limit of seconds, Ctrl-C, and no secret in what is said of them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import Run

from pruners.errors import InputError, first_line
from pruners.redaction import strip_secrets
from trainers import remote_calls, storage
from trainers.remote_calls import run_in_thread
from trainers.sources.files import table_files

# as the command does, with less patience
COMMAND = (
    "import trainers.remote_calls as l; l.LIMIT_SECONDS = {}; from orchestration.cli.app import main; main()"
)


@pytest.fixture(autouse=True)
def of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given up here is forgotten: the command would not wait for the end of this process."""
    monkeypatch.setattr(remote_calls, "_state", remote_calls._State())


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def silent() -> Iterator[str]:
    """A bucket behind a port that takes requests and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        port = server.getsockname()[1]
        yield f"s3://key:secret@bucket/x?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:{port}"


def start(*arguments: str, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND.format(seconds), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )


def test_remote_calls__a_dry_run_with_a_silent_address_ends_and_shows_no_secret(silent: str) -> None:
    data = [f"data.{part}={silent}" for part in ("train", "validation", "test")]
    process = start("sweep", "demo", "data.source=null", *data, f"storage={silent}", "--dry-run", seconds=2.0)
    out, error = process.communicate(timeout=150)  # the client itself tries for a hundred seconds
    assert process.returncode == 0, error
    assert "not on this machine: s3://bucket/x?region=us-east-1" in out
    assert "secret" not in out + error


def test_remote_calls__a_sweep_with_a_silent_address_is_refused_in_one_line(silent: str) -> None:
    process = start("sweep", "demo", f"storage={silent}", seconds=2.0)
    out, error = process.communicate(timeout=150)
    assert process.returncode == 2, error
    assert out == ""
    assert error.startswith("espalier: storage = 's3://bucket/x")
    assert error.count("\n") == 1
    assert "no answer in 2 seconds" in error
    assert "secret" not in error


def test_remote_calls__a_weights_file_on_a_silent_address_is_refused_in_one_line(silent: str) -> None:
    """It was asked for without a limit, for minutes in which Ctrl-C was not heard."""
    process = start(
        "import", silent.replace("/x?", "/x.pth?"), "--out", "out", "--architecture", "resnet18", seconds=2.0
    )
    out, error = process.communicate(timeout=60)  # the client itself tries for a hundred seconds
    assert process.returncode == 2, error
    assert out == ""
    assert error.startswith("espalier: FILE = 's3://bucket/x.pth")
    assert "no answer in 2 seconds" in error
    assert "secret" not in error


@pytest.mark.parametrize("work", [storage.remove, storage.size, storage.exists])
def test_remote_calls__every_look_has_a_limit(work: Callable[[str], object], silent: str) -> None:
    with remote_calls.time_limit(0.5), pytest.raises((InputError, TimeoutError), match=r"no answer in 0\.5"):
        work(silent)


def test_remote_calls__ctrl_c_is_heard_while_nobody_answers(silent: str) -> None:
    process = start("sweep", "demo", f"storage={silent}", seconds=50.0)
    time.sleep(8)
    assert process.poll() is None, process.communicate()
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert time.monotonic() - sent < 5
    assert process.returncode == 130
    assert "Traceback" not in error
    assert "secret" not in error


class _NoSuchRegion(BaseHTTPRequestHandler):
    """Answers as S3 does where a request is signed for a region that there is not."""

    def do_GET(self) -> None:
        code = "AuthorizationHeaderMalformed"
        body = f"<Error><Code>{code}</Code><Message>the region is wrong</Message></Error>".encode()
        self.send_response(400)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_PUT = do_GET  # noqa: N815  # the names that the server calls

    def log_message(self, *_: object) -> None:
        return None


@pytest.fixture
def no_such_region() -> Iterator[str]:
    """A bucket in a region that its server does not know."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _NoSuchRegion) as server:
        run_in_thread(server.serve_forever)
        address = f"127.0.0.1:{server.server_port}"
        yield f"s3://key:secret@bucket/x?region=nowhere-9&scheme=http&endpoint_override={address}"
        server.shutdown()


@pytest.mark.parametrize(
    "command",
    [
        "sweep demo data.source=null data.train={0} data.validation={0} data.test={0}",
        "sweep demo storage={0}",
        "sweep demo model.architecture=null dense=null model.args={{}} model.checkpoint={0}",
        "data check {0}",
    ],
)
def test_remote_calls__an_unknown_region_is_one_line(command: str, no_such_region: str, run: Run) -> None:
    status, out, error = run(command.format(f"'{no_such_region}'"))
    assert status == 2, error
    assert error.startswith("espalier: ")
    assert error.count("\n") == 1
    assert "s3://bucket/x?region=nowhere-9" in error
    assert "cannot be reached" in error
    assert "secret" not in out + error


def test_remote_calls__a_bucket_whose_region_nobody_tells_is_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyarrow asks for the region of a bucket when none is given."""

    def from_uri(uri: str) -> None:
        raise OSError(f"When resolving region for bucket 'x' of {uri}: AWS Error NETWORK_CONNECTION")

    system = SimpleNamespace(from_uri=from_uri)
    monkeypatch.setattr(storage, "fs", SimpleNamespace(**{**vars(storage.fs), "FileSystem": system}))
    status, _, error = run("sweep demo data.source=null data.train=s3://key:secret@x/y")
    assert status == 2, error
    assert error.count("\n") == 1
    assert error.startswith("espalier: data.train = 's3://x/y': cannot be reached (When resolving region")
    assert "secret" not in error


def test_remote_calls__a_look_is_given_up_and_not_repeated() -> None:
    asked = []

    def never() -> None:
        asked.append(1)
        time.sleep(3)

    with remote_calls.time_limit(0.2):
        for uri in ("s3://silent.test/a", "s3://silent.test/b"):
            with pytest.raises(TimeoutError):
                remote_calls.call_limited(uri, never)
        assert len(asked) == 1  # the same bucket
        assert remote_calls.call_limited("s3://other.test/a", lambda: "there") == "there"
        with pytest.raises(FileNotFoundError):
            remote_calls.call_limited("s3://other.test/a", lambda: open("/none/x"))  # noqa: SIM115, PTH123
    assert remote_calls.call_limited("s3://silent.test/a", lambda: "patient") == "patient"


@pytest.mark.parametrize("uri", ["s3://", "gs://", "~nobody_of_ours/x", "s3:///x", "nowhere://x"])
def test_remote_calls__no_place_is_an_input_error(uri: str) -> None:
    with pytest.raises(InputError, match=r"data\.train"):
        storage.resolve(uri, "data.train")


@pytest.mark.parametrize("uri", ["/dev/zero", "/dev/null"])
def test_remote_calls__a_device_is_no_table(uri: str) -> None:
    with pytest.raises(InputError, match=r"must be a Parquet file.*is none of these"):
        table_files(uri, "data.train")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:secret@bucket/x", "s3://bucket/x"),
        ("s3://key:sec%2Fret@bucket/x", "s3://bucket/x"),
        ("s3://key:se/cret@bucket/x@2024", "s3://bucket/x@2024"),
        ("'http://user@host:5000/x': no answer", "'http://host:5000/x': no answer"),
        ("abfs://c@a/x?client_secret=abc&tenant_id=1", "abfs://c@a/x?client_secret=***&tenant_id=1"),
        ("https://h/x?a=1&X-Amz-Signature=abc d", "https://h/x?a=1&X-Amz-Signature=*** d"),
        # nothing of these is a secret
        ("s3://bucket/imagenet@2024/train", "s3://bucket/imagenet@2024/train"),
        ("sqlite:////home/me@host/x.db", "sqlite:////home/me@host/x.db"),
        ("http://h:8265/x@y", "http://h:8265/x@y"),
        ("http://h:8265 and me@home", "http://h:8265 and me@home"),
        ("models:/espalier-demo@champion", "models:/espalier-demo@champion"),
    ],
)
def test_remote_calls__secrets_are_cut(text: str, shown: str) -> None:
    assert strip_secrets(text) == shown
    assert first_line(ValueError(text)) == shown
    error = InputError("data.train", text, f"no such file {text}")
    for secret in ("secret@", "=abc"):
        assert secret not in str(error)


def test_remote_calls__errors_of_every_command_show_no_secret(run: Run) -> None:
    for text in (
        "evaluate nowhere://key:secret@x/y --data s3://key:secret@/x",
        "sweep demo data.source=null data.train=nowhere://key:secret@b/x",
        "sweep demo model.checkpoint=nowhere://key:secret@b/x model.architecture=null dense=null",
        "sweep demo tracking.uri=nowhere://key:secret@b/x",
        "sweep demo recovery.lr=s3://key:secret@b/x",
        "sweep s3://key:secret@b/x.yaml",
        "status --storage nowhere://key:secret@b/x",
        "sweep demo --address http://key:secret@127.0.0.1:9",
    ):
        status, out, error = run(text)
        assert status == 2, (text, error)
        assert "secret" not in out + error, text
