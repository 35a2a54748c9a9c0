"""Images for training and evaluation: encoded rows of a store, decoded and transformed as they are read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from pruners.arithmetic import ceil_div
from pruners.errors import InputError
from trainers.config.data import DataSettings
from trainers.config.quantization import IMAGES
from trainers.data.arrow_store import Store
from trainers.data.augment import Augment, sample_seed
from trainers.data.sampler import EpochBatches, Sample
from trainers.sources.classes import Names, names_of
from trainers.sources.columns import Columns
from trainers.sources.parquet import decode

Batches = DataLoader[Any]
Transform = Callable[[Image.Image], Tensor]
_TRIES = 100  # unreadable images in a row
_SHARED = "/dev/shm"  # by which processes hand on what they decoded
_AHEAD = 2  # batches that each of them holds ready: torch's default
_CHOSEN = 64  # images at once, where there is no training


class ImageTable(Dataset[tuple[Tensor, int]]):
    """Rows of a store; an item is (image tensor, label).

    Args:
        rows: which rows, in which order; default all.
        tolerant: the next image takes the place of one that cannot be decoded.
    """

    def __init__(
        self,
        store: Store,
        transform: Transform,
        rows: np.ndarray | None = None,
        *,
        tolerant: bool = False,
    ) -> None:
        self.store = store
        self._transform = transform
        self._rows = np.arange(len(store)) if rows is None else rows
        self._tolerant = tolerant

    def __len__(self) -> int:
        return len(self._rows)

    def fingerprint(self, count: int) -> str:
        """Of its first ``count`` images."""
        digest = hashlib.sha256(np.ascontiguousarray(self._rows[:count], np.int64).tobytes())
        digest.update(f"{self.store.name} {self._tolerant} {len(self)}".encode())
        return digest.hexdigest()

    def where(self, index: int) -> str:
        """File and row of an image."""
        return self.store.where(int(self._rows[index]))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The image at ``index`` and its label.

        Raises:
            InputError: an image that cannot be decoded, by file and row.
        """
        image, label, _ = self.readable(index)
        return self._transform(image), label

    def readable(self, index: int) -> tuple[Image.Image, int, int]:
        """An image, its label, and how many before it could not be decoded."""
        for skipped in range(_TRIES):
            at = (index + skipped) % len(self)
            row = int(self._rows[at])
            try:
                return decode(self.store.cell(row)), int(self.store.labels[row]), skipped
            except (OSError, TypeError, KeyError) as error:
                if not self._tolerant:
                    reason = f"{self.store.where(row)} cannot be decoded ({error})"
                    raise InputError("data", self.store.uri, reason) from None
        raise InputError(
            "data", self.store.uri, f"{_TRIES} images in a row cannot be decoded, at {self.where(at)}"
        )


class TrainingImages(Dataset[tuple[Tensor, Tensor, int, int]]):
    """Images as training sees them; an item is (pixels, rectangle to erase, label, images skipped for it).

    Augmentation is drawn from (seed, epoch, image), so that it depends neither on the number of workers and
    processes nor on what was read before.
    """

    def __init__(self, images: ImageTable, augment: Augment, seed: int) -> None:
        self._images, self._augment, self._seed = images, augment, seed

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, sample: Sample) -> tuple[Tensor, Tensor, int, int]:
        image, label, skipped = self._images.readable(sample.row)
        return *self._augment(image, sample_seed(self._seed, sample)), label, skipped


def eval_transform(data_config: dict[str, Any]) -> Transform:
    """timm's own evaluation transform, so that plain timm sees the very same pixels."""
    transform: Transform = create_transform(**data_config, is_training=False)
    return transform


def split(data: DataSettings, part: str, transform: Transform, seed: int) -> ImageTable:
    """``train``, ``validation`` or ``test``; without validation files a fixed part of train is held out.

    Raises:
        InputError: the recipe names no such part.
    """
    tolerant = data.bad_images == "skip"
    uri: str | None = getattr(data, part)
    if uri is not None and (part == "test" or data.validation is not None):
        return ImageTable(
            Store.open(uri, key=f"data.{part}", tolerant=tolerant, columns=data.columns),
            transform,
            tolerant=tolerant,
        )
    if part == "test" or data.train is None:
        raise InputError(f"data.{part}", uri, "the recipe names no such images")
    whole = Store.open(data.train, key="data.train", tolerant=tolerant, columns=data.columns)
    shuffled = np.random.default_rng(seed).permutation(len(whole))
    held_out = max(1, round(data.holdout * len(whole)))
    chosen = shuffled[:held_out] if part == "validation" else shuffled[held_out:]
    return ImageTable(whole, transform, chosen, tolerant=tolerant)


