"""MLflow: a server of ours over a folder, and a tracker whose runs are read back through the client."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import Family
from matplotlib.figure import Figure
from mlflow import MlflowClient

from orchestration.common.redaction import redact
from orchestration.tracking import registry
from orchestration.tracking import tracker as tracker_module
from orchestration.tracking.check import check_uri
from orchestration.tracking.datasets import datasets
from orchestration.tracking.server import Server, answers, start_server
from orchestration.tracking.tracker import Tracker, server_for
from pruners.errors import InputError
from pruners.redaction import strip_credentials
from trainers.config.data import DataSettings


@dataclass(frozen=True)
class Running:
    server: Server
    folder: Path


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("mlflow")
    server = start_server(folder)
    try:
        server.wait_ready()
        yield Running(server, folder)
    finally:
        server.stop()


@pytest.fixture
def tracker(running: Running) -> Iterator[Tracker]:
    made = Tracker(running.server.uri, "tests")
    yield made
    made.abandon("KILLED")


def below(tracker: Tracker, run: str) -> list[str]:
    runs = tracker.client.search_runs([tracker.experiment], f"tags.`mlflow.parentRunId` = '{run}'")
    return [entry.info.run_id for entry in runs]


# the server


@pytest.mark.cluster
def test_tracker__a_server_of_ours_is_on_loopback_and_leaves_no_process(tmp_path: Path) -> None:
    before = set(Family(os.getpid(), tmp_path, "none").look())
    with server_for(None, tmp_path / "mlflow") as (uri, ready):
        ready()
        assert uri.startswith("http://127.0.0.1:")
        assert answers(uri, 1.0)
        assert MlflowClient(uri).search_experiments()
        grown = set(Family(os.getpid(), tmp_path, "none").look()) - before
        assert grown
    assert not answers(uri, 1.0)
    for _ in range(20):
        left = grown & set(Family(os.getpid(), tmp_path, "none").look())
        if not left:
            break
        time.sleep(0.25)
    assert not left
    assert (tmp_path / "mlflow/mlflow.db").is_file()


@pytest.mark.cluster
def test_tracker__a_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """Also when that is killed, and can end nothing itself."""
    code = (
        "import sys, time; from pathlib import Path; from orchestration.tracking.server import start_server;"
        f"server = start_server(Path({str(tmp_path)!r}));"
        "server.wait_ready(); print(server.uri, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as starter:
        family = Family(starter.pid, tmp_path, "none")
        try:
            assert starter.stdout is not None
            uri = starter.stdout.readline().strip()
            assert answers(uri, 1.0)
            assert len(family.look()) > 1
            os.kill(starter.pid, signal.SIGKILL)
            deadline = time.monotonic() + 10
            while family.look() and time.monotonic() < deadline:
                time.sleep(0.2)
            assert family.look() == {}
            assert not answers(uri, 1.0)
        finally:
            family.end()


@pytest.mark.cluster
def test_tracker__a_given_server_is_left_alone(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*arguments: object, **options: object) -> Server:
        raise AssertionError("a server was started")

    monkeypatch.setattr(tracker_module, "start_server", start)
    with server_for(running.server.uri, tmp_path / "mlflow") as (uri, ready):
        ready()
        assert uri == running.server.uri
    assert answers(uri, 1.0)
    assert not (tmp_path / "mlflow").exists()


@pytest.mark.cluster
def test_tracker__a_second_server_takes_the_next_port(running: Running, tmp_path: Path) -> None:
    port = int(running.server.uri.rpartition(":")[2])
    server = start_server(tmp_path, port)
    try:
        assert int(server.uri.rpartition(":")[2]) > port
    finally:
        server.stop()


def test_tracker__a_server_that_cannot_start_says_so(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("no database " * 100)
    server = start_server(tmp_path)
    try:
        with pytest.raises(RuntimeError, match="ended with status"):
            server.wait_ready()
    finally:
        server.stop()


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "nonsense", "ftp://host/x"])
def test_tracker__a_uri_that_cannot_serve_is_refused(uri: str) -> None:
    with pytest.raises(InputError, match=r"tracking\.uri"):
        check_uri(uri)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://user:secret@host:5000", "http://host:5000"),
        ("https://user:p%40ss@host/path", "https://host/path"),
        ("http://host:5000", "http://host:5000"),
        ("sqlite:///runs/mlflow.db", "sqlite:///runs/mlflow.db"),
        ("http://user:se@secret@host:5000/x@y", "http://host:5000/x@y"),
    ],
)
def test_tracker__a_password_is_never_shown(uri: str, shown: str) -> None:
    assert strip_credentials(uri) == shown
    with pytest.raises(InputError) as refused:
        check_uri(uri.replace("http", "hxxp").replace("sqlite", "sqlyte"))
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/imagenet@2024/train",
        "sqlite:////home/me@host/x.db",
        "file:///data/me@host/train",
        "http://host:5000/a@b",
        "http://[::1]:5000/a@b",
        "http://host/a?b=c@d#e@f",
        "s3://bucket/x?region=eu-west-1&endpoint_override=host:9000",
        "abfs://container@account.dfs.core.windows.net/train",  # a container is no user
        "gs://anonymous@bucket/train",
        "hdfs://me@host:8020/train",
        "/data/me@host/train",
    ],
)
def test_tracker__an_address_without_a_login_stays_the_same_place(uri: str) -> None:
    assert strip_credentials(uri) == uri


@pytest.mark.parametrize(
    ("uri", "kept"),
    [
        ("abfs://box:secret@account.dfs.core.windows.net/a@b", "abfs://box@account.dfs.core.windows.net/a@b"),
        ("abfs://box@acc/a?client_secret=s&tenant_id=1", "abfs://box@acc/a?tenant_id=1"),
        ("abfs://box@acc/a?client_secret=s", "abfs://box@acc/a"),
        ("postgresql://user:secret/1@host/db", "postgresql://host/db"),  # SQLAlchemy takes the slash
        ("mysql+pymysql://user:12/secret@host:3306/db", "mysql+pymysql://host:3306/db"),
        ("s3://key:sec/ret@bucket/a@b", "s3://bucket/a@b"),  # no URI, but shown where it is refused
    ],
)
def test_tracker__of_an_address_only_the_secret_goes(uri: str, kept: str) -> None:
    assert strip_credentials(uri) == kept


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/data/mine/train.parquet", "train.parquet"),
        ("~/mine/train", "train"),
        ("file:///data/mine/train", "train"),
        ("s3://bucket/mine/train", "s3://bucket/mine/train"),
        ("s3://key:secret@bucket/train", "s3://bucket/train"),
        ("models:/espalier-a@champion", "models:/espalier-a@champion"),
        (0.5, 0.5),
        ({"a": {"b": "/data/x"}}, {"a": {"b": "x"}}),
        (["/data/x", "s3://key:secret@bucket/y@z"], ["x", "s3://bucket/y@z"]),
    ],
)
def test_tracker__others_read_no_password_and_no_place_of_this_machine(value: object, shown: object) -> None:
    assert redact(value) == shown


# the tracker


@pytest.mark.cluster
def test_tracker__runs_are_logged_in_order_and_nested(tracker: Tracker) -> None:
    parent = tracker.start("parent", None, {"a.b": 1, "list": [1, 2]}, {"espalier.level": "sweep"})
    child = tracker.start("child", parent, {}, {})
    for step in range(30):
        tracker.metrics(child, {"loss": [(step, 1.0 / (step + 1))], "top1@5": [(step, 0.5)]})
    figure = Figure()
    figure.add_subplot().plot([0, 1])
    tracker.figure(child, figure, "line")
    tracker.table(child, [{"method": "dimap"}], "results.json")
    tracker.tags(child, {"espalier.state": "finished"})
    tracker.finish(child)
    tracker.flush()
    logged = tracker.client.get_run(child)
    assert logged.info.status == "FINISHED"
    assert logged.data.tags["mlflow.parentRunId"] == parent
    assert logged.data.tags["espalier.state"] == "finished"
    history = tracker.client.get_metric_history(child, "loss")
    assert sorted((point.step, point.value) for point in history) == [
        (step, 1.0 / (step + 1)) for step in range(30)
    ]
    assert logged.data.metrics["top1_5"] == 0.5
    names = {file.path for file in tracker.client.list_artifacts(child)}
    assert names == {"figures", "results.json"}
    assert tracker.client.get_run(parent).data.params == {"a.b": "1", "list": "[1, 2]"}
    assert tracker.client.get_run(parent).info.status == "RUNNING"
    assert tracker.link(child).endswith(f"/runs/{child}")
    tracker.finish(parent)


@pytest.mark.cluster
def test_tracker__many_points_and_params_go_in_batches(tracker: Tracker) -> None:
    params = {f"key.{number}": number for number in range(230)}
    run = tracker.start("large", None, params, {})
    tracker.metrics(run, {"loss": [(step, float(step)) for step in range(2000)]})
    tracker.finish(run)
    tracker.flush()
    logged = tracker.client.get_run(run)
    assert len(logged.data.params) == len(params)
    assert logged.data.metrics["loss"] == 1999.0
    assert len(tracker.client.get_metric_history(run, "loss")) == 2000


@pytest.mark.cluster
def test_tracker__a_run_is_resumed_and_what_was_left_open_below_it_ends(running: Running) -> None:
    killed = Tracker(running.server.uri, "tests")
    parent = killed.start("parent", None, {}, {})
    open_child, closed_child = killed.start("open", parent, {}, {}), killed.start("closed", parent, {}, {})
    killed.finish(closed_child)
    killed.flush()

    tracker = Tracker(running.server.uri, "tests")
    assert tracker.experiment == killed.experiment
    assert tracker.resume(parent)
    assert set(below(tracker, parent)) == {open_child, closed_child}
    assert tracker.client.get_run(open_child).info.status == "KILLED"
    assert tracker.client.get_run(closed_child).info.status == "FINISHED"
    assert tracker.client.get_run(parent).info.status == "RUNNING"
    tracker.close("FINISHED")
    assert tracker.client.get_run(parent).info.status == "FINISHED"
    assert not tracker.resume("0" * 32)


@pytest.mark.cluster
def test_tracker__what_was_deleted_in_the_ui_is_restored_and_that_is_said(running: Running) -> None:
    before = Tracker(running.server.uri, "deleted")
    sweep = before.start("my sweep", None, {}, {})
    phase = before.start("dense", sweep, {}, {})
    before.abandon("KILLED")
    before.client.delete_run(phase)
    before.client.delete_experiment(before.experiment)

    lines: list[str] = []
    tracker = Tracker(running.server.uri, "deleted", lines.append)
    assert tracker.experiment == before.experiment
    assert tracker.resume(sweep)
    assert tracker.resume(phase)
    tracker.metrics(phase, {"loss": [(0, 1.0)]})
    tracker.close("FINISHED")
    assert lines[0] == "the MLflow experiment deleted had been deleted; it is restored, with its runs"
    client = MlflowClient(running.server.uri)
    assert client.get_run(phase).data.metrics == {"loss": 1.0}
    assert [client.get_run(run).info.lifecycle_stage for run in (sweep, phase)] == ["active"] * 2

    client.delete_run(phase)
    again = Tracker(running.server.uri, "deleted", lines.append)
    assert again.knows(phase)
    again.finish(phase)
    again.close("FINISHED")
    assert lines[-1] == "the MLflow run dense had been deleted; it is restored"
    assert client.get_run(phase).info.lifecycle_stage == "active"


@pytest.mark.cluster
def test_tracker__two_may_make_an_experiment_at_once(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Tracker(running.server.uri, "at once")
    look, looks = MlflowClient.get_experiment_by_name, []

    def late(self: MlflowClient, name: str) -> object:
        looks.append(name)
        return None if len(looks) == 1 else look(self, name)

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", late)
    assert Tracker(running.server.uri, "at once").experiment == first.experiment
    assert looks == ["at once"] * 2


@pytest.mark.cluster
def test_tracker__a_phase_that_another_sweep_goes_on_with_is_its_own(running: Running) -> None:
    """The sweep that had begun it would end it as left open, when it is resumed itself."""
    killed = Tracker(running.server.uri, "tests")
    first = killed.start("one", None, {}, {"espalier.sweep": "one"})
    phase = killed.start("dense", first, {}, {"espalier.sweep": "one"})
    killed.flush()

    taking = Tracker(running.server.uri, "tests")
    two = taking.start("two", None, {}, {"espalier.sweep": "two"})
    assert taking.resume(phase, parent=two, sweep="two")
    assert below(taking, first) == []
    assert below(taking, two) == [phase]
    back = Tracker(running.server.uri, "tests")
    assert back.resume(first, sweep="one")
    assert taking.client.get_run(phase).info.status == "RUNNING"
    back.abandon("KILLED")
    assert taking.client.get_run(phase).info.status == "RUNNING"
    taking.close("FINISHED")
    assert taking.client.get_run(phase).info.status == "FINISHED"
    assert taking.client.get_run(first).info.status == "KILLED"


@pytest.mark.cluster
def test_tracker__an_artifact_that_has_its_mark_has_all(tracker: Tracker, tmp_path: Path) -> None:
    run = tracker.start("cut short", None, {}, {})
    for name in ("pruning.json", "config.json", "model.safetensors", "z.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("a")
    log, logged = tracker.client.log_artifact, []

    def killed(run: str, file: str, name: str) -> None:
        if Path(file).name == "z.txt":
            raise KeyboardInterrupt
        logged.append(Path(file).name)
        log(run, file, name)

    tracker.client.log_artifact = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        tracker.folder(run, tmp_path, "checkpoint")
    assert logged == ["config.json", "model.safetensors"]
    assert tracker.has(run, "checkpoint/model.safetensors")
    assert not tracker.has(run, "checkpoint/pruning.json")
    del tracker.client.log_artifact
    tracker.folder(run, tmp_path, "checkpoint")
    assert tracker.has(run, "checkpoint/pruning.json")
    assert tracker.has(run, "checkpoint/notes/a.txt")


@pytest.mark.cluster
@pytest.mark.parametrize("status", ["KILLED", "FAILED"])
def test_tracker__open_runs_are_ended_with_what_ended_us(
    running: Running, status: tracker_module.Status
) -> None:
    tracker = Tracker(running.server.uri, "tests")
    run = tracker.start("broken off", None, {}, {})
    tracker.abandon(status)
    assert MlflowClient(running.server.uri).get_run(run).info.status == status


@pytest.mark.cluster
def test_tracker__a_refusal_of_the_server_surfaces_in_flush(tracker: Tracker) -> None:
    from mlflow.exceptions import MlflowException

    tracker.metrics("0" * 32, {"loss": [(0, 1.0)]})
    with pytest.raises(MlflowException):
        tracker.flush()


DATA = DataSettings(train="/data/mine/train.parquet", test="s3://key:hunter2@bucket/cats.parquet")


@pytest.mark.cluster
def test_tracker__datasets_are_inputs_of_a_run_once(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestration.tracking.datasets.count_rows", lambda uri, key: len(uri))
    run = tracker.start("inputs", None, {}, {})
    read = datasets(DATA, "0123456789abcdef")
    for part in (read[:1], read):  # a phase, then one that was resumed
        tracker.inputs(run, part)
    tracker.finish(run)
    tracker.flush()
    inputs = tracker.client.get_run(run).inputs.dataset_inputs
    assert len(inputs) == 2
    by_context = {entry.tags[0].value: entry.dataset for entry in inputs}
    train, test = by_context["train"], by_context["test"]
    assert (train.name, train.digest, train.source_type) == ("train", "0123456789ab", "local")
    assert (test.name, test.digest, test.source_type) == ("cats-test", "0123456789ab", "s3")
    assert (train.source, test.source) == ('{"uri": "train.parquet"}', '{"uri": "s3://bucket/cats.parquet"}')
    assert train.profile == '{"num_rows": 24}'


@pytest.mark.cluster
def test_tracker__two_may_log_the_same_images_at_once(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As sweeps do that start together. One try each is refused about once in four times."""
    monkeypatch.setattr("orchestration.tracking.datasets.count_rows", lambda uri, key: len(uri))
    trackers = [Tracker(running.server.uri, "inputs at once") for _ in range(2)]
    runs = [tracker.start("inputs", None, {}, {}) for tracker in trackers]
    for number in range(24):
        inputs = datasets(DataSettings(train=f"/data/{number}/train.parquet"), f"{number:012d}")
        for tracker, run in zip(trackers, runs, strict=True):
            tracker.inputs(run, inputs)  # by a thread each
        for tracker in trackers:
            tracker.flush()
    for tracker, run in zip(trackers, runs, strict=True):
        assert len(tracker.client.get_run(run).inputs.dataset_inputs) == 24
        tracker.close("FINISHED")


def watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "SystemMetricsMonitor"]


@pytest.mark.cluster
def test_tracker__the_machine_is_watched_until_the_run_ends(
    running: Running, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracker_module, "_MONITOR_SECONDS", 0.2)
    tracker = Tracker(running.server.uri, "tests")
    run = tracker.start("watched", None, {}, {})
    tracker.monitor(run)
    assert len(watchers()) == 1
    deadline = time.monotonic() + 60
    while not (seen := tracker.client.get_run(run).data.metrics):
        assert time.monotonic() < deadline, "nothing was measured"
        time.sleep(0.2)
    tracker.abandon("KILLED")
    assert watchers() == []
    assert MlflowClient(running.server.uri).get_run(run).info.status == "KILLED"
    assert "system/cpu_utilization_percentage" in seen
    assert "monitoring" not in "".join(capfd.readouterr())


@pytest.mark.cluster
def test_tracker__a_server_that_dies_holds_nobody_up(tmp_path: Path) -> None:
    with server_for(None, tmp_path) as (uri, ready):
        ready()
        tracker = Tracker(uri, "tests")
        run = tracker.start("orphan", None, {}, {})
        tracker.monitor(run)
    for step in range(50):
        tracker.metrics(run, {"loss": [(step, 0.0)]})
    began = time.monotonic()
    tracker.abandon("KILLED")
    assert time.monotonic() - began < 5


