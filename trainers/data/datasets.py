"""Data sets and loaders for training and evaluation: rows of a store, decoded and transformed when read."""

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
from trainers.config.quantization import CALIBRATION_IMAGES
from trainers.data.arrow_store import Store
from trainers.data.augment import Augment, sample_seed
from trainers.data.sampler import EpochBatches, Sample
from trainers.sources.classes import Names, names_of
from trainers.sources.columns import Columns
from trainers.sources.parquet import decode

Batches = DataLoader[Any]
Transform = Callable[[Image.Image], Tensor]
_MOST_UNREADABLE = 100  # images in a row that are skipped before an error
_SHARED_MEMORY = "/dev/shm"  # through which processes of a DataLoader pass batches
_PREFETCHED = 2  # batches that each process holds ready: torch's default
_CALIBRATION_BATCH = 64


class ImageTable(Dataset[tuple[Tensor, int]]):
    """Rows of a store; an item is (image (3, H, W), label).

    Args:
        store: the encoded images.
        transform: makes the model's input of a decoded image.
        rows: which rows, in which order; default: all.
        tolerant: the next image replaces one that cannot be decoded.
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
        """Hash of which images the first ``count`` are."""
        digest = hashlib.sha256(np.ascontiguousarray(self._rows[:count], np.int64).tobytes())
        digest.update(f"{self.store.name} {self._tolerant} {len(self)}".encode())
        return digest.hexdigest()

    def where(self, index: int) -> str:
        """The Parquet file and the row of an image, as text."""
        return self.store.where(int(self._rows[index]))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The image at ``index`` and its label.

        Raises:
            InputError: an image that cannot be decoded, by file and row.
        """
        image, label, _ = self.readable(index)
        return self._transform(image), label

    def readable(self, index: int) -> tuple[Image.Image, int, int]:
        """Decode an image; if that fails and the table is tolerant, the first one after it that can be.

        Returns:
            The image, its label, and how many images were skipped.

        Raises:
            InputError: an image that cannot be decoded, or a hundred in a row, by file and row.
        """
        for skipped in range(_MOST_UNREADABLE):
            at = (index + skipped) % len(self)
            row = int(self._rows[at])
            try:
                return decode(self.store.cell(row)), int(self.store.labels[row]), skipped
            except (OSError, TypeError, KeyError) as error:
                if not self._tolerant:
                    reason = f"{self.store.where(row)} cannot be decoded ({error})"
                    raise InputError("data", self.store.uri, reason) from None
        raise InputError(
            "data",
            self.store.uri,
            f"{_MOST_UNREADABLE} images in a row cannot be decoded, at {self.where(at)}",
        )


class TrainingImages(Dataset[tuple[Tensor, Tensor, int, int]]):
    """Augmented images; an item is (pixels (H, W, 3), rectangle to erase (4,), label, images skipped for it).

    Augmentation is drawn from (seed, epoch, image), so that it depends neither on the number of workers and
    processes nor on what was read before.

    Args:
        images: the images before augmentation; their own transform is not used.
        augment: the augmentation.
        seed: of the run.
    """

    def __init__(self, images: ImageTable, augment: Augment, seed: int) -> None:
        self._images, self._augment, self._seed = images, augment, seed

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, sample: Sample) -> tuple[Tensor, Tensor, int, int]:
        image, label, skipped = self._images.readable(sample.row)
        return *self._augment(image, sample_seed(self._seed, sample)), label, skipped


def eval_transform(data_config: dict[str, Any]) -> Transform:
    """timm's evaluation transform of a model, so that plain timm sees the same pixels."""
    transform: Transform = create_transform(**data_config, is_training=False)
    return transform


