"""Splits, loaders and the fixed batches: the same images whoever asks, each where it belongs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from helpers import quick
from hypothesis import given
from hypothesis import strategies as st
from image_tables import IMAGES, png, table, write
from pictures import CONFIG
from PIL import Image
from torch.utils.data import Dataset
from torchvision import transforms

from pruners.errors import InputError
from trainers.config.data import DataSettings
from trainers.config.training import AugmentSettings
from trainers.data import datasets
from trainers.data.augment import Augment, Normalise

COUNT = 23


class Numbers(Dataset[tuple[torch.Tensor, int]]):
    """Image ``i`` is filled with ``i`` and has the label ``i``."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((1, 2, 2), float(index)), index


@pytest.fixture
def files(tmp_path: Path) -> DataSettings:
    return DataSettings(
        train=write(tmp_path / "train.parquet", table(list(range(COUNT)))),
        test=write(tmp_path / "test.parquet", table([0, 1])),
        holdout=0.2,
    )


def labels(dataset: Dataset[tuple[torch.Tensor, int]]) -> list[int]:
    return [dataset[i][1] for i in range(len(dataset))]  # type: ignore[arg-type]


def part(settings: DataSettings, name: str, seed: int = 0) -> list[int]:
    return labels(datasets.split(settings, name, datasets.eval_transform(CONFIG), seed))


def test_datasets__a_part_of_train_is_held_out(files: DataSettings) -> None:
    train, validation = part(files, "train"), part(files, "validation")
    assert sorted(train + validation) == list(range(COUNT))
    assert len(validation) == round(0.2 * COUNT)


def test_datasets__the_split_is_fixed_by_the_seed(files: DataSettings) -> None:
    assert part(files, "validation", 3) == part(files, "validation", 3)
    assert part(files, "validation", 3) != part(files, "validation", 4)


def test_datasets__validation_files_leave_train_whole(files: DataSettings) -> None:
    given_files = files.model_copy(update={"validation": files.test})
    assert part(given_files, "train") == list(range(COUNT))
    assert part(given_files, "validation") == part(given_files, "test") == [0, 1]


def test_datasets__one_image_is_held_out_at_least(tmp_path: Path) -> None:
    few = DataSettings(train=write(tmp_path / "a.parquet", table([0, 1, 2])), holdout=0.01)
    assert len(part(few, "validation")) == 1


def test_datasets__no_test_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.test"):
        part(DataSettings(train=write(tmp_path / "a.parquet", table([0]))), "test")


