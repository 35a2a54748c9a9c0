"""What MLflow is told of a sweep's images, and on which runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from image_tables import table, write

from orchestration.cluster.capacity import ClusterSize
from orchestration.preflight.checks import prepare
from orchestration.recipe.loading import load_recipe
from orchestration.state.trial_log import TrialLog
from orchestration.sweep.context import Sweep
from orchestration.tracking.datasets import Dataset, datasets
from pruners.errors import InputError
from trainers.config.data import DataSettings

HASH = "0123456789abcdef"


@pytest.fixture
def data(tmp_path: Path) -> DataSettings:
    """Ten images of training in two files of a folder, three of test."""
    for name, labels in (("train/a", [0, 1, 2, 0, 1, 2]), ("train/b", [0, 1, 2, 0]), ("cats", [0, 1, 2])):
        write(tmp_path / f"{name}.parquet", table(labels))
    return DataSettings(train=f"{tmp_path}/train", test=f"{tmp_path}/cats.parquet")


def test_datasets__parts_by_name_number_and_place_for_others(data: DataSettings) -> None:
    assert datasets(data, HASH) == [
        Dataset("train", "0123456789ab", "train", 10, "train"),
        Dataset("cats-test", "0123456789ab", "cats.parquet", 3, "test"),
    ]


def test_datasets__data_of_our_own_bear_their_name(data: DataSettings) -> None:
    assert [dataset.name for dataset in datasets(data, HASH, "digits")] == ["digits-train", "digits-test"]


@pytest.mark.parametrize(
    ("source", "kind"), [("train", "local"), ("s3://bucket/train", "s3"), ("gs://bucket/x.parquet", "gs")]
)
def test_datasets__what_kind_of_place_it_is(source: str, kind: str) -> None:
    assert Dataset("train", "0", source, 1, "train").source_type == kind


def hash_of(folder: Path, **changes: Any) -> str:
    """Of the data of a recipe for the images of ``data``, with other values of some keys."""
    files = {"data.train": f"{folder}/train", "data.test": f"{folder}/cats.parquet"} | changes
    overrides = [f"{key}={value}" for key, value in files.items()]
    recipe = load_recipe("demo", ["data={}", "model.classes=3", f"storage={folder}/runs", *overrides])
    return prepare(recipe).data_hash


def test_datasets__the_hash_says_which_images_are_held_out(data: DataSettings, tmp_path: Path) -> None:
    assert hash_of(tmp_path) == hash_of(tmp_path, **{"pruning.sparsity": 0.5})
    other = [{"seed": 1}, {"data.holdout": 0.3}, {"data.bad_images": "skip"}, {"data.train": data.test}]
    assert len({hash_of(tmp_path), *(hash_of(tmp_path, **changes) for changes in other)}) == 5


def test_datasets__images_of_a_file_of_their_own_are_the_same_for_each_seed(
    data: DataSettings, tmp_path: Path
) -> None:
    own = {"data.validation": data.test}
    assert hash_of(tmp_path, **own) == hash_of(tmp_path, seed=1, **own) != hash_of(tmp_path)


def test_datasets__images_that_are_gone_are_named(data: DataSettings, tmp_path: Path) -> None:
    (tmp_path / "cats.parquet").unlink()
    with pytest.raises(InputError, match=r"data\.test"):
        datasets(data, HASH)


@pytest.mark.parametrize(("done", "expected"), [(False, [["digits-train"]]), (True, [])])
def test_datasets__a_phase_reads_no_test_images(
    data: DataSettings, tmp_path: Path, done: bool, expected: list[list[str]]
) -> None:
    heard: list[list[str]] = []

    class Recorder:
        def inputs(self, run: str, inputs: list[Dataset]) -> None:
            heard.append([dataset.name for dataset in inputs])

    class Runs:
        run = "phase"

        def __init__(self, *arguments: Any, **options: Any) -> None:
            pass

    recipe = load_recipe("demo", [f"storage={tmp_path}"])
    size = ClusterSize(cpus=1.0, gpus=0.0)
    tracker: Any = Recorder()
    nobody: Any = None
    sweep = Sweep(recipe, data, HASH, size, tracker, nobody, "run")
    kind: Any = Runs
    sweep.runs(TrialLog(f"{tmp_path}/trials.json"), "schedule", {}, kind=kind, done=done)
    assert heard == expected