def split(data: DataSettings, part: str, transform: Transform, seed: int) -> ImageTable:
    """Open a split of the data; without validation files a fixed part of train is held out.

    Args:
        data: the recipe's data.
        part: ``train``, ``validation`` or ``test``.
        transform: makes the model's input of a decoded image.
        seed: decides which images are held out.

    Returns:
        The split's images.

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
    """Names of the classes of the training images, in the order of the labels; ``()`` if there are none."""
    return () if data.train is None else names_of(data.train, key="data.train", columns=data.columns)


def images(uri: str, transform: Transform, *, key: str, columns: Columns | None = None) -> ImageTable:
    """Open all images of a Parquet file, folder or glob.

    Args:
        uri: the Parquet file, folder or glob.
        transform: makes the model's input of a decoded image.
        key: the option or recipe key that named it, for error messages.
        columns: the columns that the user named.

    Returns:
        The images in the order of their rows.
    """
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
    """Make the loader of one worker's training batches.

    Args:
        table: the training images.
        augment: their augmentation.
        batch: images of a step over all workers.
        rank: this worker.
        world: number of workers.
        seed: of the run; decides the order and the augmentation.
        processes: how many decode and augment; with 0 the worker does it between its steps.
        pin: copy batches to pinned memory, for a GPU.
        normed: whether the model has batch norms (:class:`EpochBatches`).

    Returns:
        The loader, whose batches are (pixels (N, H, W, 3), rectangles (N, 4), labels (N,), skipped (N,)), and
        its sampler, which sets the epoch.

    Raises:
        InputError: the batches that the processes prefetch do not fit into ``/dev/shm``.
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
    """Check that prefetched batches (``batch`` bytes each) fit into shared memory.

    Otherwise SIGBUS would kill the worker processes.
    """
    needed = processes * _PREFETCHED * batch
    try:
        volume = os.statvfs(_SHARED_MEMORY)
    except OSError:  # a system without /dev/shm
        return
    free = volume.f_bavail * volume.f_frsize
    if needed > free:
        expected = (
            f"{_SHARED_MEMORY} has {free / 1e6:.0f} MB free, and what they hold ready takes "
            f"{needed / 1e6:.0f} MB: enlarge it (docker run --shm-size=4g), take fewer, or 0 to decode "
            "between the steps"
        )
        raise InputError("training.data_workers", processes, expected)


def eval_loader(dataset: Dataset[tuple[Tensor, int]], batch: int, rank: int = 0, world: int = 1) -> Batches:
    """Make the loader of one worker's images for evaluation: every ``world``-th one, in order.

    Args:
        dataset: items are (image, label).
        batch: images of a batch.
        rank: this worker.
        world: number of workers, which together see each image once.

    Returns:
        A loader of (images (N, 3, H, W), labels (N,)).
    """
    size = len(dataset)  # type: ignore[arg-type]
    return DataLoader(Subset(dataset, range(rank, size, world)), batch)


def calibration_batches(images: ImageTable, count: int | None, seed: int) -> list[Tensor]:
    """Batches of images that are chosen at random, the same ones for the same seed, without their labels.

    Args:
        images: to choose from.
        count: how many; default: :data:`trainers.config.quantization.CALIBRATION_IMAGES`, or all there are.
        seed: decides which.

    Returns:
        Batches (N, 3, H, W).

    Raises:
        InputError: there are not so many.
    """
    if count is not None and count > len(images):
        raise InputError("quantize.images", count, f"there are {len(images)} images to choose from")
    count = min(CALIBRATION_IMAGES, len(images)) if count is None else count
    rows: Sequence[int] = np.random.default_rng(seed).permutation(len(images))[:count].tolist()
    return [batch for batch, _ in DataLoader(Subset(images, rows), _CALIBRATION_BATCH)]


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
    """Batches of images in a fixed random order, of which each worker takes every ``world``-th.

    Whatever the number of workers, together they take the same batches. When the images run out, the order
    starts again.

    Args:
        dataset: items are (image, label).
        batch: images of a batch.
        first: number of the first batch.
        last: number of the batch after the last one.
        rank: this worker.
        world: number of workers.
        seed: decides the order.

    Yields:
        (images (N, 3, H, W), labels (N,)).
    """
    size = len(dataset)  # type: ignore[arg-type]
    shuffled: Sequence[int] = np.random.default_rng(seed).permutation(size).tolist()
    for number in range(first + rank, last, world):
        chosen = [shuffled[(number * batch + i) % size] for i in range(batch)]
        images, labels = zip(*(dataset[index] for index in chosen), strict=True)
        yield torch.stack(images), torch.tensor(labels)


def first_images(
    dataset: Dataset[tuple[Tensor, int]], count: int, *, rank: int, world: int, seed: int
) -> list[Tensor]:
    """The first images of the order of :func:`fixed_batches`, of which each worker takes every ``world``-th.

    Args:
        dataset: items are (image, label).
        count: images of all workers together, at most.
        rank: this worker.
        world: number of workers.
        seed: decides the order.

    Returns:
        Batches (N, 3, H, W), at least one.

    Raises:
        InputError: there is not an image for each worker; raised on all of them.
    """
    size = len(dataset)  # type: ignore[arg-type]
    chosen: Sequence[int] = np.random.default_rng(seed).permutation(size)[:count].tolist()
    if len(chosen) < world:
        raise InputError("reconstruct", count, f"must be an image at least for each of {world} workers")
    return [images for images, _ in DataLoader(Subset(dataset, chosen[rank::world]), _CALIBRATION_BATCH)]
