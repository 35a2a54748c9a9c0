"""A tracker whose runs are read back through MLflow's client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from mlflow import MlflowClient

from orchestration.tracking import registry
from orchestration.tracking import tracker as tracker_module
from orchestration.tracking.datasets import datasets
from orchestration.tracking.server import Server, start_server
from orchestration.tracking.tracker import Tracker, server_for
from trainers.config.data import DataSettings

DATA = DataSettings(train="/data/mine/train.parquet", test="s3://key:hunter2@bucket/cats.parquet")


def below(tracker: Tracker, run: str) -> list[str]:
    runs = tracker.client.search_runs([tracker.experiment], f"tags.`mlflow.parentRunId` = '{run}'")
    return [entry.info.run_id for entry in runs]


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
def test_tracker__a_run_is_resumed_and_what_was_left_open_below_it_ends(running: Server) -> None:
    killed = Tracker(running.uri, "tests")
    parent = killed.start("parent", None, {}, {})
    open_child, closed_child = killed.start("open", parent, {}, {}), killed.start("closed", parent, {}, {})
    killed.finish(closed_child)
    killed.flush()

    tracker = Tracker(running.uri, "tests")
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
def test_tracker__what_was_deleted_in_the_ui_is_restored_and_that_is_said(running: Server) -> None:
    before = Tracker(running.uri, "deleted")
    sweep = before.start("my sweep", None, {}, {})
    phase = before.start("dense", sweep, {}, {})
    before.abandon("KILLED")
    before.client.delete_run(phase)
    before.client.delete_experiment(before.experiment)

    lines: list[str] = []
    tracker = Tracker(running.uri, "deleted", lines.append)
    assert tracker.experiment == before.experiment
    assert tracker.resume(sweep)
    assert tracker.resume(phase)
    tracker.metrics(phase, {"loss": [(0, 1.0)]})
    tracker.close("FINISHED")
    assert lines[0] == "the MLflow experiment deleted had been deleted; it is restored, with its runs"
    client = MlflowClient(running.uri)
    assert client.get_run(phase).data.metrics == {"loss": 1.0}
    assert [client.get_run(run).info.lifecycle_stage for run in (sweep, phase)] == ["active"] * 2

    client.delete_run(phase)
    again = Tracker(running.uri, "deleted", lines.append)
    assert again.knows(phase)
    again.finish(phase)
    again.close("FINISHED")
    assert lines[-1] == "the MLflow run dense had been deleted; it is restored"
    assert client.get_run(phase).info.lifecycle_stage == "active"


@pytest.mark.cluster
def test_tracker__two_may_make_an_experiment_at_once(
    running: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Tracker(running.uri, "at once")
    look, looks = MlflowClient.get_experiment_by_name, []

    def late(self: MlflowClient, name: str) -> object:
        looks.append(name)
        return None if len(looks) == 1 else look(self, name)

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", late)
    assert Tracker(running.uri, "at once").experiment == first.experiment
    assert looks == ["at once"] * 2


@pytest.mark.cluster
def test_tracker__a_phase_that_another_sweep_goes_on_with_is_its_own(running: Server) -> None:
    """The sweep that had begun it would end it as left open, when it is resumed itself."""
    killed = Tracker(running.uri, "tests")
    first = killed.start("one", None, {}, {"espalier.sweep": "one"})
    phase = killed.start("dense", first, {}, {"espalier.sweep": "one"})
    killed.flush()

    taking = Tracker(running.uri, "tests")
    two = taking.start("two", None, {}, {"espalier.sweep": "two"})
    assert taking.resume(phase, parent=two, sweep="two")
    assert below(taking, first) == []
    assert below(taking, two) == [phase]
    back = Tracker(running.uri, "tests")
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
    running: Server, status: tracker_module.Status
) -> None:
    tracker = Tracker(running.uri, "tests")
    run = tracker.start("broken off", None, {}, {})
    tracker.abandon(status)
    assert MlflowClient(running.uri).get_run(run).info.status == status


@pytest.mark.cluster
def test_tracker__a_refusal_of_the_server_surfaces_in_flush(tracker: Tracker) -> None:
    from mlflow.exceptions import MlflowException

    tracker.metrics("0" * 32, {"loss": [(0, 1.0)]})
    with pytest.raises(MlflowException):
        tracker.flush()


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
    running: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As sweeps do that start together. One try each is refused about once in four times."""
    monkeypatch.setattr("orchestration.tracking.datasets.count_rows", lambda uri, key: len(uri))
    trackers = [Tracker(running.uri, "inputs at once") for _ in range(2)]
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
    running: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracker_module, "_MONITOR_SECONDS", 0.2)
    tracker = Tracker(running.uri, "tests")
    run = tracker.start("watched", None, {}, {})
    tracker.monitor(run)
    assert len(watchers()) == 1
    deadline = time.monotonic() + 60
    while not (seen := tracker.client.get_run(run).data.metrics):
        assert time.monotonic() < deadline, "nothing was measured"
        time.sleep(0.2)
    tracker.abandon("KILLED")
    assert watchers() == []
    assert MlflowClient(running.uri).get_run(run).info.status == "KILLED"
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
