"""The steps of a cheap trial: what it sees, and what it is scored by."""

from __future__ import annotations

from pathlib import Path

import pytest
from image_tables import dense_folder
from one_shot_inputs import actor, one_shot_inputs

from orchestration.search_config import AllocationSearch


@pytest.fixture
def dense(tmp_path: Path) -> str:
    return str(dense_folder(tmp_path / "dense"))


def test_top1_decides_and_loss_between_equals(dense: str, tmp_path: Path) -> None:
    search = AllocationSearch(images=8, by=("module",))
    found = actor(one_shot_inputs(dense, search, tmp_path)).step()
    assert found["done"]
    assert 0 < found["val_top1"] - found["score"] < 1 / (2 * 8)


def test_cross_entropy_decides_where_a_recipe_says_so(dense: str, tmp_path: Path) -> None:
    search = AllocationSearch(images=8, by=("module",), objective="cross_entropy")
    inputs = one_shot_inputs(dense, search, tmp_path)
    found = actor(inputs).step()
    assert found["score"] == -found["val_loss"] < 0


def test_images_are_added_end_by_end(dense: str, tmp_path: Path) -> None:
    search = AllocationSearch(images=8, first_images=2, reduction=2, by=("module",))
    trial = actor(one_shot_inputs(dense, search, tmp_path))
    steps = [trial.step() for _ in range(3)]
    assert [step["images"] for step in steps] == [2, 4, 8]
    assert [step["done"] for step in steps] == [False, False, True]
    whole = actor(one_shot_inputs(dense, search.model_copy(update={"first_images": None}), tmp_path)).step()
    assert steps[-1]["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-5)


def test_a_study_of_losses_is_not_one_of_top1() -> None:
    one, other = AllocationSearch(), AllocationSearch(objective="cross_entropy")
    assert other.decides() == one.decides() | {"objective": "cross_entropy"}
