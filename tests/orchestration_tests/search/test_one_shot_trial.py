"""The steps of a cheap trial: what it sees, and what it is scored by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from image_tables import dense_folder, tiny
from one_shot_inputs import SPARSITY, actor, one_shot_inputs

from orchestration.recipe.search import AllocationSearch
from pruners.model.layers import find_layers
from trainers.checkpoint.folder import save_checkpoint


@pytest.fixture
def dense(tmp_path: Path) -> str:
    return str(dense_folder(tmp_path / "dense"))


def test_one_shot_trial__top1_decides_and_loss_between_equals(dense: str, tmp_path: Path) -> None:
    search = AllocationSearch(images=8, by=("module",))
    result = actor(one_shot_inputs(dense, search, tmp_path)).step()
    assert result["done"]
    assert 0 < result["val_top1"] - result["score"] < 1 / (2 * 8)


def test_one_shot_trial__cross_entropy_decides_where_a_recipe_says_so(dense: str, tmp_path: Path) -> None:
    search = AllocationSearch(images=8, by=("module",), objective="cross_entropy")
    inputs = one_shot_inputs(dense, search, tmp_path)
    result = actor(inputs).step()
    assert result["score"] == -result["val_loss"] < 0


def test_one_shot_trial__images_are_added_end_by_end(dense: str, tmp_path: Path) -> None:
    search = AllocationSearch(images=8, first_images=2, reduction=2, by=("module",))
    trial = actor(one_shot_inputs(dense, search, tmp_path))
    steps = [trial.step() for _ in range(3)]
    assert [step["images"] for step in steps] == [2, 4, 8]
    assert [step["done"] for step in steps] == [False, False, True]
    whole = actor(one_shot_inputs(dense, search.model_copy(update={"first_images": None}), tmp_path)).step()
    assert steps[-1]["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-5)


def test_one_shot_trial__a_study_of_losses_is_not_one_of_top1() -> None:
    by_top1, by_loss = AllocationSearch(), AllocationSearch(objective="cross_entropy")
    assert by_loss.decides() == by_top1.decides() | {"objective": "cross_entropy"}


def test_one_shot_trial__the_zeros_of_a_sparse_model_stay_zero_in_every_trial(tmp_path: Path) -> None:
    """Half of the weights of one layer and none of the next are zero: the search may move all but those."""
    model, arguments = tiny()
    weights = dict(model.named_parameters())
    layers = find_layers(model)
    with torch.no_grad():
        for layer in layers[::2]:
            weights[layer.name].view(-1)[::2] = 0.0
    zeros = {layer.name: weights[layer.name] == 0 for layer in layers}
    record = {"method": "none", "sparsity": 0.25, "allocation": {}}
    save_checkpoint(tmp_path / "sparse", model, model_args=arguments, masks=None, record=record)
    search = AllocationSearch(images=8, by=("layer",), range=1.0)
    inputs = one_shot_inputs(str(tmp_path / "sparse"), search, tmp_path)
    trial = actor(inputs)
    for parity in (0, 1):
        values = {f"layer.{layer.name}": float(n % 2 == parity) for n, layer in enumerate(layers)}
        trial.reset_config(values)
        result = trial.step()
        assert result["sparsity"] == pytest.approx(SPARSITY, abs=1e-3)
        shares = [result["allocation"][layer.name] / layer.numel for layer in layers]
        assert max(shares) - min(shares) > 0.2
        for name, before in zeros.items():
            assert result["allocation"][name] >= int(before.sum())
            assert not trial._parameters[name][before].any()
