"""Reconstruction of whole models: nearer answers, the same zeros, nothing else touched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import CONVOLUTIONS, MODELS, batches, state, tiny_conv, tiny_vit, uneven, zeros
from torch import Tensor, nn

from pruners import InputError, MaskSet, find_layers, prune
from pruners.reconstruction.reconstruct import reconstruct

IMAGES = [images for images, _ in batches(6)]


def answers(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.cat([copy.deepcopy(model).eval()(images) for images in IMAGES])


def pruned(make: Callable[[], nn.Module], sparsity: float = 0.5, **options: Any) -> tuple[nn.Module, Any]:
    model = make().eval()
    return model, prune(model, "magnitude", sparsity, **options)


@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
def test_reconstruct__layers_and_model_answer_nearer_and_zeros_stay(make: Callable[[], nn.Module]) -> None:
    dense = make().eval()
    model, report = pruned(make)
    before = zeros(model, find_layers(model))
    off = (answers(model) - answers(dense)).norm()
    done = reconstruct(model, dense, find_layers(model), report.masks, IMAGES)
    assert done.images == sum(map(len, IMAGES))
    assert done.left == ()
    assert list(done.errors) == [layer.name for layer in find_layers(model)]
    assert all(after <= before for before, after in done.errors.values())
    assert (answers(model) - answers(dense)).norm() < 0.8 * off
    after = zeros(model, find_layers(model))
    assert all(torch.equal(after[name], mask) for name, mask in before.items())


def test_reconstruct__a_dense_model_stays_what_it_is() -> None:
    dense, model = tiny_vit().eval(), tiny_vit().eval()
    layers = find_layers(model)
    done = reconstruct(model, dense, layers, MaskSet.dense(model, layers), IMAGES)
    assert max(after for _, after in done.errors.values()) < 1e-6  # the rounding of float32 sums
    torch.testing.assert_close(answers(model), answers(dense))


def test_reconstruct__only_layers_and_their_biases_change() -> None:
    dense = uneven()
    model = uneven()
    report = prune(model, "lamp", 0.5)
    modes = [module.training for module in model.modules()]
    before = state(model)
    reconstruct(model, dense, find_layers(model), report.masks, IMAGES)
    changed = {name for name, value in state(model).items() if value != before[name]}
    layers = {layer.name for layer in find_layers(model)}
    assert changed == layers | {name.replace(".weight", ".bias") for name in layers}
    assert [module.training for module in model.modules()] == modes
    assert state(dense) == state(uneven())


@pytest.mark.parametrize("bias", [True, False])
def test_reconstruct__convolutions_are_solved_place_by_place(bias: bool) -> None:
    def make() -> nn.Module:
        model = tiny_conv()
        if not bias:
            model[2].bias = None
        return model

    dense = make().eval()
    model = make().eval()
    layers = find_layers(model, CONVOLUTIONS)
    report = prune(model, "magnitude", 0.5, layers=layers)
    reconstruct(model, dense, layers, report.masks, IMAGES, ridge=1e-6)
    with torch.no_grad():
        x = torch.cat([model[:2](images) for images in IMAGES])
        wanted, solved = dense[:3](torch.cat(IMAGES)), model[2](x)
        kept = report.masks["2.weight"].flatten(1)
        columns = nn.functional.unfold(x, 3, stride=2).transpose(1, 2).flatten(0, 1)
        rows = wanted.permute(0, 2, 3, 1).flatten(0, 2)
        if bias:
            columns, rows = columns - columns.mean(0), rows - rows.mean(0)
        for output in range(16):
            best = torch.linalg.lstsq(columns[:, kept[output]], rows[:, output : output + 1]).solution
            weight = model[2].weight.flatten(1)[output, kept[output]]
            torch.testing.assert_close(weight, best[:, 0], rtol=1e-2, atol=1e-3)
        if bias:
            torch.testing.assert_close(solved.mean((0, 2, 3)), wanted.mean((0, 2, 3)))


def test_reconstruct__layers_of_other_kinds_are_left_and_named() -> None:
    def make() -> nn.Module:
        model = tiny_conv()
        model[4] = nn.Conv2d(16, 8, 1, groups=2)
        return model

    model, dense = make().eval(), make().eval()
    layers = find_layers(model, CONVOLUTIONS)
    report = prune(model, "magnitude", 0.5, layers=layers)
    before = model[4].weight.detach().clone()
    done = reconstruct(model, dense, layers, report.masks, IMAGES)
    assert done.left == ("4.weight",)
    assert list(done.errors) == ["2.weight"]
    assert torch.equal(model[4].weight, before)


@pytest.mark.parametrize(
    ("images", "says"),
    [([], "images"), ([torch.full((2, 3, 32, 32), torch.nan)], "finite")],
    ids=["no image", "NaN"],
)
def test_reconstruct__what_cannot_be_used_is_refused(images: list[Tensor], says: str) -> None:
    model, report = pruned(tiny_vit)
    with pytest.raises(InputError, match=says):
        reconstruct(model, tiny_vit().eval(), find_layers(model), report.masks, images)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
