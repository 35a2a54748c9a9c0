"""Long work of a command: how far it is, Ctrl-C in its middle, and a folder that is whole or not there."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from glob import escape
from pathlib import Path
from types import TracebackType
from typing import NoReturn, TypeVar

from filelock import FileLock, Timeout
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from orchestration.common.terminal import Console
from pruners.errors import InputError, first_line
from trainers import storage
from trainers.remote_calls import in_thread

_PLAIN_SECONDS = 10.0
_PLAIN_SHARE = 0.05  # of the time so far: work of hours needs no line every ten seconds
T = TypeVar("T")


class Bars:
    """Kinds of work and how far each one is: bars on a terminal, a line now and then in a pipe.

    An instance is a :data:`pruners.order_builder.Progress`; a kind may begin again (several λ, several
    passes).
    """

    def __init__(self, console: Console | None = None, heading: str = "") -> None:
        """``heading``: said before the first bar or line, so that a mistake found at once is a line alone."""
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
        """A line that stays."""
        for line in filter(None, (self._heading, text)):
            self.console.print(line, highlight=False, soft_wrap=True, markup=False)
        self._heading = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done <= self._done.get(what, done):
            self._began[what] = self._last  # it began when the work before it ended
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
        """The same batches, told as they are done with."""
        for done, batch in enumerate(batches, start=1):
            yield batch
            self(what, done, total)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def interruptible(work: Callable[[], T]) -> T:
    """The result of ``work``, done in a thread of its own.

    Ctrl-C is then heard at once, also in the middle of a backward of minutes. The thread cannot be ended:
    who catches the interrupt must :func:`leave` without waiting for it.
    """
    return in_thread(work).result()


def leave(status: int) -> NoReturn:
    """End at once after Ctrl-C: temporary folders go, a thread in a long operation is not waited for."""
    atexit._run_exitfuncs()
    sys.stderr.write("interrupted\n")  # the last word: the thread may speak until now
    sys.stderr.flush()
    os._exit(status)


def free_file(place: str, key: str) -> Path:
    """Raises:
    InputError: a file cannot be written there without loss.
    """
    path = Path(storage.absolute(place, key))
    if not path.parent.is_dir():
        raise InputError(key, place, "must lie in a folder that exists")
    if path.exists():
        raise InputError(key, place, "is there already; name another file")
    return path


def free_folder(place: str, key: str) -> Path:
    """The absolute path of a folder that is not there yet (or is empty), where one can be written.

    Raises:
        InputError: it is there, or cannot be.
    """
    if "://" in place:
        raise InputError(key, place, "must be a folder of this machine")
    try:
        target = Path(storage.absolute(place, key)).resolve()
        if target.is_dir():
            if any(target.iterdir()):
                raise InputError(key, place, "the folder is there and not empty; name another one")
        elif os.path.lexists(target):
            raise InputError(key, place, "is there, and no folder")
        parent = next(folder for folder in target.parents if os.path.lexists(folder))
        Path(
            tempfile.mkdtemp(dir=parent, prefix=".espalier-")
        ).rmdir()  # what may be written, only this tells
    except OSError as error:
        raise InputError(key, place, f"cannot be written ({error.strerror or error})") from None
    return target


@contextmanager
def whole_folder(target: Path, place: str, key: str) -> Iterator[Path]:
    """A folder to write into, which becomes ``target`` when all is written; otherwise nothing is left.

    Args:
        place: the target as its user named it, by ``key``.

    Raises:
        InputError: it cannot be written.
    """
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)  # of a process of this number that was killed
    made = [folder for folder in (partial, *partial.parents) if not folder.exists()]
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.replace(target)
        forget_killed(target)
    except BaseException as error:
        shutil.rmtree(made[-1], ignore_errors=True)
        if isinstance(error, OSError):
            expected = f"cannot be written ({error.strerror or first_line(error)})"
            raise InputError(key, place, expected) from None
        raise


def forget_killed(target: Path) -> None:
    """Delete what processes that were killed left of a file or folder, now that it is there whole."""
    for partial in target.parent.glob(f".{escape(target.name)}.partial-*"):
        number = partial.name.rpartition("-")[2]
        if not number.isdecimal() or _lives(int(number)):
            continue
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def forget_training(folder: Path) -> None:
    """Delete what a training whose result is not wanted any more left, unless one is at work there.

    Args:
        folder: where its result was to be; beside it lies the hidden folder that it goes on from.
    """
    work = folder.with_name(f".{folder.name}.finetune")
    if work.is_dir():
        lock = FileLock(work / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return
        shutil.rmtree(work, ignore_errors=True)
        lock.release()
    shutil.rmtree(folder, ignore_errors=True)