def test_datasets__pixels_are_those_of_the_image(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.parquet", table([1]))
    image, label = datasets.images(uri, datasets.eval_transform(CONFIG), key="data")[0]
    expected = (
        torch.tensor(list(datasets.decode(png(0, shade=50)).tobytes())).view(16, 16, 3).permute(2, 0, 1)
    )
    assert torch.allclose(image, expected / 255 * 2 - 1, atol=1e-6)
    assert label == 1


def training_pixels(
    image: Image.Image, settings: AugmentSettings, count: int = 1, seed: int = 0
) -> torch.Tensor:
    """What a training step makes of an image, several times."""
    augment, normalise = Augment(CONFIG, settings), Normalise(CONFIG, settings, torch.device("cpu"))
    pixels, rectangles = zip(*(augment(image, seed + n) for n in range(count)), strict=True)
    return normalise(torch.stack(pixels), torch.stack(rectangles))


def test_datasets__training_without_augmentation_sees_the_same_pixels(tmp_path: Path) -> None:
    image = datasets.decode(png(0))
    assert torch.equal(training_pixels(image, AugmentSettings())[0], datasets.eval_transform(CONFIG)(image))


@pytest.mark.parametrize(
    "augment",
    [
        {"shift": 3},
        {"scale": (0.3, 0.5)},
        {"flip": 1.0},
        {"rand_augment": "rand-m9-mstd0.5-inc1"},
        {"erasing": 1.0},
    ],
)
def test_datasets__augmentations_change_pixels_and_follow_the_seed(augment: dict[str, Any]) -> None:
    image = datasets.decode(png(0))

    def seen(seed: int) -> torch.Tensor:
        return training_pixels(image, AugmentSettings.model_validate(augment), 8, seed)

    assert seen(0).shape == (8, 3, 16, 16)
    assert torch.equal(seen(0), seen(0))
    plain = datasets.eval_transform(CONFIG)(image)
    assert any(not torch.allclose(image, plain, atol=1e-6) for image in seen(0))


def test_datasets__pixels_are_erased_as_torchvision_does() -> None:
    """The same draws, the same rectangle: on normalised images, after all else."""
    image = datasets.decode(png(0))
    theirs = transforms.Compose([datasets.eval_transform(CONFIG), transforms.RandomErasing(0.7)])
    expected = []
    for seed in range(20):
        torch.manual_seed(seed)
        expected.append(theirs(image))
    assert torch.equal(training_pixels(image, AugmentSettings(erasing=0.7), 20), torch.stack(expected))
    assert 5 < sum(bool((image == 0).any()) for image in expected) < 20


def test_datasets__an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    content = table([0, 1]).to_pydict()
    content["image"][1] = {"bytes": b"nothing", "path": "x"}
    broken = pa.table({"image": pa.array(content["image"], IMAGES), "label": content["label"]})
    uri = write(tmp_path / "a.parquet", broken)
    images = datasets.images(uri, datasets.eval_transform(CONFIG), key="data")
    with pytest.raises(InputError, match=r"a\.parquet.*row 1 cannot be decoded \(no image of a known"):
        images[1]


@quick(60)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5))
def test_datasets__together_the_workers_see_each_image_once(count: int, batch: int, world: int) -> None:
    loaders = [datasets.eval_loader(Numbers(count), batch, rank, world) for rank in range(world)]
    seen = [label for loader in loaders for _, batch_of in loader for label in batch_of.tolist()]
    assert Counter(seen) == Counter(range(count))


@quick(60)
@given(st.integers(1, 30), st.integers(1, 8), st.integers(1, 12), st.integers(1, 4), st.integers(0, 99))
def test_datasets__fixed_batches_are_the_same_for_any_number_of_workers(
    size: int, batch: int, count: int, world: int, seed: int
) -> None:
    def batches(rank: int, world: int) -> list[list[int]]:
        batches = datasets.fixed_batches(Numbers(size), batch, 0, count, rank=rank, world=world, seed=seed)
        return [chosen.tolist() for _, chosen in batches]

    alone = batches(0, 1)
    shared = [batches(rank, world) for rank in range(world)]
    assert [shared[number % world][number // world] for number in range(count)] == alone
    assert [len(chosen) for chosen in alone] == [batch] * count
    flat = [label for chosen in alone for label in chosen]
    assert len(set(flat[:size])) == min(size, len(flat))  # no image twice before all were seen


def test_datasets__shared_memory_that_is_too_small_is_told_before_training(
    files: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three processes hold two batches of eight images of 16×16 each: 36,864 bytes; Docker gives little."""
    images = datasets.split(files, "train", datasets.eval_transform(CONFIG), 0)
    augment = Augment(CONFIG, AugmentSettings())

    class Room:
        f_bavail, f_frsize = 9, 4096

    monkeypatch.setattr("trainers.data.datasets.os.statvfs", lambda path: Room)
    datasets.train_loader(images, augment, 16, rank=0, world=2, seed=0, processes=3)
    Room.f_bavail = 8
    expected = r"training\.data_workers = 3: /dev/shm has 0 MB free.*--shm-size=4g"
    with pytest.raises(InputError, match=expected):
        datasets.train_loader(images, augment, 16, rank=0, world=2, seed=0, processes=3)
    datasets.train_loader(images, augment, 16, rank=0, world=2, seed=0, processes=0)
