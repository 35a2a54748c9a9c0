"""Files and folders that a command writes: checked before the work, complete or absent after it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from filelock import FileLock, Timeout

from pruners.errors import InputError, first_line
from trainers import storage


def free_file(path_text: str, key: str) -> Path:
    """The path of a file that does not exist yet, in a folder that exists.

    Raises:
        InputError: the file exists, or cannot be written there.
    """
    path = Path(storage.absolute(path_text, key))
    if not path.parent.is_dir():
        raise InputError(key, path_text, "must lie in a folder that exists")
    if path.exists():
        raise InputError(key, path_text, "is there already; name another file")
    return path


def free_folder(path_text: str, key: str) -> Path:
    """The absolute path of a folder that does not exist yet (or is empty), and that can be written.

    Raises:
        InputError: it exists, or cannot be written.
    """
    if "://" in path_text:
        raise InputError(key, path_text, "must be a folder of this machine")
    try:
        target = Path(storage.absolute(path_text, key)).resolve()
        if target.is_dir():
            if any(target.iterdir()):
                raise InputError(key, path_text, "the folder is there and not empty; name another one")
        elif os.path.lexists(target):
            raise InputError(key, path_text, "is there, and no folder")
        parent = next(folder for folder in target.parents if os.path.lexists(folder))
        Path(
            tempfile.mkdtemp(dir=parent, prefix=".espalier-")
        ).rmdir()  # only trying shows whether it can be written
    except OSError as error:
        raise InputError(key, path_text, f"cannot be written ({error.strerror or error})") from None
    return target


@contextmanager
def whole_folder(target: Path, path_text: str, key: str) -> Iterator[Path]:
    """A temporary folder that becomes ``target`` when it is complete; after an error nothing is left.

    Args:
        target: where it goes in the end.
        path_text: the target as its user named it.
        key: names it in errors.

    Returns:
        A context manager that gives the folder.

    Raises:
        InputError: it cannot be written.
    """
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process of the same number
    made = [folder for folder in (partial, *partial.parents) if not folder.exists()]
    try:
        with written(key, path_text):
            partial.mkdir(parents=True)
            yield partial
            partial.replace(target)
            forget_killed(target)
    except BaseException:
        shutil.rmtree(made[-1], ignore_errors=True)
        raise


@contextmanager
def written(key: str, path_text: str) -> Iterator[None]:
    """Errors of the system become errors of what is written.

    Raises:
        InputError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        expected = f"cannot be written ({error.strerror or first_line(error)})"
        raise InputError(key, path_text, expected) from None


@contextmanager
def enough_memory(key: str, batch_size: int, otherwise: str) -> Iterator[None]:
    """A GPU that runs out of memory becomes an error of the batch size.

    Args:
        key: names the batch size in errors.
        batch_size: the one that is taken.
        otherwise: what helps too, as the end of a sentence.

    Raises:
        InputError: the memory gave out.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        expected = f"needs more memory than the GPU has; take a smaller one, or {otherwise}"
        raise InputError(key, batch_size, expected) from None


def forget_killed(target: Path) -> None:
    """Delete the temporary files that killed processes left of a file or folder that is complete now."""
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
    except PermissionError:  # another user's process
        return True
    return True


def forget_training(folder: Path) -> None:
    """Delete the hidden folder of a training whose result is not needed any more, unless it is in use.

    Args:
        folder: the result's folder; the hidden folder from which the training resumes lies beside it.
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
