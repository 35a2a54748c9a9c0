"""Forward passes side by side: the same activations as one after the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import MODELS, batches
from torch import Tensor, nn

from pruners import find_layers
from pruners.reconstruction.lockstep import Lockstep

IMAGES = [images for images, _ in batches(3)]


def modules(model: nn.Module) -> dict[str, nn.Module]:
    names = [layer.name.removesuffix(".weight") for layer in find_layers(model)]
    return {name: model.get_submodule(name) for name in names}


def plain(model: nn.Module, images: Tensor, *, outputs: bool) -> dict[str, Tensor]:
    """The inputs or outputs of all layers in an ordinary forward pass."""
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(
            lambda _, inputs, output, name=name: seen.update({name: output if outputs else inputs[0]})
        )
        for name, module in modules(model).items()
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
@pytest.mark.parametrize("outputs", [False, True], ids=["inputs", "outputs"])
@torch.no_grad()
def test_lockstep__every_batch_is_where_it_would_be_alone(
    make: Callable[[], nn.Module], outputs: bool
) -> None:
    model = make().eval()
    alone = [plain(model, images, outputs=outputs) for images in IMAGES]
    order = []
    for stops in Lockstep(model, modules(model), IMAGES, outputs=outputs).stops():
        (name,) = {stop.layer for stop in stops}
        order.append(name)
        for stop, expected in zip(stops, alone, strict=True):
            assert torch.equal(stop.tensor, expected[name])
    assert order == list(alone[0])
    assert len(order) == len(modules(model))


@torch.no_grad()
def test_lockstep__a_layer_runs_with_the_weights_that_it_has_when_the_passes_go_on() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    images = [torch.ones(1, 2), torch.ones(3, 2)]
    layers: dict[str, nn.Module] = {"0": model[0], "1": model[1]}
    stops = Lockstep(model, layers, images, outputs=False).stops()
    assert [stop.layer for stop in next(stops)] == ["0", "0"]
    model[0].weight.fill_(3.0)
    second = next(stops)
    assert [stop.layer for stop in second] == ["1", "1"]
    assert all(torch.equal(stop.tensor, torch.full_like(stop.tensor, 6.0)) for stop in second)
    assert next(stops, None) is None


def test_lockstep__who_leaves_early_leaves_no_hook() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    stops = Lockstep(model, {"0": model[0], "1": model[1]}, [torch.ones(1, 2)], outputs=False).stops()
    next(stops)
    assert model[0]._forward_pre_hooks
    stops.close()
    assert not model[0]._forward_pre_hooks
    assert not model[1]._forward_pre_hooks
    assert model(torch.ones(1, 2)).shape == (1, 2)


def test_lockstep__an_error_in_the_model_comes_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(3, 2))
    stops = Lockstep(model, {"0": model[0]}, [torch.ones(1, 2)], outputs=False).stops()
    next(stops)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        next(stops)
    assert not model[0]._forward_pre_hooks


def test_lockstep__batches_that_take_other_ways_are_refused() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            chosen: Tensor = self.left(x) if len(x) > 1 else self.right(x)
            return chosen

    model = Either()
    layers: dict[str, nn.Module] = {"left": model.left, "right": model.right}
    with pytest.raises(RuntimeError, match="another way"):
        next(Lockstep(model, layers, [torch.ones(1, 2), torch.ones(2, 2)], outputs=False).stops())
