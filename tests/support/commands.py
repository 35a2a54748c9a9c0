"""The installed command in a process tree of its own, all of which ends with the test that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path

ESPALIER = Path(sys.executable).parent / "espalier"
SMALL = Path(__file__).parents[1] / "recipes" / "small.yaml"
SECONDS = 540.0  # a busy machine takes four times as long as an idle one
MARK = "ESPALIER_TEST"
Run = Callable[[str], tuple[int, str, str]]
"""What the fixture ``run`` gives: arguments as typed, to status, standard output, standard error."""
ELSEWHERE = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "MLFLOW_TRACKING_URI", "ESPALIER_STORAGE", "COLUMNS")


class Family:
    """A process and all that comes of it, by what Linux's ``/proc`` says: also what left its group or parent.

    A process belongs to it by its parent, by a mark in its environment, or by its working directory; once
    seen, it is known by its number and starting time.
    """

    def __init__(self, root: int, folder: Path, mark: str) -> None:
        self._folder, self._mark = str(folder), f"{MARK}={mark}".encode()
        self._known: dict[int, str] = {root: _start(root)}

    def look(self) -> dict[int, str]:
        """Members that live, by number, with their command lines."""
        parents = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                parents[int(entry.name)] = _stat(int(entry.name))
        members = {pid for pid, start in self._known.items() if parents.get(pid, ("", 0, ""))[2] == start}
        members |= {pid for pid in parents if pid not in members and self._marked(pid)}
        more = True
        while more:
            fresh = {pid for pid, (_, parent, _) in parents.items() if parent in members} - members
            members |= fresh
            more = bool(fresh)
        self._known |= {pid: parents[pid][2] for pid in members if parents.get(pid)}
        return {pid: _command_line(pid) for pid in sorted(members) if parents[pid][0] not in {"Z", "X", ""}}

    def end(self, but: Container[int] = ()) -> None:
        """Kill what lives, except ``but`` and this process."""
        for _ in range(20):
            living = [pid for pid in self.look() if pid not in but and pid != os.getpid()]
            if not living:
                return
            for pid in living:
                _kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def _marked(self, pid: int) -> bool:
        if pid == os.getpid():
            return False
        try:
            if self._mark in Path(f"/proc/{pid}/environ").read_bytes():
                return True
            return f"{Path(f'/proc/{pid}/cwd').readlink()}/".startswith(f"{self._folder}/")
        except OSError:
            return False


class Command:
    """``espalier …`` at work, its output in two files, as in a pipe: no terminal."""

    def __init__(self, arguments: tuple[str, ...], folder: Path, environment: dict[str, str]) -> None:
        mark = uuid.uuid4().hex
        self._files = [folder / f"{mark}.{name}" for name in ("out", "err")]
        kept = {key: value for key, value in os.environ.items() if key not in ELSEWHERE}
        with self._files[0].open("wb") as out, self._files[1].open("wb") as err:
            self.process = subprocess.Popen(
                [ESPALIER, *arguments],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**kept, **environment, MARK: mark},
                start_new_session=True,
            )
        self.family = Family(self.process.pid, folder, mark)
        self._began = time.monotonic()
        self.seconds = 0.0

    @property
    def out(self) -> str:
        return self._files[0].read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        return self._files[1].read_text(encoding="utf-8")

    def wait(self, seconds: float = SECONDS) -> int:
        """The exit status, once it has ended."""
        self.until(lambda: self.process.poll() is not None, seconds, "its end")
        self.seconds = time.monotonic() - self._began
        assert self.process.returncode is not None
        return self.process.returncode

    def until(self, reached: str | Callable[[], bool], seconds: float = SECONDS, what: str = "") -> None:
        """Wait for a text on standard error, or for whatever a function looks for."""
        deadline = time.monotonic() + seconds
        while True:
            ended = self.process.poll() is not None
            if reached in self.err if isinstance(reached, str) else reached():
                return
            assert not ended, f"ended ({self.process.returncode}) before {what or reached}:\n{self.err}"
            assert time.monotonic() < deadline, f"{what or reached} not in {seconds:.0f} s:\n{self.err}"
            self.family.look()
            time.sleep(0.25)

    def interrupt(self, kind: int = signal.SIGINT) -> tuple[int, float]:
        """Send a signal to the command alone; the exit status and the seconds until it ended."""
        self.family.look()
        sent = time.monotonic()
        _kill(self.process.pid, kind)
        return self.wait(60.0), time.monotonic() - sent

    def left(self, seconds: float = 5.0) -> dict[int, str]:
        """Processes that are still there some seconds after the end."""
        deadline = time.monotonic() + seconds
        while (living := self.family.look()) and time.monotonic() < deadline:
            time.sleep(0.25)
        return living

    def workers(self) -> list[int]:
        """Ray Train's workers."""
        return [pid for pid, line in self.family.look().items() if "RayTrainWorker" in line]


@contextmanager
def espalier(*arguments: str, cwd: Path, **environment: str) -> Iterator[Command]:
    """Start the command; whatever of it is left at the end is killed."""
    command = Command(arguments, cwd, environment)
    try:
        yield command
    finally:
        command.family.end()
        command.process.wait(10)


def run(*arguments: str, cwd: Path, seconds: float = SECONDS, **environment: str) -> Command:
    """Run the command to its end, which must be a good one that leaves nothing."""
    with espalier(*arguments, cwd=cwd, **environment) as command:
        status = command.wait(seconds)
        assert status == 0, command.err
        assert command.left() == {}
        return command


def good(run: Run, text: str) -> str:
    """What a command that ends well prints."""
    status, out, error = run(text)
    assert status == 0, error
    return out


def parent(pid: int) -> int:
    """The process that started it."""
    return _stat(pid)[1]


def _stat(pid: int) -> tuple[str, int, str]:
    """State, parent and starting time."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", 0, ""
    rest = fields.rpartition(")")[2].split()
    return rest[0], int(rest[1]), rest[19]


def _start(pid: int) -> str:
    return _stat(pid)[2]


def _command_line(pid: int) -> str:
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    return line.replace(b"\0", b" ").decode(errors="replace").strip()[:200]


def _kill(pid: int, kind: int) -> None:
    try:
        os.kill(pid, kind)
    except ProcessLookupError:
        return