@pytest.mark.cluster
def test_tracker__a_server_that_is_away_for_a_while_misses_nothing(tmp_path: Path) -> None:
    """What is logged meanwhile is sent when it is back: in order, none lost, none doubled."""
    server = start_server(tmp_path)
    try:
        server.wait_ready()
        tracker = Tracker(server.uri, "tests")
        run = tracker.start("away", None, {}, {})
        tracker.metrics(run, {"loss": [(0, 0.0)]})
        tracker.flush()
        port = int(server.uri.rpartition(":")[2])
        server.stop()
        for step in range(1, 30):
            tracker.metrics(run, {"loss": [(step, step / 2)]})
            tracker.tags(run, {"last": str(step)})
        time.sleep(3)
        server = start_server(tmp_path, port)
        assert server.uri == tracker.uri
        server.wait_ready()
        tracker.flush()
        history = tracker.client.get_metric_history(run, "loss")
        assert [(point.step, point.value) for point in history] == [(step, step / 2) for step in range(30)]
        assert tracker.last_step(run, "loss") == 29
        assert tracker.client.get_run(run).data.tags["last"] == "29"
        tracker.close("FINISHED")
    finally:
        server.stop()


@pytest.mark.cluster
def test_tracker__who_starts_or_goes_on_with_a_run_waits_for_a_server_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is known must not be taken for a new one."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # MLflow's own patience is of seconds
    server = start_server(tmp_path)
    try:
        server.wait_ready()
        tracker = Tracker(server.uri, "tests")
        known, left = (tracker.start(name, None, {}, {}) for name in ("known", "left"))
        tracker.client.set_tag(left, "mlflow.parentRunId", known)
        tracker.metrics(known, {"loss": [(3, 0.5)]})
        tracker.finish(known, "KILLED")
        tracker.flush()
        (tmp_path / "artifact").mkdir()
        (tmp_path / "artifact" / "weights").write_text("a few")
        port = int(server.uri.rpartition(":")[2])
        calls: list[Callable[[], object]] = [
            lambda: tracker.start("new", known, {"lr": 0.1}, {}),
            lambda: tracker.resume(known),
            lambda: tracker.last_step(known, "loss"),
            lambda: tracker.folder(known, tmp_path / "artifact", "model"),
            lambda: tracker.has(known, "model/absent"),
            lambda: registry.register(tracker, "espalier-away", known, {"method": "ovit"}),
        ]
        server.stop()
        with ThreadPoolExecutor(len(calls)) as pool:
            waiting = [pool.submit(call) for call in calls]
            time.sleep(3)
            assert [one.done() for one in waiting] == [False] * len(calls)
            server = start_server(tmp_path, port)
            assert server.uri == tracker.uri
            server.wait_ready()
            new, resumed, last, _, has, version = (one.result(60) for one in waiting)
        assert resumed is True
        assert last == 3
        assert has is False
        assert version == "1"
        assert len(tracker.client.search_model_versions("name='espalier-away'")) == 1
        assert tracker.client.get_run(str(new)).data.params == {"lr": "0.1"}
        assert tracker.client.get_run(left).info.status == "KILLED"
        assert tracker.client.get_run(known).info.status == "RUNNING"
        assert [one.path for one in tracker.client.list_artifacts(known, "model")] == ["model/weights"]
        assert len(tracker.client.search_runs([tracker.experiment])) == 3
        tracker.close("FINISHED")
    finally:
        server.stop()


