"""Progress of a sweep: a live line on a terminal, plain lines in a pipe."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from orchestration.common.terminal import Console
from orchestration.state.heartbeat import PhaseProgress, SweepProgress
from orchestration.state.trial_log import TrialRecord
from trainers.loop.report import EpochReport

_PLAIN_SECONDS = 10.0
_KEPT_LINES = 100


class Display:
    """One line for the running phase: trials done and running, the best so far, the time left.

    It is an :class:`orchestration.state.trial_end.Observer`. The progress of a running trial is computed from
    its epochs.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stderr)
        self.live = self.console.is_terminal
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._phase = ""
        self._number, self._phases = 0, 0
        self._total = 1
        self._epochs = 1
        self._done = 0
        self._best: tuple[float, float] | None = None
        self._running: dict[str, float] = {}
        self._began = time.monotonic()
        self._begin_fraction = 0.0
        self._spoke = 0.0
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._begun: list[PhaseProgress] = []

    def __enter__(self) -> Display:
        if self.live:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[detail]}", markup=False),
                TimeElapsedColumn(),
                console=self.console,
                transient=True,
            )
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the live line; other lines stay."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def plan(self, phases: int) -> None:
        """Set how many phases there will be."""
        self._phases = phases

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._lines.append(text)
        self.console.print(text, highlight=False, soft_wrap=True, markup=False, emoji=False)

    def snapshot(self) -> SweepProgress:
        """The displayed state, in JSON's types; may be called from another thread."""
        return {
            "planned": self._phases,
            "phases": [phase.copy() for phase in self._begun],
            "running": len(self._running),
            "left": self._left(),
            "said": list(self._lines),
        }

    def phase(
        self,
        name: str,
        *,
        trials: int = 1,
        done: int = 0,
        epochs: int = 1,
        best: tuple[float, float] | None = None,
        label: str = "",
        log: str | None = None,
    ) -> None:
        """Begin a phase.

        Args:
            name: title of the phase.
            trials: number of all its trials.
            done: number of trials that have already ended in an earlier run.
            epochs: of a trial, for the progress of running trials.
            best: score and top-1 of the best of these (:func:`leading`).
            label: name of its trials, before their numbers.
            log: file of the trial log.
        """
        self._begun.append({"name": name, "trials": trials, "label": label, "log": log, "summary": None})
        self._number += 1
        self._phase, self._total, self._done, self._epochs = name, max(trials, 1), done, max(epochs, 1)
        self._best = best
        self._running = {}
        self._began = time.monotonic()
        self._begin_fraction = self._fraction()
        known = f", {done} of {trials} trials known" if done else ""
        if self._progress is None:
            self.say(f"[{self._number}/{self._phases}] {name}{known}")
        else:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(self._title(), total=1.0, detail="")
        self._spoke = time.monotonic()
        self._show()

    def finished(self, summary: str) -> None:
        """End a phase with one line that stays."""
        self._begun[-1]["summary"] = summary
        self.say(f"  ✓ {self._phase}: {summary}" if self.live else f"      {summary}")

    def trial_started(
        self, trial_id: str, number: int, values: dict[str, Any], before: str | None = None
    ) -> str | None:
        """Count a trial as running; it has no run in a tracker.

        Args:
            trial_id: Tune's.
            number: of the trial in its phase.
            values: not shown.
            before: not shown.

        Returns:
            ``None``.
        """
        self._running[trial_id] = 0.0
        self._show()
        return None

    def trial_reported(self, trial_id: str, metrics: EpochReport) -> None:
        for note in metrics.get("notes", []):
            self.say(f"      {note}")
        self._running[trial_id] = min(metrics.get("epoch", 0) / self._epochs, 1.0)
        # a one-shot trial reports whether it saw all images; a gradual run has -1 before its last sparsity
        if metrics.get("complete", metrics["score"] >= 0):
            self._best = _better(self._best, metrics["score"], metrics["val_top1"])
        self._show()

    def trial_ended(self, trial_id: str, record: TrialRecord) -> str | None:
        self._running.pop(trial_id, None)
        self._done += 1
        self._show()
        if record.state == "failed":
            self.say(f"      trial {record.number} failed: {record.error}")
        return None

    def _fraction(self) -> float:
        return min((self._done + sum(list(self._running.values()))) / self._total, 1.0)

    def _left(self) -> str | None:
        """The time that the phase still takes, as text; ``None`` until a part of it is done."""
        fraction = self._fraction()
        gained = fraction - self._begin_fraction
        if gained <= 0:
            return None
        return _minutes((time.monotonic() - self._began) * (1 - fraction) / gained)

    def _title(self) -> str:
        return f"[{self._number}/{self._phases}] {self._phase}"

    def _show(self) -> None:
        fraction = self._fraction()
        detail = f"{self._done}/{self._total} done, {len(self._running)} running"
        if self._best is not None:
            detail += f", best {100 * self._best[1]:.1f} %"
        if left := self._left():
            detail += f", {left} left"
        if self._progress is not None:
            if self._task is not None:
                self._progress.update(self._task, completed=fraction, detail=detail)
        elif time.monotonic() - self._spoke > _PLAIN_SECONDS:
            self._spoke = time.monotonic()
            self.say(f"      {detail}")


def leading(trials: Iterable[TrialRecord]) -> tuple[float, float] | None:
    """Score and top-1 of the best finished trial; ``None`` if there is none."""
    best = None
    for trial in trials:
        if trial.state == "finished" and trial.score is not None:
            best = _better(best, trial.score, trial.metrics["val_top1"])
    return best


def _better(best: tuple[float, float] | None, score: float, top1: float) -> tuple[float, float] | None:
    """Score and top-1 of the better trial, by the score; NaN and infinity are never the best."""
    if not math.isfinite(score) or (best is not None and score <= best[0]):
        return best
    return score, top1


def _minutes(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"
