"""What all processes of a node read, once on its disk, in the folder of the images
(:mod:`trainers.data.arrow_store`).

Whoever needs it first makes it under another name, and gives it its own when it is whole; the others wait.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from pyarrow import fs
from timm.data import create_transform
from torch import Tensor

from trainers import storage
from trainers.data.arrow_store import cache_folder
from trainers.data.datasets import ImageTable

_CHECKPOINTS, _PIXELS = "checkpoints", "pixels"
_FORMAT = 1


def node_copy(uri: str) -> Path:
    """A folder on this machine: itself where it is local, else a copy that stays, made once for a node.

    A copy is known by the files' names, sizes and times.
    """
    system, path = storage.resolve(uri)
    if isinstance(system, fs.LocalFileSystem):
        return Path(path)
    entries = system.get_file_info(fs.FileSelector(path, recursive=True))
    files = sorted((entry.path, entry.size, entry.mtime_ns) for entry in entries if entry.is_file)
    here = fs.LocalFileSystem()

    def copy(target: Path) -> None:
        target.mkdir()
        fs.copy_files(path, str(target), source_filesystem=system, destination_filesystem=here)

    return _once(cache_folder() / _CHECKPOINTS / _digest(uri, files), copy)


@dataclass(frozen=True)
class Pixels:
    """Images as evaluation sees them before they are normalised: 8 bits wide, in memory that processes share.

    Attributes:
        images: (N, 3, H, W), uint8; ``labels`` (N,).
        mean, std: (3, 1, 1), of pixels in 0…1, on the device that evaluates.
    """

    images: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, table: ImageTable, count: int, config: dict[str, Any], device: str = "cpu") -> Pixels:
        """The first ``count`` images of a table, decoded once for a node.

        Args:
            config: timm's preprocessing of the model.

        Raises:
            InputError: an image that cannot be decoded.
        """
        transform = create_transform(**config, is_training=False, normalize=False)

        def write(folder: Path) -> None:
            folder.mkdir()
            size, labels = (count, 3, *config["input_size"][1:]), np.empty(count, np.int64)
            pixels = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, size)
            for number in range(count):
                image, labels[number], _ = table.readable(number)
                pixels[number] = transform(image).numpy()
            pixels.flush()
            np.save(folder / "labels.npy", labels)

        shown = {key: config[key] for key in ("input_size", "interpolation", "crop_pct", "crop_mode")}
        folder = _once(cache_folder() / _PIXELS / _digest(table.fingerprint(count), shown), write)
        # copied where it is written to, which nobody does: PyTorch takes no read-only memory
        images, labels = (
            torch.from_numpy(np.load(folder / name, mmap_mode="c")) for name in ("images.npy", "labels.npy")
        )
        mean, std = (torch.tensor(config[key], device=device).view(-1, 1, 1) for key in ("mean", "std"))
        return cls(images, labels, mean, std)

    def batches(self, first: int, last: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels from ``first`` up to ``last``, as timm's own transform gives them."""
        for start in range(first, last, size):
            some = slice(start, min(start + size, last))
            images = self.images[some].to(self.mean.device).float().div_(255)
            yield images.sub_(self.mean).div_(self.std), self.labels[some]


def _once(path: Path, make: Callable[[Path], None]) -> Path:
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():  # another process of this machine may have been first
            partial = path.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
            try:
                make(partial)
                partial.replace(path)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return path


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, *parts]).encode()).hexdigest()[:24]