# the registry


@pytest.mark.cluster
def test_tracker__versions_are_registered_once_and_pulled_by_alias(tracker: Tracker, tmp_path: Path) -> None:
    versions = []
    for method in ("dimap", "ovit"):
        folder = tmp_path / method
        folder.mkdir()
        (folder / "config.json").write_text(f'"{method}"')
        run = tracker.start(method, None, {}, {})
        tracker.folder(run, folder, "checkpoint")
        tags = registry.describe({"method": method, "sparsity": 0.75, "figures": {"val_top1": 0.9}})
        made = registry.register(tracker, "espalier-test", run, tags)
        assert registry.register(tracker, "espalier-test", run, tags) == made
        versions.append(made)
    assert versions == ["1", "2"]
    for version, method in zip(versions, ("dimap", "ovit"), strict=True):
        tracker.client.set_registered_model_alias("espalier-test", "champion", version)
        assert registry.version_of("models:/espalier-test@champion", tracker.uri).endswith(f"/{version}")
        with registry.pulled("models:/espalier-test@champion", tracker.uri) as folder:
            assert (folder / "config.json").read_text() == f'"{method}"'
        assert not folder.exists()
    with registry.pulled("models:/espalier-test/1", tracker.uri) as folder:
        assert (folder / "config.json").read_text() == '"dimap"'
    newest, oldest = [
        version for version in registry.versions(tracker.uri) if version.model == "espalier-test"
    ]
    assert (newest.uri, newest.aliases) == ("models:/espalier-test/2", ("champion",))
    assert (oldest.uri, oldest.aliases) == ("models:/espalier-test/1", ())
    assert oldest.tags == {"method": "dimap", "sparsity": "0.7500", "validation_top1": "0.900000"}
    assert (oldest.sparsity, oldest.top1, oldest.data) == (0.75, 0.9, "")


