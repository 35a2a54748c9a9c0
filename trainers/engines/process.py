"""One model on one engine in a process of its own: its answers, its times, and the memory that it takes.

The process imports what its engine needs and nothing else, holds its threads to as many processors, and
waits between two questions without working: several of them can be asked in turn, and none is in another's
way. It may be given more files, to be timed beside the first one. Question and answer are a line of JSON
each, on standard input and output; images and logits go by ``.npy`` files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainers.config.engines import Choice
from trainers.data.preprocessing import Images
from trainers.engines.registry import Placement, Run, load

_STATUS = Path("/proc/self/status")


class EngineError(RuntimeError):
    """An engine that cannot load a model, or broke off while it ran it."""


class EngineProcess:
    """The caller's side: a process that has loaded a model, until it is closed.

    Raises:
        EngineError: the engine cannot load the model.

    Args:
        path: a checkpoint folder or a file, as the engine takes it.
        images: a ``.npy`` file, (N, channels, height, width), normalised; batches are its first ones.
    """

    def __init__(self, choice: Choice, path: Path, place: Placement, images: Path) -> None:
        root = str(Path(__file__).parents[2])
        paths = filter(None, (root, os.environ.get("PYTHONPATH")))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": str(place.threads),
            "MKL_NUM_THREADS": str(place.threads),
        }
        # no pipe: one that nobody reads would stop who fills it
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close()
        self._given: dict[str, Any] = {"engine": choice.engine, "type": choice.kind}
        self._given |= {"threads": place.threads, "device": place.device}
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "trainers.engines.process",
            ],  # not what lies in the working directory
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C is the caller's, who closes it
        )
        try:
            self.add(path, images)
        except BaseException:
            self.close()
            raise

    def add(self, path: Path, images: Path) -> int:
        """Load one more file, with inputs of its own; returns its number, by which it is timed.

        Raises:
            EngineError: the engine cannot load it.
        """
        return int(self._ask(**self._given, path=str(path), images=str(images))["number"])

    def warm(self, batch: int) -> int:
        """Run a batch size for the first times; returns the peak memory of the process so far, in bytes.

        Raises:
            EngineError: it cannot.
        """
        return int(self._ask(do="warm", batch=batch)["memory"])

    def seconds(self, batch: int, calls: int, number: int = 0) -> float:
        """Mean time of ``calls`` passes over a batch, after one that is not counted.

        Args:
            number: of the file, as :meth:`add` told it; default the first one.

        Raises:
            EngineError: it cannot.
        """
        return float(self._ask(do="time", batch=batch, calls=calls, number=number)["seconds"])

    def answers(self, images: Path, batch: int) -> NDArray[np.float32]:
        """Logits of all images of a ``.npy`` file.

        Raises:
            EngineError: it cannot.
        """
        out = images.with_suffix(f".{self._process.pid}.npy")
        self._ask(do="answer", images=str(images), out=str(out), batch=batch)
        found: NDArray[np.float32] = np.load(out, allow_pickle=False)
        out.unlink()
        return found

    def close(self) -> None:
        """End the process, which has nothing to lose, also in the middle of a question."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._said):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, **question: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise EngineError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer

    def _last_words(self) -> str:
        status = self._process.wait()
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").strip().splitlines()
        how = f"signal {-status}" if status < 0 else f"status {status}"
        return f"its process ended ({how})" + (f": {said[-1]}" if said else "")


def peak_memory() -> int:
    """The most memory that this process had resident so far, in bytes.

    Linux's ``VmHWM``; ``getrusage`` would give that of the parent where it was larger.
    """
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("the system does not say VmHWM")


def _serve() -> None:
    """The process's side."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    loaded: list[tuple[Run, Images]] = []
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if "path" in question:
                loaded.append(_load(question))
                answer: dict[str, Any] = {"number": len(loaded) - 1}
            else:
                run, images = loaded[int(question.get("number", 0))]
                answer = _answer(run, images, question)
        except Exception as error:  # whatever an engine raises is told, not shown
            said = str(error).strip().splitlines() or [""]
            answer = {"error": f"{type(error).__name__}: {said[0]}".strip(": ")}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _load(question: dict[str, Any]) -> tuple[Run, Images]:
    place = Placement(int(question["threads"]), question["device"])
    if place.device == "cpu" and hasattr(os, "sched_setaffinity"):
        # the last ones: the first serves most of the interrupts
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-place.threads :])
    images: Images = np.load(question["images"], allow_pickle=False)
    run = load(Choice(question["engine"], question["type"]), Path(question["path"]), place)
    return run, images


def _answer(run: Run, images: Images, question: dict[str, Any]) -> dict[str, Any]:
    size = int(question["batch"])
    if question["do"] == "answer":
        wanted: Images = np.load(question["images"], mmap_mode="r", allow_pickle=False)
        parts = [run(np.array(wanted[i : i + size])) for i in range(0, len(wanted), size)]
        np.save(question["out"], np.concatenate(parts), allow_pickle=False)
        return {}
    batch = np.ascontiguousarray(images[:size])
    run(batch)
    if question["do"] == "warm":
        run(batch)
        return {"memory": peak_memory()}
    calls = int(question["calls"])
    began = time.perf_counter()
    for _ in range(calls):
        run(batch)
    return {"seconds": (time.perf_counter() - began) / calls}


if __name__ == "__main__":
    _serve()
