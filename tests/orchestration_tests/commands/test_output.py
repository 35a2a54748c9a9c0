"""What a command writes, what is said when disk or memory is full, what killed processes left beside it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from orchestration.benchmark.run import _write
from orchestration.commands.output import enough_memory, forget_training, whole_folder, written
from pruners.errors import InputError


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_output__partial_folders_of_the_dead(dead: int, tmp_path: Path) -> None:
    alive = os.getppid()
    kept = {f".out.partial-{alive}", f".other.partial-{dead}", ".out.partial-x", f".out.float.partial-{dead}"}
    for name in (*kept, f".out.partial-{dead}"):
        (tmp_path / name / "deep").mkdir(parents=True)
    target = tmp_path / "out"

    def fail() -> None:
        with whole_folder(target, "out", "--out"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (tmp_path / f".out.partial-{dead}").exists()  # nothing has succeeded yet
    with whole_folder(target, "out", "--out") as folder:
        (folder / "model").write_text("")
    assert {path.name for path in tmp_path.iterdir()} == kept | {"out"}


def test_output__partial_files_of_the_dead(dead: int, tmp_path: Path) -> None:
    left = tmp_path / f".speed.json.partial-{dead}"
    left.write_text("half")
    _write("--json", str(tmp_path / "speed.json"), b"{}")
    assert [path.name for path in tmp_path.iterdir()] == ["speed.json"]


def test_output__a_training_for_int8_that_was_killed(tmp_path: Path) -> None:
    folder, work = tmp_path / ".out.float", tmp_path / "..out.float.finetune"
    for path in (folder, work):
        (path / "last").mkdir(parents=True)
    with FileLock(work / "lock"):
        forget_training(folder)  # another process is at work there
    assert folder.exists()
    assert work.exists()
    forget_training(folder)
    assert list(tmp_path.iterdir()) == []
    forget_training(folder)  # and where there is nothing


def test_output__a_full_gpu_is_an_error_of_the_batch_size() -> None:
    says = r"^--batch-size = 64: needs more memory than the GPU has; take a smaller one, or accumulate$"
    with pytest.raises(InputError, match=says), enough_memory("--batch-size", 64, "accumulate"):
        raise torch.OutOfMemoryError


def test_output__a_full_disk_is_an_error_of_what_is_written() -> None:
    says = r"^--out = 'here': cannot be written \(No space left on device\)$"
    with pytest.raises(InputError, match=says), written("--out", "here"):
        raise OSError(28, "No space left on device")


def test_output__a_folder_that_cannot_be_written_whole_is_not_there(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    says = r"^--out = 'a/b': cannot be written \(No space left on device\)$"
    with pytest.raises(InputError, match=says), whole_folder(target, "a/b", "--out"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_output__other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(KeyError), whole_folder(tmp_path / "a", "a", "--out"), enough_memory("size", 1, ""):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
