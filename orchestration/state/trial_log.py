"""The log of a phase's trials on the shared storage, from which an interrupted search resumes.

What a search does next depends on the order in which its trials were proposed, compared and ended. The log
therefore numbers these events (``when``), so that a resumed search can replay them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypedDict

from trainers import storage
from trainers.loop.report import EpochReport, Figures, Pruned, figures_of

_PART = 32  # one-shot trials in a file
State = Literal["finished", "stopped", "failed"]


class TakenStep(TypedDict):
    """A checkpoint that a member of a population went on from: the trial, its epoch and its values then."""

    trial: int | str
    epoch: int
    values: dict[str, float]


History = TypedDict("History", {"pbt.exploits": int, "pbt.taken": list[TakenStep]}, total=False)
"""Where the weights of a member of a population came from, oldest first; empty outside of one."""


class TrialMetrics(Figures, Pruned, History, total=False):
    """What is kept of a trial: figures of its model, what was pruned, and its history in a population."""


@dataclass(frozen=True)
class TrialRecord:
    """A trial that has ended: its proposal, its score (higher is better), its figures, its checkpoint.

    A trial whose score is not finite counts as failed: ``max`` could choose NaN as the best score.
    """

    number: int
    values: dict[str, Any]
    state: State
    score: float | None
    metrics: TrialMetrics = field(default_factory=TrialMetrics)
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
    rungs: list[list[float | str]] = field(
        default_factory=list
    )  # (when, time, score, at its end) of each comparison

    def __post_init__(self) -> None:
        if self.score is None or math.isfinite(self.score):
            return
        error = self.error or f"its score is {self.score:g}"
        for key, value in {"state": "failed", "score": None, "checkpoint": None, "error": error}.items():
            object.__setattr__(self, key, value)

    def cost(self, key: str) -> float:
        """The figure of a second objective, which is minimised."""
        return float(figures_of(self.metrics, [key])[key])

    @property
    def percent(self) -> str:
        """Top-1 on validation as text."""
        return f"{100 * self.metrics['val_top1']:.1f} %"


@dataclass(frozen=True)
class Event:
    """An event of a search that concerns its sampler or its scheduler, about one trial.

    Attributes:
        when: number of the event, counted from the beginning of the log.
        kind: ``asked`` (proposed), ``rung`` (compared with others), ``told`` (ended), in the words of
            ask-and-tell samplers.
        number: of the trial.
        values: its proposal, recipe keys and values.
        given: whether the proposal was enqueued, and not the sampler's.
        ended: for ``told``, the trial's record.
        time: for ``rung``, the value of the metric by which trials are compared (epochs, or images).
        score: for ``rung``, the trial's score there.
        at_end: for ``rung``, whether the trial had ended by itself.
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


class UnreportedEnd(NamedTuple):
    """A trial whose end only the log knows, not the observer: its record, its last report, its MLflow run."""

    record: TrialRecord
    report: EpochReport
    run_id: str | None


