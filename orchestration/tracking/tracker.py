"""The tracker: log runs to an MLflow server, nested under their parents."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from orchestration.common.redaction import redact
from orchestration.tracking.check import check_uri
from orchestration.tracking.paging import all_pages
from orchestration.tracking.server import answers, quiet_environment, start_server
from pruners.redaction import strip_credentials
from trainers.storage import RECORDS

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Metric, Param, Run
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    from orchestration.tracking.datasets import Dataset

T = TypeVar("T")

_BATCH = 900  # MLflow takes up to 1,000 metrics in one request
_PARAMS = 100  # and up to 100 parameters
_TAG_LIMIT = 5000
_INPUT_TRIES = 3
_WAITING = 1000  # requests in the queue, before logging waits
_PATIENCE_SECONDS = 3600.0
_MONITOR_SECONDS = 30.0  # long: a dozen metrics each time, for days

Status = Literal["FINISHED", "FAILED", "KILLED"]


@contextmanager
def server_for(uri: str | None, folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """The tracking URI, and a function that waits for it: the given URI, or that of our own server.

    Raises:
        InputError: the given URI does not answer.
    """
    os.environ.update(quiet_environment())
    if uri is not None:
        check_uri(uri)
        yield uri, lambda: None
        return
    server = start_server(folder)

    def ready() -> None:
        import mlflow  # noqa: F401 takes seconds, in which the server starts

        server.wait_ready()
        server.guard()

    try:
        yield server.uri, ready
    finally:
        server.stop()


@dataclass(frozen=True)
class EndedRun:
    """A run that has ended, to be logged at once."""

    name: str
    parent: str
    params: Mapping[str, Any]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    status: Status
    seconds: float


class Tracker:
    """Logs runs. A thread sends all calls after ``start``, in order; their errors are raised by ``flush``.

    If the server does not answer for a while, all calls wait for it.
    """

    def __init__(self, uri: str, experiment: str, say: Callable[[str], None] = lambda line: None) -> None:
        """Connect to ``uri``; ``say`` gets a line if a deleted experiment or run is restored."""
        import mlflow

        self.uri, self._say = uri, say
        self.client: MlflowClient = mlflow.MlflowClient(uri)
        self.experiment = self._experiment(experiment)
        self._sender = ThreadPoolExecutor(1, "mlflow")
        self._sent: list[Future[Any]] = []
        self._open: set[str] = set()
        self._monitor: SystemMetricsMonitor | None = None
        self._hurry = threading.Event()  # set to stop trying again while the server is away

    def _experiment(self, name: str) -> str:
        """The experiment's id. It is created, or restored if it was deleted: its name is still taken then."""
        from mlflow.exceptions import MlflowException

        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            # the UI chooses its view by the kind
            tags = {"mlflow.experimentKind": "custom_model_development"}
            try:
                return str(self.client.create_experiment(name, tags=tags))
            except MlflowException:
                experiment = self.client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        if experiment.lifecycle_stage == "deleted":  # otherwise another sweep has just made it
            self.client.restore_experiment(experiment.experiment_id)
            self._say(f"the MLflow experiment {name} had been deleted; it is restored, with its runs")
        return str(experiment.experiment_id)

    def start(self, name: str, parent: str | None, params: Mapping[str, Any], tags: Mapping[str, str]) -> str:
        """Begin a run.

        Args:
            name: shown in the UI.
            parent: id of the run that it is nested under, if any.
            params: logged with it.
            tags: of the run.

        Returns:
            The run's id.
        """
        from mlflow.entities import Param

        tags = {**tags, **({"mlflow.parentRunId": parent} if parent else {})}
        entries = [Param(_safe(key), str(redact(value))[:_TAG_LIMIT]) for key, value in params.items()]
        made: list[str] = []  # the run's id, kept if a request is sent again

        def send() -> str:
            if not made:
                made.append(self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id)
            self._log_all(made[0], [], entries)
            self._open.add(made[0])
            return made[0]

        return self._sender.submit(self.patiently, send).result()

    def log(self, run: EndedRun) -> Future[str]:
        """Log a run that has ended, in three requests (more for very many metrics); return its future id."""
        from mlflow.entities import Metric, Param

        ended = int(time.time() * 1000)
        began = ended - int(1000 * run.seconds)
        tags = {**run.tags, "mlflow.parentRunId": run.parent}
        made: list[str] = []  # the run's id, kept when a request is tried again

        def send() -> str:
            if not made:
                made.append(self.client.create_run(self.experiment, began, tags, run.name).info.run_id)
            points = [Metric(_safe(key), float(value), ended, 0) for key, value in run.metrics.items()]
            params = [Param(_safe(key), str(redact(value))[:_TAG_LIMIT]) for key, value in run.params.items()]
            self._log_all(made[0], points, params)
            self.client.set_terminated(made[0], run.status, ended)
            return made[0]

        return self._send(send)

    def children(self, run: str, tag: str, known: Collection[str]) -> dict[str, str]:
        """Find the runs below a run by the value of a tag; delete those that are not known.

        Deleted are incomplete runs, and runs of trials that only MLflow has because the driver or its storage
        failed: these trials run again.

        Args:
            run: the parent's id.
            tag: names the children.
            known: the tag's values that may stay.

        Returns:
            The tag's value -> the run's id.
        """
        children: dict[str, str] = {}
        for child in self._search(f"tags.`mlflow.parentRunId` = '{run}'"):
            value: str | None = child.data.tags.get(tag)
            if value is None or child.info.end_time is None or value not in known or value in children:
                self.client.delete_run(child.info.run_id)
            else:
                children[value] = child.info.run_id
        return children

    def _search(self, condition: str) -> list[Run]:
        return self.patiently(all_pages, self.client.search_runs, [self.experiment], condition)

    def knows(self, run: str) -> bool:
        """Return whether a run is in this MLflow; a deleted run that MLflow still has is restored."""
        from mlflow.exceptions import MlflowException

        try:
            known_run = self.patiently(self.client.get_run, run)
        except MlflowException:
            return False
        if known_run.info.lifecycle_stage == "deleted":
            self.client.restore_run(run)
            self._say(f"the MLflow run {known_run.info.run_name} had been deleted; it is restored")
        return True

    def has(self, run: str, artifact: str) -> bool:
        """Return whether a run has an artifact of this name (``checkpoint``, ``checkpoint/config.json``)."""
        folder = artifact.rpartition("/")[0] or None
        listed = self.patiently(self.client.list_artifacts, run, folder)
        return any(entry.path == artifact for entry in listed)

    def resume(
        self, run: str, *, end_below: bool = True, parent: str | None = None, sweep: str | None = None
    ) -> bool:
        """Resume an earlier run.

        Args:
            run: its id.
            end_below: end the runs below it that a killed process left open; those whose trials resume are
                resumed later.
            parent, sweep: the parent run and the sweep that resume it. A run that another sweep began is
                nested there from now on; otherwise that sweep, when resumed, would end it as left open.

        Returns:
            Whether this server knows the run.
        """
        if not self.knows(run):
            return False
        tags = self.client.get_run(run).data.tags
        if sweep is not None and tags.get("espalier.sweep", sweep) != sweep:
            moved = {"espalier.sweep": sweep} | ({"mlflow.parentRunId": parent} if parent else {})
            for key, value in moved.items():
                self.client.set_tag(run, key, value)
        left = f"tags.`mlflow.parentRunId` = '{run}' and attributes.status = 'RUNNING'"
        for child in self._search(left) if end_below else ():
            self.patiently(self.client.set_terminated, child.info.run_id, "KILLED")
        self.patiently(self.client.update_run, run, "RUNNING")
        self._open.add(run)
        return True

    def last_step(self, run: str, key: str) -> int:
        """The step of a metric's last point; -1 if it has none."""
        self.flush()
        history = self.patiently(self.client.get_metric_history, run, key)
        return max((point.step for point in history), default=-1)

    def metrics(self, run: str, points: Mapping[str, list[tuple[int, float]]]) -> None:
        """Log (step, value) points of some metrics."""
        now = int(time.time() * 1000)  # sent again with the same time, a point is not doubled
        self._send(self._metrics, run, {key: list(values) for key, values in points.items()}, now)

    def _metrics(self, run: str, points: dict[str, list[tuple[int, float]]], now: int) -> None:
        from mlflow.entities import Metric

        entries = [
            Metric(_safe(key), float(value), now, step)
            for key, values in points.items()
            for step, value in values
        ]
        self._log_all(run, entries, [])

    def _log_all(self, run: str, metrics: Sequence[Metric], params: Sequence[Param]) -> None:
        """Log metrics, in as many requests as the server's limits require."""
        while metrics or params:
            self.client.log_batch(run, metrics=metrics[:_BATCH], params=params[:_PARAMS])
            metrics, params = metrics[_BATCH:], params[_PARAMS:]

    def tags(self, run: str, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            self._send(self.client.set_tag, run, key, value)

    def figure(self, run: str, figure: Figure, name: str) -> None:
        """Log a figure of matplotlib as a picture.

        Args:
            run, figure, name: the run's id, the picture, the file's name without ``.png``.
        """
        self._send(self.client.log_figure, run, figure, f"figures/{name}.png")

    def table(self, run: str, content: Any, name: str) -> None:
        """Log ``content`` as the JSON artifact ``name`` of a run.

        Args:
            run, content, name: the run's id, what JSON can hold, the file's name.
        """
        self._send(self.client.log_dict, run, content, name)

    def inputs(self, run: str, datasets: Sequence[Dataset]) -> None:
        """Log the data sets that a run reads, in addition to those that MLflow has."""
        self._send(self._log_inputs, run, [dataset.as_input() for dataset in datasets])

    def _log_inputs(self, run: str, inputs: list[DatasetInput]) -> None:
        """Log data sets, again where MLflow refuses.

        MLflow checks which of them it has, then adds the others. If two sweeps do so at the same time, one of
        them is refused, with nothing logged; when it tries again, MLflow has them.
        """
        from mlflow.exceptions import MlflowException

        for _ in range(_INPUT_TRIES - 1):
            with suppress(MlflowException):
                self.client.log_inputs(run, inputs)
                return
        self.client.log_inputs(run, inputs)

    def monitor(self, run: str) -> None:
        """Log the load of this machine to a run, until the tracker is closed."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)  # it logs each start and end
        try:
            self._monitor = SystemMetricsMonitor(  # type: ignore[no-untyped-call]
                run, sampling_interval=_MONITOR_SECONDS, resume_logging=True, tracking_uri=self.uri
            )
            self._monitor.start()  # type: ignore[no-untyped-call]
        except Exception as error:  # a machine that cannot be measured can still prune
            logging.getLogger(__name__).warning("no system metrics: %s", error)

    def folder(self, run: str, folder: Path, name: str, marks: Collection[str] = RECORDS) -> None:
        """Log a folder as an artifact, and wait until it is uploaded.

        Args:
            run: the run's id.
            folder: on this machine.
            name: of the artifact.
            marks: files that are uploaded last: an artifact that has one is complete, even after a kill.
        """

        def send() -> None:
            for entry in sorted(folder.iterdir(), key=lambda entry: (entry.name in marks, entry.name)):
                if entry.is_dir():
                    self.client.log_artifacts(run, str(entry), f"{name}/{entry.name}")
                else:
                    self.client.log_artifact(run, str(entry), name)

        self._sender.submit(self.patiently, send).result()

    def finish(self, run: str, status: Status = "FINISHED") -> None:
        self._open.discard(run)
        self._send(self.client.set_terminated, run, status)

    def link(self, run: str) -> str:
        """Address of a run in the UI."""
        return f"{strip_credentials(self.uri)}/#/experiments/{self.experiment}/runs/{run}"

    def flush(self) -> None:
        """Wait until everything is sent.

        Raises:
            mlflow.exceptions.MlflowException: what the server refused.
        """
        sent, self._sent = self._sent, []
        for future in sent:
            future.result()

    def abandon(self, status: Status) -> None:
        """End the open runs after an error, which must not be hidden by one of MLflow's."""
        from mlflow.exceptions import MlflowException

        self._hurry.set()
        if self.uri.startswith("http") and not answers(self.uri, timeout=2.0):
            self._sender.shutdown(
                wait=False, cancel_futures=True
            )  # the client would try each request for minutes
            return
        try:
            self.close(status)
        except MlflowException:
            self._sender.shutdown(cancel_futures=True)

    def close(self, status: Status) -> None:
        """End the runs that are still open and send what waits."""
        if self._monitor is not None:
            self._monitor.finish()  # type: ignore[no-untyped-call]
            self._monitor = None
        # in the queue, after all requests: a run that was interrupted at its start is open by then
        self._send(self._finish_open, status)
        self.flush()
        self._sender.shutdown()

    def _finish_open(self, status: Status) -> None:
        for run in sorted(self._open):
            self.client.set_terminated(run, status)
        self._open.clear()

    def _send(self, call: Callable[..., T], *arguments: Any) -> Future[T]:
        if len(self._sent) > _WAITING:  # logging faster than MLflow takes it waits here
            self._sent.pop(0).result()
        self._sent.append(future := self._sender.submit(self.patiently, call, *arguments))
        return future

    def patiently(self, call: Callable[..., T], *arguments: Any) -> T:
        """Call a function that uses MLflow, and call it again while the server does not answer.

        Args:
            call: can be called again after any failure, without doing anything twice.
            arguments: of the call.

        Returns:
            What it returns.

        Raises:
            mlflow.exceptions.MlflowException: the server refused, or was away for an hour.
        """
        from mlflow.exceptions import MlflowException

        deadline, pause = time.monotonic() + _PATIENCE_SECONDS, 1.0
        while True:
            try:
                return call(*arguments)
            except MlflowException:
                away = self.uri.startswith("http") and not answers(self.uri, timeout=5.0)
                if not away or self._hurry.is_set() or time.monotonic() > deadline:
                    raise
                self._hurry.wait(pause)
                pause = min(2 * pause, 30.0)


def _safe(key: str) -> str:
    """Reduce a key to the characters that MLflow accepts: letters, digits and ``_-. /``."""
    return "".join(character if character.isalnum() or character in "_-. /" else "_" for character in key)
