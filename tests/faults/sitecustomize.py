"""Faults for tests: read by every Python process that has this folder on its path, before anything else.

``ESPALIER_FAULT`` says ``MOMENT:RANK:FOLDER``. When a worker of that rank comes to the moment, the process
kills itself, once for the folder. The product knows nothing of it.
"""

from __future__ import annotations

import errno
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

MOMENT, RANK, FOLDER = (os.environ.get("ESPALIER_FAULT", "") + "::").split(":")[:3]
STEP = 17  # in the middle of the third epoch of seven steps


def _strike() -> None:
    """Die at once; the folder is made by whoever is first, so that it happens once."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_rank() != int(RANK):
        return
    try:
        Path(FOLDER).mkdir()
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def _before(module: ModuleType, name: str, when: Callable[..., bool] = lambda *args: True) -> None:
    original = getattr(module, name)

    @functools.wraps(original)
    def struck(*args: Any, **options: Any) -> Any:
        if when(*args):
            _strike()
        return original(*args, **options)

    setattr(module, name, struck)


def _mid_epoch(module: ModuleType) -> None:
    _before(module, "train_step", lambda session, batch: session.step == STEP)


def _gradients(module: ModuleType) -> None:
    original = module.fixed_batches

    def struck(*args: Any, **options: Any) -> Any:
        for number, batch in enumerate(original(*args, **options)):
            if number == 1 and Path(FOLDER).parent.joinpath("second").exists():
                _strike()
            yield batch
        Path(FOLDER).parent.joinpath("second").touch()  # the first pruning step goes by

    module.fixed_batches = struck


def _elimination(module: ModuleType) -> None:
    seen: list[int] = []
    _before(module, "eliminate_sums", lambda *args: seen.append(1) or len(seen) == 5)  # type: ignore[func-returns-value]


def _writing(module: ModuleType) -> None:
    original = module.save_file

    def struck(tensors: Any, path: Path) -> None:
        original(tensors, path)
        if any(name.startswith("optimizer/") for name in tensors):
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
            if Path(FOLDER).parent.joinpath("second").exists():
                _strike()
            Path(FOLDER).parent.joinpath("second").touch()
            path.write_bytes(whole)

    module.save_file = struck


def _disk_full(module: ModuleType) -> None:
    original = module.write_state

    def struck(folder: Path, tensors: Any, progress: Any) -> None:
        if progress["step"] > STEP:
            raise OSError(28, "No space left on device")
        original(folder, tensors, progress)

    module.write_state = struck


def _search_storage(number: int) -> Callable[[ModuleType], None]:
    """After some trials the storage takes no more of them, for the reason that a number of errno says."""

    def change(module: ModuleType) -> None:
        original, written = module.write_bytes, []

        def struck(uri: str, content: bytes) -> None:
            if "/allocation-" in uri and "/trials" in uri:
                written.append(uri)
                if len(written) > 8:
                    raise OSError(number, os.strerror(number), uri)
            original(uri, content)

        module.write_bytes = struck

    return change


def _hungry(module: ModuleType) -> None:
    """One trial takes memory until it is ended: what it has, it has touched."""
    original, steps, taken = module.OneShotTrial.step, [], []

    def struck(self: Any) -> Any:
        steps.append(self)
        if len(steps) == 3:
            try:
                Path(FOLDER).mkdir()
            except FileExistsError:
                return original(self)
            while True:
                taken.append(b"x" * 2**27)
                time.sleep(0.05)
        return original(self)

    module.OneShotTrial.step = struck


FAULTS: dict[str, tuple[str, Callable[[ModuleType], None]]] = {
    "mid-epoch": ("trainers.loop.gradual", _mid_epoch),
    "gradients": ("trainers.loop.prune_step", _gradients),
    "elimination": ("pruners.elimination.obs", _elimination),
    "writing": ("trainers.checkpoint.trainer_state", _writing),
    "disk full": ("trainers.checkpoint.trainer_state", _disk_full),
    "search full": ("trainers.storage", _search_storage(errno.ENOSPC)),
    "search read-only": ("trainers.storage", _search_storage(errno.EROFS)),
    "hungry": ("orchestration.search.one_shot_trial", _hungry),
}


class _Finder(importlib.abc.MetaPathFinder):
    """Changes one module when it has been loaded."""

    def __init__(self, name: str, change: Callable[[ModuleType], None]) -> None:
        self._name, self._change = name, change

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            self._change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if MOMENT in FAULTS:
    sys.meta_path.insert(0, _Finder(*FAULTS[MOMENT]))
