"""The trials of a phase on the shared storage: all that a resumed sweep needs, whatever else was lost.

What a search does next depends on the order in which its trials were proposed, compared and ended. The log
counts these events: each has its ``when``, so that a resumed search can go through them once more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

from trainers import storage
from trainers.loop.report import EpochReport, figures_of

_PART = 32  # one-shot trials in a file
State = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class TrialRecord:
    """One trial that ended: its proposal, its score (higher is better), its figures, where its model is.

    One whose score is not finite has failed: NaN is no less than anything, and would be the best.
    """

    number: int
    values: dict[str, Any]
    state: State
    score: float | None
    metrics: EpochReport = field(default_factory=EpochReport)
    checkpoint: str | None = None
    run_id: str | None = None
    seconds: float = 0.0
    error: str | None = None
    trace: str | None = None  # the last lines of a failed trial's traceback
    given: bool = False  # an enqueued trial (the method's own allocation), not the sampler's
    kept: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # the best model at each sparsity that is kept
    asked: int | None = None  # the log's count when it was proposed; unknown in logs of earlier versions
    told: int | None = None  # the log's count when it ended
    rungs: list[list[float]] = field(
        default_factory=list
    )  # (when, time, score, at its end) of each comparison

    def __post_init__(self) -> None:
        if self.score is None or math.isfinite(self.score):
            return
        error = self.error or f"its score is {self.score:g}"
        for key, value in {"state": "failed", "score": None, "checkpoint": None, "error": error}.items():
            object.__setattr__(self, key, value)

    def cost(self, key: str) -> float:
        """The figure of a second objective, which is to be small."""
        return float(figures_of(self.metrics, [key])[key])

    @property
    def percent(self) -> str:
        """Top-1 on validation as text."""
        return f"{100 * self.metrics['val_top1']:.1f} %"


@dataclass(frozen=True)
class Event:
    """A step of a search's conversation with its sampler and scheduler, about one trial.

    Attributes:
        when: the log's count of events at this one.
        kind: ``asked`` (proposed), ``rung`` (compared with others), ``told`` (ended), in the words of
            ask-and-tell samplers.
        number: of the trial; ``values`` is its proposal, and ``given`` whether that was ours.
        ended: of ``told``, the trial's record.
        time: of ``rung``, how far the trial had come, by what trials are compared by; ``score`` is its score.
        at_end: of ``rung``, whether it had ended by itself.
    """

    when: int
    kind: Literal["asked", "rung", "told"]
    number: int
    values: dict[str, Any]
    given: bool = False
    ended: TrialRecord | None = None
    time: float = 0.0
    score: float = 0.0
    at_end: bool = False


class Unsaid(NamedTuple):
    """A trial whose end is known to the log alone: its record, its last report, its MLflow run."""

    record: TrialRecord
    report: EpochReport
    run_id: str | None


class TrialLog:
    """The trials of one phase; ``run_id`` is the phase's MLflow run.

    ``cheap`` trials are not written down when they start, as none is worth going on with, and are written in
    parts of a few, so that what is written for one does not grow with their number; :meth:`save` joins them.
    The last trial of a part says ``beside``: what was proposed and had not ended.

    Attributes:
        settings: of the sampler, which stay what they were when the search began.
    """

    def __init__(self, uri: str, *, cheap: bool = False) -> None:
        self.uri, self._cheap = uri, cheap
        content = storage.read_json(uri) if storage.exists(uri) else {}
        self.run_id: str | None = content.get("run_id")
        self.settings: dict[str, Any] = content.get("settings", {})
        self.trials = [TrialRecord(**record) for record in content.get("trials", [])]
        self._running: dict[str, dict[str, Any]] = content.get("running", {})
        self._begun: set[str] = set()  # running trials of this driver; the others are broken off
        self._whole = len(self.trials)  # trials in the first file
        known = {record.number for record in self.trials}
        for name in storage.names(self._parts):
            part = storage.read_json(f"{self._parts}/{name}")
            beside = part[-1].pop("beside", {}) if part else {}
            new = [TrialRecord(**record) for record in part if record["number"] not in known]
            self.trials += new
            if new:  # else its trials are in the first file: it is left over from a killed driver
                self._running = beside
        self._clock = max((event.when for event in self.events()), default=-1) + 1

    @property
    def _parts(self) -> str:
        return self.uri.removesuffix(".json") + ".parts"

    def ask(self, number: int, values: dict[str, Any], *, given: bool) -> None:
        """Note that a trial is proposed. It is written down with the next trial that begins or ends.

        Args:
            number: of the trial.
            values: the proposal, recipe keys and values.
            given: whether we proposed it (the method's own allocation), and not the sampler.
        """
        self._running[str(number)] = {"values": values, "asked": self._tick(), "given": given}
        self._begun.add(str(number))

    def begin(self, number: int, values: dict[str, Any], run_id: str | None) -> None:
        """Note that a trial has started; until it is added it counts as broken off.

        Args:
            number: of the trial.
            values: the proposal, recipe keys and values.
            run_id: its MLflow run, if it has one.
        """
        if self._cheap:
            return
        before = next((key for key in self._broken if self._running[key]["values"] == values), None)
        entry = self._running.pop(str(number) if before is None else before, {})
        self._running[str(number)] = {**entry, "values": values, "run_id": run_id}
        self._begun.add(str(number))
        self.save()

    def compare(self, number: int, time: float, score: float, *, goes_on: bool, at_end: bool = False) -> None:
        """Note that a running trial was compared with others; one that stops is written down with its end.

        Args:
            number: of the trial.
            time: how far it has come, by what trials are compared by.
            score: its score there.
            goes_on: whether it runs on.
            at_end: whether it had ended by itself.
        """
        rungs = self._running[str(number)].setdefault("rungs", [])
        rungs.append([self._tick(), time, score, int(at_end)])
        if goes_on and not self._cheap:
            self.save()

    def end(self, record: TrialRecord, report: EpochReport) -> None:
        """Note that a trial has ended and is not to be started again, before all who watch are informed.

        Args:
            record: of the trial; its figures may be those of an earlier epoch, the best one.
            report: the trial's last one, of which those who watch may not have heard either.
        """
        if not self._cheap and str(record.number) in self._running:
            self._running[str(record.number)] |= {"end": asdict(record), "report": dict(report)}
            self.save()

    @property
    def unsaid(self) -> list[Unsaid]:
        """Trials that had ended when the driver was killed; they are to be added."""
        entries = (self._running[str(number)] for number in self.running)
        return [
            Unsaid(TrialRecord(**entry["end"]), entry.get("report", {}), entry.get("run_id"))
            for entry in entries
            if "end" in entry
        ]

    def events(self) -> Iterator[Event]:
        """All events of the log, trial by trial; :attr:`history` sorts them."""
        for record in self.trials:
            yield from _events(record.number, vars(record))
            if record.told is not None:
                yield Event(record.told, "told", record.number, record.values, record.given, record)
        for number, entry in self._running.items():
            yield from _events(int(number), entry)

    @property
    def history(self) -> list[Event]:
        """The events of the search, in the order in which they happened."""
        return sorted(self.events(), key=lambda event: event.when)

    @property
    def ordered(self) -> bool:
        """Whether the order of all trials is known; logs of earlier versions lack it."""
        ends = all(record.asked is not None and record.told is not None for record in self.trials)
        return ends and all("asked" in entry for entry in self._running.values())

    @property
    def proposed(self) -> int:
        """The number that the next proposal has."""
        return max([*(record.number for record in self.trials), *map(int, self._running)], default=-1) + 1

    def is_given(self, number: int) -> bool:
        """Whether a trial that has not ended was proposed by us."""
        return bool(self._running[str(number)].get("given"))

    def _tick(self) -> int:
        self._clock += 1
        return self._clock - 1

    def note(self, number: int, values: dict[str, Any], member: dict[str, Any]) -> None:
        """Note that a member of a population goes on as something else, with other values.

        Args:
            number: of the trial.
            values: its new values.
            member: what the population keeps of it.
        """
        self._running[str(number)] |= {"values": values, "member": member}
        self.save()

    def member(self, number: int) -> dict[str, Any] | None:
        """What was noted last about a running trial."""
        member: dict[str, Any] | None = self._running[str(number)].get("member")
        return member

    @property
    def members(self) -> list[dict[str, Any]]:
        """What is noted about trials that have not ended."""
        return [entry["member"] for entry in self._running.values() if "member" in entry]

    def add(self, record: TrialRecord) -> TrialRecord:
        """Write down a trial that has ended; returns the record with its place in the order."""
        entry = self._running.pop(str(record.number), {})
        order = {key: entry[key] for key in ("asked", "rungs", "given") if key in entry}
        record = replace(record, told=self._tick(), **order)
        self.trials.append(record)
        if not self._cheap:
            self.save()
            return record
        part = (len(self.trials) - self._whole - 1) // _PART
        records = [asdict(trial) for trial in self.trials[self._whole + part * _PART :]]
        records[-1]["beside"] = self._running
        storage.write_json(f"{self._parts}/{part:06d}.json", records)
        return record

    def save(self) -> None:
        """Write all into one file."""
        records = [asdict(record) for record in self.trials]
        content = {"run_id": self.run_id, "trials": records, "running": self._running}
        storage.write_json(self.uri, content | ({"settings": self.settings} if self.settings else {}))
        self._whole = len(self.trials)
        storage.remove(self._parts)

    @property
    def running(self) -> list[int]:
        """Numbers of the trials that have begun and not ended."""
        return sorted(map(int, self._running))

    @property
    def pending(self) -> list[dict[str, Any]]:
        """Proposals whose trials were broken off."""
        return list(self.broken.values())

    @property
    def broken(self) -> dict[int, dict[str, Any]]:
        """Proposals whose trials were broken off, by the trials' numbers, ascending."""
        return {number: dict(self._running[str(number)]["values"]) for number in self.running}

    def broken_off(self, values: dict[str, Any]) -> str | None:
        """The MLflow run of a proposal's trial that was broken off."""
        broken = (self._running[key] for key in self._broken)
        return next((entry.get("run_id") for entry in broken if entry["values"] == values), None)

    @property
    def _broken(self) -> list[str]:
        """Numbers of the trials that another driver began and did not end."""
        return sorted(self._running.keys() - self._begun, key=int)

    @property
    def ended(self) -> list[TrialRecord]:
        """Trials that need not be run again."""
        return [record for record in self.trials if record.state != "failed"]

    def best(self) -> TrialRecord:
        """The trial of the highest score among those that ran to their end (the first of equals).

        Raises:
            RuntimeError: no trial did.
        """
        done = [record for record in self.trials if record.state == "finished" and record.score is not None]
        if not done:
            reasons = {record.error for record in self.trials if record.error}
            raise RuntimeError(
                "no trial ran to its end" + (f": {'; '.join(sorted(reasons))}" if reasons else "")
            )
        return max(done, key=lambda record: record.score or 0.0)


def _events(number: int, entry: dict[str, Any]) -> Iterator[Event]:
    """The events of a record or of a running trial, except its end."""
    about = number, entry["values"], entry.get("given", False)
    if entry.get("asked") is not None:
        yield Event(entry["asked"], "asked", *about)
    for when, time, score, at_end in entry.get("rungs", []):
        yield Event(int(when), "rung", *about, time=time, score=score, at_end=bool(at_end))
