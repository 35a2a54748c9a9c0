"""A run's state in a checkpoint folder: whatever happens to one of its files is noticed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers import quick
from hypothesis import given
from hypothesis import strategies as st
from training_runs import CPU, Log, make_files, make_job

from pruners.errors import InputError
from trainers.checkpoint.trainer_state import damage
from trainers.loop.gradual import run


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def saved(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    log = Log(tmp_path_factory.mktemp("run"))
    run(make_job(files, {"epochs": 3}, {}), log, CPU)
    assert damage(log.last) is None
    return log.last


NAMES = ["model.safetensors", "config.json", "masks.safetensors", "pruning.json", "trainer.safetensors"]
NAMES += ["trainer.json"]


@quick(60)
@given(st.sampled_from(NAMES), st.integers(0, 10**9), st.integers(1, 255), st.booleans())
def test_trainer_state__a_byte_flipped_or_the_end_cut_off(
    saved: Path, name: str, where: int, change: int, cut: bool
) -> None:
    file = saved / name
    whole = file.read_bytes()
    at = where % len(whole)
    broken = whole[:at] if cut else whole[:at] + bytes([whole[at] ^ change]) + whole[at + 1 :]
    try:
        file.write_bytes(broken)
        message = damage(saved)
        # white space between JSON's parts means nothing
        assert message is not None or name == "trainer.json"
        if message is not None:
            assert name in message
    finally:
        file.write_bytes(whole)
    assert damage(saved) is None


def test_trainer_state__a_file_that_is_missing(saved: Path, tmp_path: Path) -> None:
    for name in NAMES:
        copy = tmp_path / name
        shutil.copytree(saved, copy)
        (copy / name).unlink()
        assert name in str(damage(copy))
    assert "trainer.json" in str(damage(tmp_path))


@pytest.mark.parametrize(
    ("training", "pruning", "says"),
    [
        ({"epochs": 4}, {}, "training.epochs 3 there and 4 here"),
        ({"epochs": 3, "lr": {"peak": 1e-2}}, {}, r"training\.lr\.kind"),
        ({"epochs": 3}, {"sparsity": 0.8}, r"pruning\.sparsity 0\.7 there and 0\.8 here"),
    ],
)
def test_trainer_state__a_checkpoint_of_another_recipe(
    training: dict[str, object], pruning: dict[str, object], says: str, files: dict[str, str], saved: Path
) -> None:
    with pytest.raises(InputError, match=says):
        run(make_job(files, training, pruning), lambda progress: None, CPU, resume=saved)


def test_trainer_state__what_does_not_change_the_result_may_change(
    files: dict[str, str], saved: Path
) -> None:
    reports = []
    run(
        make_job(files, {"epochs": 3, "checkpoint_every": 1, "data_workers": 1}, {}, name="other"),
        lambda progress: reports.append(progress.metrics["epoch"]),
        CPU,
        resume=saved,
    )
    assert reports == [3]  # it was at its end, and says so again
