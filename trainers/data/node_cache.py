"""Local copies shared by all processes of a node, in the cache folder of :mod:`trainers.data.arrow_store`.

The first process that needs one writes it under a temporary name and renames it when it is complete; the
others wait for it.
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
from trainers.cache_folder import cache_folder
from trainers.data.datasets import ImageTable

_CHECKPOINTS, _PIXELS = "checkpoints", "pixels"
_FORMAT = 1


def node_copy(uri: str) -> Path:
    """A folder as a local path: the folder itself where it is local, else a copy that all processes share.

    Copies are named by a hash of the files' names, sizes and times.
    """
    system, path = storage.resolve(uri)
    if isinstance(system, fs.LocalFileSystem):
        return Path(path)
    entries = system.get_file_info(fs.FileSelector(path, recursive=True))
    files = sorted((entry.path, entry.size, entry.mtime_ns) for entry in entries if entry.is_file)
    local = fs.LocalFileSystem()

    def copy(target: Path) -> None:
        target.mkdir()
        fs.copy_files(path, str(target), source_filesystem=system, destination_filesystem=local)

    return _once(cache_folder() / _CHECKPOINTS / _digest(uri, files), copy)


@dataclass(frozen=True)
class Pixels:
    """Images resized for evaluation but not normalised: 8 bits a channel, in memory shared by processes.

    Attributes:
        images: (N, 3, H, W), uint8.
        labels: (N,), int64.
        mean, std: (3, 1, 1), of pixels in 0…1, on the device that evaluates.
    """

    images: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, table: ImageTable, count: int, config: dict[str, Any], device: str = "cpu") -> Pixels:
        """Decode the first images of a table, once for all processes of a node.

        Args:
            table: the images.
            count: how many.
            config: timm's preprocessing of the model.
            device: where batches are normalised.

        Returns:
            The images, memory-mapped.

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
        # mapped copy-on-write, because PyTorch takes no read-only memory; it is never written to
        images, labels = (
            torch.from_numpy(np.load(folder / name, mmap_mode="c")) for name in ("images.npy", "labels.npy")
        )
        mean, std = (torch.tensor(config[key], device=device).view(-1, 1, 1) for key in ("mean", "std"))
        return cls(images, labels, mean, std)

    def batches(self, first: int, last: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of normalised images, equal to those of timm's transform.

        Args:
            first: the first image.
            last: the image after the last one.
            size: images of a batch.

        Yields:
            (images (N, 3, H, W) float32 on the device, labels (N,)).
        """
        for start in range(first, last, size):
            rows = slice(start, min(start + size, last))
            images = self.images[rows].to(self.mean.device).float().div_(255)
            yield images.sub_(self.mean).div_(self.std), self.labels[rows]


def _once(path: Path, make: Callable[[Path], None]) -> Path:
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():  # another process of this machine may have been first
            partial = path.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
            try:
                make(partial)
                partial.replace(path)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return path


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, *parts]).encode()).hexdigest()[:24]
