"""State of sweeps, read from their folders on the storage."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from orchestration.reporting.display import leading
from orchestration.state import heartbeat
from orchestration.state.heartbeat import State, SweepState
from orchestration.state.stored_recipe import check_exists, sweep_names
from orchestration.state.trial_log import TrialLog, TrialRecord
from pruners.errors import InputError, did_you_mean
from trainers import storage

_STATE_TEXTS: dict[State, str] = {
    "running": "running since",
    "finished": "finished",
    "interrupted": "interrupted",
    "failed": "failed",
    "gone": "not heard of since",
}
_LINES = 20
_IN_MLFLOW = re.compile(r"(?P<number>\d+) (?P<label>.+)")


@dataclass(frozen=True)
class PhaseStatus:
    """A phase that has begun: its recorded trials, their final number, its ``folder`` on the storage."""

    name: str
    label: str
    planned: int
    log: TrialLog | None
    folder: str
    ended: bool

    def trials(self) -> list[tuple[str, TrialRecord]]:
        """The trials that ended, by name (``ovit-schedule-001``; in MLflow ``001 ovit-schedule``)."""
        return (
            [(f"{self.label}-{record.number:03d}", record) for record in self.log.trials] if self.log else []
        )

    def failures(self) -> list[str]:
        return [
            f"{name} failed: {record.error}" for name, record in self.trials() if record.state == "failed"
        ]


def phases(storage_uri: str, state: SweepState) -> list[PhaseStatus]:
    """The phases of a sweep's last run that have begun."""
    begun = []
    for entry in state["phases"]:
        uri = entry["log"] and f"{storage.absolute(storage_uri)}/{entry['log']}"
        log = TrialLog(uri) if uri else None
        folder = uri.rpartition("/")[0] if uri else ""
        ended = entry["summary"] is not None
        begun.append(PhaseStatus(entry["name"], entry["label"], entry["trials"], log, folder, ended))
    return begun


def overview(storage_uri: str, name: str | None) -> Group:
    """Sweeps with their phases, trials, best trial and time left; then the failed trials with their errors.

    Args:
        storage_uri: the storage.
        name: of one sweep; ``None`` for all.

    Returns:
        A table, and lines below it.

    Raises:
        InputError: no such sweep, or none at all.
    """
    if name is not None:
        check_exists(storage_uri, name)
    table = Table("sweep", "state", "phase", "trials", "running", "failed", "best", "left")
    for column in table.columns[3:]:
        column.justify = "right"
    failures: list[str] = []
    for sweep in [name] if name is not None else sweep_names(storage_uri):
        state = heartbeat.read(storage_uri, sweep)
        if state is None:
            table.add_row(sweep, "not known: begun by an earlier version, or not yet")
            continue
        _add(table, failures, storage_uri, sweep, state)
    return Group(table, *map(Text, failures))


def _add(table: Table, failures: list[str], storage_uri: str, name: str, state: SweepState) -> None:
    if state["reason"]:
        failures.append(f"{name}: {state['reason']}")
    cells = [name, format_state(state)]
    for number, phase in enumerate(phases(storage_uri, state), start=1):
        records = phase.log.trials if phase.log else []
        failed = phase.failures()
        failures += [f"{name}: {failure}" for failure in failed]
        best = leading(records)
        at_work = state["state"] == "running" and not phase.ended
        table.add_row(
            *cells,
            f"[{number}/{state['planned']}] {phase.name}",
            f"{len(records) - len(failed)} of {phase.planned}" if phase.log else "–",
            str(state["running"]) if at_work else "–",
            str(len(failed)) if failed else "–",
            f"{100 * best[1]:.1f} %" if best else "–",
            (state["left"] or "?") if at_work else "–",
        )
        cells = ["", ""]
    if cells[0]:
        table.add_row(*cells)


def format_state(state: SweepState) -> str:
    """A sweep's state with its time, as ``running since 2026-01-31 12:00``."""
    since = state["began"] if state["state"] == "running" else state["updated"]
    return f"{_STATE_TEXTS[state['state']]} {time.strftime('%Y-%m-%d %H:%M', time.localtime(since))}"


def log_lines(storage_uri: str, name: str, trial: str | None) -> list[str]:
    """The last lines of a sweep's driver, or all that is recorded of a trial.

    Args:
        storage_uri: the storage.
        name: of the sweep.
        trial: its name in ``espalier status`` (``ovit-schedule-001``; zeros may be left out) or in MLflow.

    Returns:
        The lines.

    Raises:
        InputError: no such sweep or trial.
    """
    check_exists(storage_uri, name)
    state = heartbeat.read(storage_uri, name)
    if state is None:
        raise InputError("name", name, "has written no journal yet, or was run by an earlier version")
    if trial is not None:
        return _trial(phases(storage_uri, state), trial, state)
    failed = [
        key
        for phase in phases(storage_uri, state)
        for key, record in phase.trials()
        if record.state == "failed"
    ]
    lines = [f"{name}: {format_state(state)} (process {state['pid']} on {state['host']})"]
    lines += state["said"][-_LINES:]
    lines += [state["reason"]] if state["reason"] else []
    lines += [f"more of a failed trial: espalier logs {name} {key}" for key in failed]
    return [*lines, _ray_logs(state)]


def _trial(begun: list[PhaseStatus], wanted: str, state: SweepState) -> list[str]:
    known = {key: (phase, record) for phase in begun for key, record in phase.trials()}
    running = {
        f"{phase.label}-{number:03d}": phase for phase in begun if phase.log for number in phase.log.running
    }
    if named := _IN_MLFLOW.fullmatch(wanted):
        wanted = f"{named['label']}-{named['number']}"
    label, _, number = wanted.rpartition("-")
    key = f"{label}-{int(number):03d}" if number.isdigit() else wanted
    if key in running:
        return [f"{key}: has not ended", f"folder: {running[key].folder}", _ray_logs(state)]
    if key not in known:
        choices = [*known, *running]
        raise InputError(
            "trial", wanted, f"no such trial{did_you_mean(key, choices)}; there are {_few(choices)}"
        )
    phase, record = known[key]
    score = (
        f", {100 * record.metrics['val_top1']:.2f} % on validation" if "val_top1" in record.metrics else ""
    )
    lines = [f"{key}: {record.state} after {record.seconds:.0f} s{score}"]
    lines += [f"  {name} = {value}" for name, value in record.values.items()]
    lines += [f"checkpoint: {record.checkpoint}"] if record.checkpoint else []
    lines += [f"MLflow run: {record.run_id}"] if record.run_id else []
    lines += [f"folder: {phase.folder}"]
    lines += [record.trace.rstrip() if record.trace else record.error] if record.error else []
    return [*lines, _ray_logs(state)]


def _ray_logs(state: SweepState) -> str:
    return f"Ray's own logs: {state['host']}:{state['ray_logs']}"


def _few(names: list[str]) -> str:
    return ", ".join(names[:10]) + (" …" if len(names) > 10 else "") if names else "none yet"