@pytest.mark.cluster
def test_tracker__a_version_of_before_gets_what_it_lacks(tracker: Tracker, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    run = tracker.start("before", None, {}, {})
    tracker.folder(run, tmp_path, "checkpoint")
    registry.register(tracker, "espalier-before", run, {"method": "ovit"})
    record = {"method": "dimap", "parent": "d0", "data": "d1", "recipe_digest": "r", "git_commit": None}
    registry.register(tracker, "espalier-before", run, registry.describe(record))
    (version,) = tracker.client.search_model_versions("name='espalier-before'")
    assert version.tags == {
        "method": "ovit",  # what is there stays
        "sparsity": "0.0000",
        "validation_top1": "nan",
        "dense": "d0",
        "data": "d1",
        "recipe": "r",
    }
    assert tracker.has(run, "checkpoint/config.json")
    assert not tracker.has(run, "checkpoint/MLmodel")


@pytest.mark.cluster
@pytest.mark.parametrize(
    "reference", ["models:/absent@champion", "models:/absent/1", "models:/espalier", "models:/x@"]
)
def test_tracker__what_the_registry_does_not_hold_is_one_line(running: Running, reference: str) -> None:
    with pytest.raises(InputError) as refused, registry.pulled(reference, running.server.uri):
        pass
    assert len(str(refused.value).splitlines()) == 1
    assert reference in str(refused.value)