def class_names(data: DataSettings) -> Names:
    """What the training images call their classes, in the order of the labels; ``()`` if they do not."""
    return () if data.train is None else names_of(data.train, key="data.train", columns=data.columns)


def images(uri: str, transform: Transform, *, key: str, columns: Columns | None = None) -> ImageTable:
    """All images of a Parquet file, folder or glob, in order."""
    return ImageTable(Store.open(uri, key=key, columns=columns), transform)


def train_loader(
    table: ImageTable,
    augment: Augment,
    batch: int,
    *,
    rank: int,
    world: int,
    seed: int,
    processes: int,
    pin: bool = False,
    normed: bool = False,
) -> tuple[Batches, EpochBatches]:
    """Shuffled batches of one worker, and the sampler that says which epoch they are of.

    Args:
        batch: images a step over all workers.
        processes: that decode and augment; 0 does it between the steps.
        normed: the model has batch norms (:class:`EpochBatches`).

    Raises:
        InputError: what they hand on does not fit into ``/dev/shm``.
    """
    _check_shared_memory(processes, ceil_div(batch, world) * augment.bytes)
    sampler = EpochBatches(len(table), batch, rank=rank, world=world, seed=seed, normed=normed)
    loader: Batches = DataLoader(
        TrainingImages(table, augment, seed),
        batch_sampler=sampler,
        num_workers=processes,
        persistent_workers=processes > 0,
        multiprocessing_context="forkserver" if processes else None,
        pin_memory=pin,
    )
    return loader, sampler


def _check_shared_memory(processes: int, batch: int) -> None:
    """Whether the batches (of so many bytes) that processes hold ready fit: else a signal ends them."""
    needed = processes * _AHEAD * batch
    try:
        there = os.statvfs(_SHARED)
    except OSError:  # a system without it
        return
    free = there.f_bavail * there.f_frsize
    if needed > free:
        expected = (
            f"{_SHARED} has {free / 1e6:.0f} MB free, and what they hold ready takes {needed / 1e6:.0f} MB: "
            "enlarge it (docker run --shm-size=4g), take fewer, or 0 to decode between the steps"
        )
        raise InputError("training.data_workers", processes, expected)


def eval_loader(dataset: Dataset[tuple[Tensor, int]], batch: int, rank: int = 0, world: int = 1) -> Batches:
    """Every ``world``-th image in order: together the workers see each image once."""
    size = len(dataset)  # type: ignore[arg-type]
    return DataLoader(Subset(dataset, range(rank, size, world)), batch)


def chosen(images: ImageTable, count: int | None, seed: int) -> list[Tensor]:
    """Batches of ``count`` images, the same ones for the same seed, without their labels.

    Args:
        count: default :data:`trainers.config.quantization.IMAGES`, or all there are.

    Raises:
        InputError: there are not so many.
    """
    if count is not None and count > len(images):
        raise InputError("quantize.images", count, f"there are {len(images)} images to choose from")
    count = min(IMAGES, len(images)) if count is None else count
    rows: Sequence[int] = np.random.default_rng(seed).permutation(len(images))[:count].tolist()
    return [batch for batch, _ in DataLoader(Subset(images, rows), _CHOSEN)]


def fixed_batches(
    dataset: Dataset[tuple[Tensor, int]],
    batch: int,
    first: int,
    last: int,
    *,
    rank: int,
    world: int,
    seed: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches ``first`` to ``last`` of a fixed order, each worker every ``world``-th of them.

    Whatever the number of workers, together they are the same batches; images come round again when they
    run out.
    """
    size = len(dataset)  # type: ignore[arg-type]
    shuffled: Sequence[int] = np.random.default_rng(seed).permutation(size).tolist()
    for number in range(first + rank, last, world):
        chosen = [shuffled[(number * batch + i) % size] for i in range(batch)]
        images, labels = zip(*(dataset[index] for index in chosen), strict=True)
        yield torch.stack(images), torch.tensor(labels)
