"""Run a model on an engine in a process of its own, to measure its answers, times and memory.

The process imports only what its engine needs, is bound to as many processors as it has threads, and sleeps
between two requests, so that several processes can be timed in turn without disturbing each other. It can
load more files, which are timed beside the first one. Requests and answers are lines of JSON on standard
input and output; images and logits are passed as ``.npy`` files.
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

from pruners.errors import first_line
from trainers.config.engines import Choice
from trainers.data.preprocessing import Images
from trainers.engines.registry import Placement, Run, load

_STATUS = Path("/proc/self/status")


class EngineError(RuntimeError):
    """An engine that cannot load a model, or failed while it ran it."""


class EngineProcess:
    """A process that has loaded a model, seen from the caller; a context manager that ends the process.

    Args:
        choice: the engine and its data type.
        path: a checkpoint folder or a file, as the engine loads it.
        placement: its threads and device.
        images: a ``.npy`` file, (N, channels, height, width), normalised; a batch is its first images.

    Raises:
        EngineError: the engine cannot load the model.

    Example:
        >>> with EngineProcess(choice, folder, Placement(threads=1), images) as process:  # doctest: +SKIP
        ...     process.warm(batch=8)
        ...     seconds = process.seconds(batch=8, calls=10)
    """

    def __init__(self, choice: Choice, path: Path, placement: Placement, images: Path) -> None:
        root = str(Path(__file__).parents[2])
        paths = filter(None, (root, os.environ.get("PYTHONPATH")))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": str(placement.threads),
            "MKL_NUM_THREADS": str(placement.threads),
        }
        # a file and no pipe: a pipe that is not read blocks the child once it is full
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close()
        self._settings: dict[str, Any] = {"engine": choice.engine, "type": choice.kind}
        self._settings |= {"threads": placement.threads, "device": placement.device}
        self._process = subprocess.Popen(
            # -P: modules in the working directory are not imported
            [sys.executable, "-P", "-m", "trainers.engines.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the caller alone, which ends this process
        )
        try:
            self.add(path, images)
        except BaseException:
            self.close()
            raise

    def add(self, path: Path, images: Path) -> int:
        """Load one more file, and its inputs.

        Args:
            path: the file, as the engine loads it.
            images: a ``.npy`` file of its inputs.

        Returns:
            The file's number, for :meth:`seconds`.

        Raises:
            EngineError: the engine cannot load it.
        """
        return int(self._ask(**self._settings, path=str(path), images=str(images))["number"])

    def warm(self, batch: int) -> int:
        """Run two batches of ``batch`` images, as engines compile or allocate in the first ones.

        Returns:
            Peak memory of the process so far, in bytes.

        Raises:
            EngineError: the engine fails.
        """
        return int(self._ask(do="warm", batch=batch)["memory"])

    def seconds(self, batch: int, calls: int, number: int = 0) -> float:
        """Time passes over a batch, after one that is not counted.

        Args:
            batch: images of a batch.
            calls: number of passes.
            number: which file, as :meth:`add` returned it; default: the first one.

        Returns:
            Mean seconds of a pass.

        Raises:
            EngineError: the engine fails.
        """
        return float(self._ask(do="time", batch=batch, calls=calls, number=number)["seconds"])

    def answers(self, images: Path, batch: int) -> NDArray[np.float32]:
        """Compute the logits of all images of a ``.npy`` file.

        Args:
            images: the file, (N, channels, height, width), normalised.
            batch: images of a batch.

        Returns:
            (N, classes).

        Raises:
            EngineError: the engine fails.
        """
        out = images.with_suffix(f".{self._process.pid}.npy")
        self._ask(do="answer", images=str(images), out=str(out), batch=batch)
        logits: NDArray[np.float32] = np.load(out, allow_pickle=False)
        out.unlink()
        return logits

    def close(self) -> None:
        """Kill the process, which has no state to save, even while it works."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
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
            raise EngineError(self._exit_message())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer

    def _exit_message(self) -> str:
        """A message with the exit status, and the last line that the process wrote to standard error."""
        status = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        how = f"signal {-status}" if status < 0 else f"status {status}"
        return f"its process ended ({how})" + (f": {lines[-1]}" if lines else "")


def peak_memory() -> int:
    """Peak resident memory of this process, in bytes.

    Read from Linux's ``VmHWM``: ``getrusage`` would return that of the parent where it was larger.

    Raises:
        OSError: a system without ``VmHWM``.
    """
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("the system does not say VmHWM")


def _serve() -> None:
    """Answer requests until standard input ends: the main loop of the engine's process."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to standard error, and is not mistaken for an answer
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
        except Exception as error:  # whatever an engine raises becomes an answer
            kind, message = type(error).__name__, first_line(error)
            answer = {"error": kind if message == kind else f"{kind}: {message}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _load(question: dict[str, Any]) -> tuple[Run, Images]:
    placement = Placement(int(question["threads"]), question["device"])
    if placement.device == "cpu" and hasattr(os, "sched_setaffinity"):
        # the last processors: the first one handles most interrupts
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-placement.threads :])
    images: Images = np.load(question["images"], allow_pickle=False)
    run = load(Choice(question["engine"], question["type"]), Path(question["path"]), placement)
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
