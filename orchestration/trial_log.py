"""Finished trials of a phase on the shared storage: what a resumed sweep goes by, whatever else was lost."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from trainers import storage

_PART = 32  # cheap trials in a file
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
    metrics: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    run_id: str | None = None
    seconds: float = 0.0
    error: str | None = None
    trace: str | None = None  # the last lines of what a failed trial wrote down
    given: bool = False  # proposed by us (the method's own allocation), not by the sampler
    kept: dict[str, dict[str, Any]] = field(default_factory=dict)  # best at each sparsity that is kept

    def __post_init__(self) -> None:
        if self.score is None or math.isfinite(self.score):
            return
        said = self.error or f"its score is {self.score:g}"
        for key, value in {"state": "failed", "score": None, "checkpoint": None, "error": said}.items():
            object.__setattr__(self, key, value)

    @property
    def percent(self) -> str:
        """Top-1 on validation, to be read."""
        return f"{100 * self.metrics['val_top1']:.1f} %"


class TrialLog:
    """The trials of one phase; ``run_id`` is the phase's MLflow run.

    ``cheap`` trials are not noted when they start, as none is worth going on with, and are written in parts
    of a few, so that what is written for one does not grow with their number; :meth:`save` joins them.
    """

    def __init__(self, uri: str, *, cheap: bool = False) -> None:
        self.uri, self._cheap = uri, cheap
        content = storage.read_json(uri) if storage.exists(uri) else {}
        self.run_id: str | None = content.get("run_id")
        self.trials = [TrialRecord(**record) for record in content.get("trials", [])]
        self._running: dict[str, dict[str, Any]] = content.get("running", {})
        self._begun: set[str] = set()  # of them by this driver; the others are broken off
        self._whole = len(self.trials)  # of them are in the first file
        known = {record.number for record in self.trials}
        for name in storage.names(self._parts):  # those joined already are left over from a killed driver
            part = [TrialRecord(**record) for record in storage.read_json(f"{self._parts}/{name}")]
            self.trials += [record for record in part if record.number not in known]

    @property
    def _parts(self) -> str:
        return self.uri.removesuffix(".json") + ".parts"

    def begin(self, number: int, values: dict[str, Any], run_id: str | None) -> None:
        """A trial has started; until it is added it counts as broken off."""
        if self._cheap:
            return
        before = next((key for key in self._broken if self._running[key]["values"] == values), None)
        entry = self._running.pop(before) if before is not None else {}
        self._running[str(number)] = {**entry, "values": values, "run_id": run_id}
        self._begun.add(str(number))
        self.save()

    def note(self, number: int, values: dict[str, Any], member: dict[str, Any]) -> None:
        """A running trial of a population goes on as something else, with other values."""
        self._running[str(number)] |= {"values": values, "member": member}
        self.save()

    def member(self, number: int) -> dict[str, Any] | None:
        """What was noted last of a running trial."""
        found: dict[str, Any] | None = self._running[str(number)].get("member")
        return found

    @property
    def members(self) -> list[dict[str, Any]]:
        """What is noted of trials that have not ended."""
        return [one["member"] for one in self._running.values() if "member" in one]

    def add(self, record: TrialRecord) -> None:
        self.trials.append(record)
        self._running.pop(str(record.number), None)
        if not self._cheap:
            self.save()
            return
        part = (len(self.trials) - self._whole - 1) // _PART
        records = self.trials[self._whole + part * _PART :]
        storage.write_json(f"{self._parts}/{part:06d}.json", [asdict(one) for one in records])

    def save(self) -> None:
        """Write all into one file."""
        records = [asdict(record) for record in self.trials]
        storage.write_json(self.uri, {"run_id": self.run_id, "trials": records, "running": self._running})
        self._whole = len(self.trials)
        storage.remove(self._parts)

    @property
    def running(self) -> list[int]:
        """Numbers of the trials that have begun and not ended."""
        return sorted(map(int, self._running))

    @property
    def pending(self) -> list[dict[str, Any]]:
        """Proposals whose trials were broken off."""
        return [dict(self._running[str(number)]["values"]) for number in self.running]

    def broken_off(self, values: dict[str, Any]) -> str | None:
        """The MLflow run of a proposal's trial that was broken off."""
        found = (self._running[key] for key in self._broken)
        return next((one["run_id"] for one in found if one["values"] == values), None)

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
