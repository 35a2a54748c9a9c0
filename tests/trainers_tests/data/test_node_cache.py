"""What the processes of a node read is there once, and what they get is what each of them had before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_tables import dense_folder, images, png, table, tiny, write
from one_shot_inputs import actor, one_shot_inputs
from pyarrow import fs
from training_runs import CPU, Log, make_files, make_job

from orchestration.recipe.search import AllocationSearch
from trainers import storage
from trainers.checkpoint.folder import load_checkpoint, pack_folder, read_ranges, save_checkpoint, verify
from trainers.config.data import DataSettings
from trainers.data import datasets
from trainers.data.node_cache import Pixels, node_copy
from trainers.loop import gradual
from trainers.loop.gradual import run
from trainers.models import factory
from trainers.sources.parquet import decode


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """``far://…`` is a file system over a folder that is none of pyarrow's local ones; what is read of it."""
    (tmp_path / "far").mkdir()
    system = fs.SubTreeFileSystem(str(tmp_path / "far"), fs.LocalFileSystem())
    real, copy_files, seen = storage.resolve, fs.copy_files, []

    def resolve(uri: str, key: str = "storage") -> tuple[fs.FileSystem, str]:
        return (system, uri.removeprefix("far://")) if uri.startswith("far://") else real(uri, key)

    def copying(source: str, target: str, **options: Any) -> None:
        if options.get("source_filesystem") is system:
            seen.append(source)
        copy_files(source, target, **options)

    monkeypatch.setattr(storage, "resolve", resolve)
    monkeypatch.setattr(fs, "copy_files", copying)
    return seen


def test_node_cache__a_checkpoint_far_away_is_read_once(tmp_path: Path, copied: list[str]) -> None:
    """By a run whose teacher is the dense model too, by the next run on this machine, and by trials."""
    files = make_files(tmp_path)
    dense_folder(tmp_path / "far/dense")
    job = make_job(
        {**files, "dense": "far://dense"}, {"epochs": 2, "distill": {}}, {"schedule": {"steps": 1}}
    )
    for number in range(2):
        run(job, Log(tmp_path / f"log-{number}"), CPU)
    actor(one_shot_inputs("far://dense", AllocationSearch(images=8, by=("module",)), tmp_path)).step()
    # once by all of these, and once by the task that looks at an order, which is alone
    assert copied == ["dense", "dense"]
    dense_folder(tmp_path / "far/dense", seed=5)  # another model in its place is read anew
    result = load_checkpoint("far://dense", shared=True).model
    assert len(copied) == 3
    second = load_checkpoint(str(tmp_path / "far/dense")).model
    assert torch.equal(result.get_parameter("head.weight"), second.get_parameter("head.weight"))


def test_node_cache__what_a_killed_process_left_is_no_copy(
    tmp_path: Path, copied: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense_folder(tmp_path / "far/dense")

    def fails(*_: object, **__: object) -> None:
        raise OSError("the line is down")

    with monkeypatch.context() as broken:
        broken.setattr(fs, "copy_files", fails)
        with pytest.raises(OSError, match="line is down"):
            node_copy("far://dense")
    verify(node_copy("far://dense"), "far://dense")


def test_node_cache__local_folders_are_used_where_they_are(tmp_path: Path, cache: Path) -> None:
    assert node_copy(str(tmp_path)) == tmp_path
    assert not cache.exists()


def held_out(folder: Path, side: int = 16) -> tuple[datasets.ImageTable, dict[str, Any]]:
    content = table([i % 3 for i in range(20)]).to_pydict()
    for number, cell in enumerate(content["image"]):
        cell["bytes"] = png(number, side=side)
    labels = table([i % 3 for i in range(20)])
    whole = labels.set_column(0, "image", [content["image"]])
    settings = DataSettings(train=write(folder / "train.parquet", whole), holdout=0.5)
    config = factory.data_config(tiny()[0])
    return datasets.split(settings, "validation", datasets.eval_transform(config), 3), config


@pytest.mark.parametrize("side", [16, 23])  # as it is, and resized and cropped
def test_node_cache__pixels_are_those_of_timm_to_the_bit(side: int, tmp_path: Path) -> None:
    images, config = held_out(tmp_path, side)
    config |= {"crop_pct": 0.9}
    images = datasets.ImageTable(images.store, datasets.eval_transform(config), images._rows)
    pixels = Pixels.of(images, 7, config)
    assert pixels.images.dtype == torch.uint8
    batches = list(pixels.batches(0, 7, 4))
    assert [len(labels) for _, labels in batches] == [4, 3]
    result, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert labels.tolist() == [images[number][1] for number in range(7)]
    assert torch.equal(result, torch.stack([images[number][0] for number in range(7)]))
    assert torch.equal(next(pixels.batches(5, 7, 4))[0], result[5:])


def test_node_cache__they_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    monkeypatch.setattr(datasets, "decode", lambda cell: decoded.append(1) or decode(cell))
    images, config = held_out(tmp_path)
    first, second = (Pixels.of(images, 6, config) for _ in range(2))
    assert len(decoded) == 6
    assert torch.equal(first.images, second.images)
    (file,) = (tmp_path / "cache/pixels").glob("*/images.npy")
    assert np.array_equal(np.load(file), first.images.numpy())
    # other images, sizes or crops are other files
    Pixels.of(datasets.ImageTable(images.store, images._transform, images._rows[::-1]), 6, config)
    Pixels.of(images, 6, config | {"crop_pct": 0.5})
    assert len(decoded) == 18
    assert len(list((tmp_path / "cache/pixels").glob("*/images.npy"))) == 3


def test_node_cache__a_notice_saves_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked at each look; a second machine that goes is another notice."""
    monkeypatch.setattr(gradual, "_MOST_STEPS", 1)
    monkeypatch.setattr(gradual, "_ASK_SECONDS", -1.0)
    answers = iter([None, "a", "a", "a", None, "a b", "a b", *[None] * 99])
    log = Log(tmp_path / "log")
    run(make_job(make_files(tmp_path), {"checkpoint_every": 99}), log, CPU, leaving=lambda: next(answers))
    # asked after steps 1 … 6, 8 …; saved when 'a' and when 'a b' are told, and at the end
    assert sorted(log.saved) == [2, 6, 28]


def test_node_cache__a_compressed_folder_can_still_become_int8(tmp_path: Path) -> None:
    """What training for INT8 found out lies beside the weights."""
    model, arguments = tiny()
    ranges = {"blocks.0.attn.qkv.input.min": torch.tensor(-1.5)}
    whole, packed, again = (tmp_path / name for name in ("whole", "packed", "again"))
    save_checkpoint(whole, model, model_args=arguments, masks=None, record={}, ranges=ranges)
    for source, target in ((whole, packed), (packed, again)):
        target.mkdir()
        pack_folder(source, target, verify(source, str(source)))
        result = read_ranges(target)
        assert result is not None
        assert result["blocks.0.attn.qkv.input.min"].item() == -1.5
        assert "ranges.safetensors" in verify(target, str(target))["files"]
    assert torch.equal(load_checkpoint(str(again)).model(images(2)), model(images(2)))
