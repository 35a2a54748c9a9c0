"""Images on this machine: every kind of picture, and everything that may be wrong with a file."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from image_tables import png, table, write
from pictures import BROKEN, CONFIG, GRADIENT, PICTURES, cells, grey16, rotated

from pruners.errors import InputError
from trainers.config.data import DataSettings
from trainers.config.training import AugmentSettings
from trainers.data import datasets
from trainers.data.arrow_store import Store
from trainers.data.augment import Augment
from trainers.data.sampler import Sample
from trainers.sources.parquet import decode


@pytest.mark.parametrize("kind", PICTURES)
def test_arrow_store__every_kind_of_picture_goes_through(kind: str, tmp_path: Path) -> None:
    made, size = PICTURES[kind]
    uri = write(tmp_path / "a.parquet", cells([made()], [0]))
    image = decode(Store.open(uri).cell(0))
    assert (image.mode, image.size) == ("RGB", size)
    pixels, label = datasets.images(uri, datasets.eval_transform(CONFIG), key="data")[0]
    assert pixels.shape == (3, 16, 16)
    assert torch.isfinite(pixels).all()
    assert label == 0
    augmented, _ = Augment(CONFIG, AugmentSettings(scale=(0.3, 1.0), flip=0.5))(image, 0)
    assert (augmented.shape, augmented.dtype) == ((16, 16, 3), torch.uint8)


def test_arrow_store__wide_greys_keep_their_shades() -> None:
    """Pillow alone would clip 16 bits at 255."""
    pixels = np.asarray(decode({"bytes": grey16(), "path": None}))[..., 0]
    assert np.abs(pixels - GRADIENT).max() <= 1
    integers = np.asarray(decode({"bytes": PICTURES["32-bit integers"][0](), "path": None}))[..., 0]
    assert np.abs(integers - GRADIENT).max() <= 1


def test_arrow_store__a_rotated_picture_stands_upright() -> None:
    pixels = np.asarray(decode({"bytes": rotated(), "path": None}), dtype=float)[..., 0]
    assert np.abs(pixels - np.rot90(GRADIENT, 3)).mean() < 3


def test_arrow_store__shards_are_one_store_that_travels_by_its_path(tmp_path: Path) -> None:
    for name, labels in (("a", [0, 1, 2]), ("b", [1]), ("c", [2, 0])):
        write(tmp_path / "shards" / f"{name}.parquet", table(labels, first=10 * ord(name)))
    store = Store.open(str(tmp_path / "shards"))
    assert store.labels.tolist() == [0, 1, 2, 1, 2, 0]
    assert store.where(0) == "a.parquet, row 0"
    assert store.where(3) == "b.parquet, row 0"
    assert store.where(5) == "c.parquet, row 1"
    content = pickle.dumps(store)
    assert len(content) < 1000
    again = pickle.loads(content)
    assert [again.cell(row) for row in range(6)] == [store.cell(row) for row in range(6)]
    assert decode(store.cell(4)).tobytes() == decode(png(10 * ord("c"), shade=100)).tobytes()


def test_arrow_store__a_store_follows_its_files(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.parquet", table([0, 1]))
    assert len(Store.open(uri)) == 2
    write(tmp_path / "a.parquet", table([0, 1, 2]))
    assert len(Store.open(uri)) == 3


def test_arrow_store__large_row_groups_and_small_ones(tmp_path: Path) -> None:
    labels = [i % 7 for i in range(600)]
    made = table(labels)
    store = Store.open(write(tmp_path / "a.parquet", made, row_group_size=11))
    assert store.labels.tolist() == labels
    for row in (0, 10, 11, 255, 256, 599):
        assert store.cell(row) == made["image"][row]["bytes"].as_py()


@pytest.fixture
def faulty(tmp_path: Path) -> str:
    """Rows 1 and 3 hold no picture, row 4 has no label."""
    contents = [png(0), b"no picture", png(2), BROKEN, png(4), png(5)]
    return write(tmp_path / "a.parquet", cells(contents, [0, 1, 2, 0, None, 2]))


def test_arrow_store__a_row_without_a_label_is_named(faulty: str) -> None:
    with pytest.raises(InputError, match=r"a\.parquet, row 4 has no label"):
        Store.open(faulty, key="data.train")


def test_arrow_store__a_picture_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.parquet", cells([png(0), BROKEN, None], [0, 1, 2]))
    images = datasets.images(uri, datasets.eval_transform(CONFIG), key="data")
    for row in (1, 2):
        with pytest.raises(InputError, match=rf"a\.parquet, row {row} cannot be decoded"):
            images[row]


def test_arrow_store__skipped_the_next_takes_its_place(faulty: str) -> None:
    settings = DataSettings(train=faulty, validation=faulty, bad_images="skip")
    images = datasets.split(settings, "train", datasets.eval_transform(CONFIG), 0)
    assert images.store.left_out == ["a.parquet, row 4: no label"]
    assert [images[i][1] for i in range(5)] == [0, 2, 2, 2, 2]
    training = datasets.TrainingImages(images, Augment(CONFIG, AugmentSettings()), seed=0)
    assert [training[Sample(i, 0)][2:] for i in range(5)] == [(0, 0), (2, 1), (2, 0), (2, 1), (2, 0)]


def test_arrow_store__a_truncated_shard(tmp_path: Path) -> None:
    write(tmp_path / "shards" / "a.parquet", table([0, 1]))
    whole = Path(write(tmp_path / "shards" / "b.parquet", table([0, 1])))
    whole.write_bytes(whole.read_bytes()[:-50])
    with pytest.raises(InputError, match=r"b\.parquet cannot be read"):
        Store.open(str(tmp_path / "shards"), key="data.train")
    store = Store.open(str(tmp_path / "shards"), tolerant=True)
    assert len(store) == 2
    assert "b.parquet cannot be read" in store.left_out[0]
    (tmp_path / "shards" / "a.parquet").unlink()
    with pytest.raises(InputError, match="holds no image that can be read"):
        Store.open(str(tmp_path / "shards"), tolerant=True)


def test_arrow_store__a_damaged_row_group(tmp_path: Path) -> None:
    """What was read before it stays, if the recipe is tolerant."""
    labels = [i % 3 for i in range(600)]
    file = Path(write(tmp_path / "a.parquet", table(labels), row_group_size=300, compression="zstd"))
    offset = pq.read_metadata(file).row_group(1).column(0).dictionary_page_offset
    content = bytearray(file.read_bytes())
    content[offset : offset + 4000] = bytes(4000)
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.parquet, rows 300 to 599 cannot be read"):
        Store.open(str(file))
    store = Store.open(str(file), tolerant=True)
    assert 300 <= len(store) < 600
    assert len(store.left_out) == 1


def test_arrow_store__no_room_for_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = write(tmp_path / "a.parquet", table([0]))
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="cannot be copied to"):
        Store.open(uri)