class TrialLog:
    """The trials of one phase; ``run_id`` is the phase's MLflow run.

    With ``one_shot`` a trial is written only when it has ended, because an interrupted one-shot trial is not
    resumed. Such trials are written in part files of a few trials each, so that the cost of writing one does
    not grow with their number; :meth:`save` joins the parts into one file. The last trial of a part also
    lists the trials that had been proposed and not ended (``beside``).

    Attributes:
        settings: settings of the sampler, fixed when the search begins.
    """

    def __init__(self, uri: str, *, one_shot: bool = False) -> None:
        self.uri, self._one_shot = uri, one_shot
        content = storage.read_json(uri) if storage.exists(uri) else {}
        self.run_id: str | None = content.get("run_id")
        self.settings: dict[str, Any] = content.get("settings", {})
        self.trials = [TrialRecord(**record) for record in content.get("trials", [])]
        self._running: dict[str, dict[str, Any]] = content.get("running", {})
        self._begun: set[str] = set()  # running trials of this driver; the others were interrupted
        self._whole = len(self.trials)  # number of trials in the file without parts
        known = {record.number for record in self.trials}
        for name in storage.names(self._parts):
            part = storage.read_json(f"{self._parts}/{name}")
            beside = part[-1].pop("beside", {}) if part else {}
            new = [TrialRecord(**record) for record in part if record["number"] not in known]
            self.trials += new
            if new:  # otherwise a killed driver had already joined this part, and not deleted it
                self._running = beside
        self._clock = max((event.when for event in self.events()), default=-1) + 1

    @property
    def _parts(self) -> str:
        return self.uri.removesuffix(".json") + ".parts"

    def ask(self, number: int, values: dict[str, Any], *, given: bool) -> None:
        """Note that a trial is proposed. It is written to the file with the next trial that begins or ends.

        Args:
            number: of the trial.
            values: the proposal, recipe keys and values.
            given: whether it was enqueued (the method's own allocation), and not the sampler's.
        """
        self._running[str(number)] = {"values": values, "asked": self._tick(), "given": given}
        self._begun.add(str(number))

    def begin(self, number: int, values: dict[str, Any], run_id: str | None) -> None:
        """Note that a trial has started; for a later driver it counts as interrupted until it is added.

        Args:
            number: of the trial.
            values: the proposal, recipe keys and values.
            run_id: its MLflow run, if it has one.
        """
        if self._one_shot:
            return
        before = next((key for key in self._broken if self._running[key]["values"] == values), None)
        entry = self._running.pop(str(number) if before is None else before, {})
        self._running[str(number)] = {**entry, "values": values, "run_id": run_id}
        self._begun.add(str(number))
        self.save()

    def compare(self, number: int, time: float, score: float, *, goes_on: bool, at_end: bool = False) -> None:
        """Note that a running trial was compared with others; if it stops, its end writes this to the file.

        Args:
            number: of the trial.
            time: the value of the metric by which trials are compared (epochs, or images).
            score: its score there.
            goes_on: whether the trial continues.
            at_end: whether it had ended by itself.
        """
        rungs = self._running[str(number)].setdefault("rungs", [])
        # JSON has no NaN, but a rule goes another way by it
        rungs.append([self._tick(), time, score if math.isfinite(score) else str(score), int(at_end)])
        if goes_on and not self._one_shot:
            self.save()

    def end(self, record: TrialRecord, report: EpochReport) -> None:
        """Note that a trial has ended and must not be started again, before the observer gets the report.

        Args:
            record: of the trial; its figures may be those of an earlier epoch, the best one.
            report: the last report of the trial, which the observer may not have received either.
        """
        if not self._one_shot and str(record.number) in self._running:
            self._running[str(record.number)] |= {"end": asdict(record), "report": dict(report)}
            self.save()

    @property
    def unreported(self) -> list[UnreportedEnd]:
        """Trials whose end the last driver noted before it was killed; they must still be added."""
        entries = (self._running[str(number)] for number in self.running)
        return [
            UnreportedEnd(TrialRecord(**entry["end"]), entry.get("report", {}), entry.get("run_id"))
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
        """Return whether the order of all trials is known; logs of earlier versions lack it."""
        ends = all(record.asked is not None and record.told is not None for record in self.trials)
        return ends and all("asked" in entry for entry in self._running.values())

    @property
    def proposed(self) -> int:
        """The number that the next proposal has."""
        return max([*(record.number for record in self.trials), *map(int, self._running)], default=-1) + 1

    def is_given(self, number: int) -> bool:
        """Return whether a trial that has not ended was enqueued, and not proposed by the sampler."""
        return bool(self._running[str(number)].get("given"))

    def _tick(self) -> int:
        self._clock += 1
        return self._clock - 1

    def note(self, number: int, values: dict[str, Any], member: dict[str, Any]) -> None:
        """Note that a trial of a population is another member now, with other values.

        Args:
            number: of the trial.
            values: its new values.
            member: the member (:class:`orchestration.search.pbt_trial.Member`) as a dictionary.
        """
        self._running[str(number)] |= {"values": values, "member": member}
        self.save()

    def member(self, number: int) -> dict[str, Any] | None:
        """The member of a population that a running trial is, as it was noted last."""
        member: dict[str, Any] | None = self._running[str(number)].get("member")
        return member

    @property
    def members(self) -> list[dict[str, Any]]:
        """The members of a population that the trials are that have not ended."""
        return [entry["member"] for entry in self._running.values() if "member" in entry]

    def add(self, record: TrialRecord) -> TrialRecord:
        """Write a trial that has ended to the file; return the record with the number of this event."""
        entry = self._running.pop(str(record.number), {})
        order = {key: entry[key] for key in ("asked", "rungs", "given") if key in entry}
        record = replace(record, told=self._tick(), **order)
        self.trials.append(record)
        if not self._one_shot:
            self.save()
            return record
        part = (len(self.trials) - self._whole - 1) // _PART
        records = [asdict(trial) for trial in self.trials[self._whole + part * _PART :]]
        records[-1]["beside"] = self._running
        storage.write_json(f"{self._parts}/{part:06d}.json", records)
        return record

    def save(self) -> None:
        """Write all trials into one file, and delete the parts."""
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
        """Proposals of the trials that have begun and not ended."""
        return list(self.broken.values())

    @property
    def broken(self) -> dict[int, dict[str, Any]]:
        """Proposals of the trials that have begun and not ended, by their numbers, ascending."""
        return {number: dict(self._running[str(number)]["values"]) for number in self.running}

    def broken_off(self, values: dict[str, Any]) -> str | None:
        """The MLflow run of an interrupted trial with these values; ``None`` if there is none."""
        broken = (self._running[key] for key in self._broken)
        return next((entry.get("run_id") for entry in broken if entry["values"] == values), None)

    @property
    def _broken(self) -> list[str]:
        """Numbers of the trials that an earlier driver began and did not end."""
        return sorted(self._running.keys() - self._begun, key=int)

    @property
    def ended(self) -> list[TrialRecord]:
        """Trials that need not be run again."""
        return [record for record in self.trials if record.state != "failed"]

    def best(self) -> TrialRecord:
        """The finished trial with the highest score; of equal ones the first.

        Raises:
            RuntimeError: no trial has finished.
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
        yield Event(int(when), "rung", *about, time=time, score=float(score), at_end=bool(at_end))
