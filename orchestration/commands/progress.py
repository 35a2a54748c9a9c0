"""Progress of a command's long work, and Ctrl-C in its middle."""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import NoReturn, TypeVar

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from orchestration.common.terminal import Console
from trainers.remote_calls import run_in_thread

_PLAIN_SECONDS = 10.0


_PLAIN_SHARE = 0.05  # share of the time so far: work of hours needs no line every ten seconds


T = TypeVar("T")


class Bars:
    """Progress of several kinds of work: bars on a terminal, a line now and then in a pipe.

    An instance is a :data:`pruners.order_builder.Progress`; a kind of work may begin again (for several λ, or
    several passes).
    """

    def __init__(self, console: Console | None = None, heading: str = "") -> None:
        """Prepare the bars; ``heading`` is printed with the first one: an early error stays a single line."""
        self.console = console or Console(file=sys.stderr)
        self._heading = heading
        self._live = self.console.is_terminal
        self._bars = Progress(
            TextColumn("{task.description:<12}", markup=False),
            BarColumn(bar_width=32),
            TextColumn("{task.fields[detail]}", markup=False),
            console=self.console,
            transient=True,
            disable=not self._live,
        )
        self._tasks: dict[str, TaskID] = {}
        self._done: dict[str, int] = {}
        self._began: dict[str, float] = {}
        self._rounds: dict[str, int] = {}
        self._last = self._spoke = time.monotonic()

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        for line in filter(None, (self._heading, text)):
            self.console.print(line, highlight=False, soft_wrap=True, markup=False)
        self._heading = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done <= self._done.get(what, done):
            self._began[what] = self._last  # this kind began when the one before it ended
            self._rounds[what] = self._rounds.get(what, 0) + 1
        self._done[what], self._last = done, now
        took = now - self._began[what]
        left = took * (total - done) / max(done, 1)
        time_left = f"{_clock(left)} left" if done < total else f"in {_clock(took)}"
        again = f" (round {self._rounds[what]})" if self._rounds[what] > 1 else ""
        detail = f"{done:,} of {total:,}, {time_left}{again}"
        if self._live:
            self.say("")
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(what, detail="")
            self._bars.update(self._tasks[what], completed=done, total=total, detail=detail)
        elif now - self._spoke > max(_PLAIN_SECONDS, _PLAIN_SHARE * took):
            self._spoke = now
            self.say(f"{what:<12}{detail}")

    def over(self, what: str, batches: Iterable[T], total: int) -> Iterator[T]:
        """Iterate over the same batches, and show the progress.

        Args:
            what: the kind of work.
            batches: of any type.
            total: how many there are.

        Returns:
            An iterator over them.
        """
        for done, batch in enumerate(batches, start=1):
            yield batch
            self(what, done, total)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def interruptible(work: Callable[[], T]) -> T:
    """Do ``work`` in a thread of its own, and return its result.

    Ctrl-C then interrupts at once, even during a backward pass of minutes. The thread itself cannot be ended:
    a caller that catches the interrupt must call :func:`leave`, which does not wait for it.
    """
    return run_in_thread(work).result()


def leave(status: int) -> NoReturn:
    """End at once after Ctrl-C: delete temporary folders, do not wait for a thread in a long operation."""
    atexit._run_exitfuncs()  # private; checked with CPython 3.11
    sys.stderr.write("interrupted\n")  # last, as the thread may print until now
    sys.stderr.flush()
    os._exit(status)
