"""Images for training and evaluation: a table of encoded images, decoded and transformed as they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision import transforms

from pruners.errors import InputError
from trainers.config import AugmentSettings, DataSettings
from trainers.tables import decode, read_table

Batches = DataLoader[Any]
Transform = Callable[[Image.Image], Tensor]


class ImageTable(Dataset[tuple[Tensor, int]]):
    """Encoded images in an Arrow table; an item is (image tensor, label)."""

    def __init__(self, table: pa.Table, transform: Transform, uri: str) -> None:
        self._images = table["image"].combine_chunks()
        self._labels = table["label"].to_numpy()
        self._transform = transform
        self._uri = uri

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            image = decode(self._images[index].as_py())
        except (OSError, TypeError, KeyError) as error:
            raise InputError("data", self._uri, f"row {index} cannot be decoded ({error})") from None
        return self._transform(image), int(self._labels[index])


def eval_transform(data_config: dict[str, Any]) -> Transform:
    """timm's own evaluation transform, so that plain timm sees the very same pixels."""
    transform: Transform = create_transform(**data_config, is_training=False)
    return transform


def train_transform(data_config: dict[str, Any], augment: AugmentSettings) -> Transform:
    """Resize or crop, augment, normalise."""
    size = tuple(data_config["input_size"][1:])
    mean, std = data_config["mean"], data_config["std"]
    steps: list[Any] = []
    if augment.scale is not None:
        bicubic = transforms.InterpolationMode.BICUBIC
        steps.append(transforms.RandomResizedCrop(size, scale=augment.scale, interpolation=bicubic))
    else:
        steps.append(transforms.Resize(size))
    if augment.shift:
        steps.append(transforms.RandomCrop(size, padding=augment.shift))
    if augment.flip:
        steps.append(transforms.RandomHorizontalFlip(augment.flip))
    if augment.rand_augment is not None:
        fill = tuple(round(255 * channel) for channel in mean)
        steps.append(rand_augment_transform(augment.rand_augment, {"img_mean": fill}))
    steps += [transforms.ToTensor(), transforms.Normalize(mean, std)]
    if augment.erasing:
        steps.append(transforms.RandomErasing(augment.erasing))
    composed: Transform = transforms.Compose(steps)
    return composed


def split(data: DataSettings, part: str, transform: Transform, seed: int) -> Dataset[tuple[Tensor, int]]:
    """``train``, ``validation`` or ``test``; without validation files a fixed part of train is held out.

    Raises:
        InputError: the recipe names no such part.
    """
    uri: str | None = getattr(data, part)
    if uri is not None and (part == "test" or data.validation is not None):
        return ImageTable(read_table(uri, key=f"data.{part}"), transform, uri)
    if part == "test" or data.train is None:
        raise InputError(f"data.{part}", uri, "the recipe names no such images")
    whole = ImageTable(read_table(data.train, key="data.train"), transform, data.train)
    shuffled = np.random.default_rng(seed).permutation(len(whole))
    held_out = max(1, round(data.holdout * len(whole)))
    chosen = shuffled[:held_out] if part == "validation" else shuffled[held_out:]
    return Subset(whole, chosen.tolist())


def train_loader(
    dataset: Dataset[tuple[Tensor, int]], batch: int, *, rank: int, world: int, seed: int, processes: int
) -> Batches:
    """Shuffled batches of one worker; ``set_epoch`` of its sampler reshuffles.

    Args:
        batch: images a step of this worker.
    """
    sampler: DistributedSampler[tuple[Tensor, int]] = DistributedSampler(
        dataset, num_replicas=world, rank=rank, seed=seed, shuffle=True
    )
    return DataLoader(
        dataset,
        batch,
        sampler=sampler,
        num_workers=processes,
        persistent_workers=processes > 0,
        multiprocessing_context="forkserver" if processes else None,
    )


def eval_loader(dataset: Dataset[tuple[Tensor, int]], batch: int, rank: int = 0, world: int = 1) -> Batches:
    """Every ``world``-th image in order: together the workers see each image once."""
    size = len(dataset)  # type: ignore[arg-type]
    return DataLoader(Subset(dataset, range(rank, size, world)), batch)


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
