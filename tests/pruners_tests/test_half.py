"""Models in half precision: pruned as their float32 copies are, with their own types back afterwards."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from helpers import PRUNERS, batches, tiny_vit
from torch import Tensor, nn

from pruners import EliminationOrder, InputError, PrunableLayer, PruneReport, find_layers, prune
from pruners.elimination.fisher import BlockFisher
from pruners.elimination.updates import UpdateSegment
from pruners.methods.magnitude import Magnitude

every_method = pytest.mark.parametrize("method", PRUNERS)
either_type = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def short(dtype: torch.dtype) -> nn.Module:
    """A model in half precision but for one norm, with buffers of several types, and some gradients."""
    model = tiny_vit().to(dtype)
    model.get_submodule("blocks.1.norm1").float()
    model.register_buffer("short_buffer", torch.linspace(-1, 1, 7).to(dtype))
    model.register_buffer("long_buffer", torch.linspace(-1, 1, 7))
    model.register_buffer("whole_buffer", torch.arange(3))
    for name in ("blocks.0.attn.qkv.weight", "head.weight", "blocks.1.norm1.weight"):
        weight = model.get_parameter(name)
        weight.grad = torch.full_like(weight, 0.5)
    return model


def snapshot(model: nn.Module) -> dict[str, tuple[torch.dtype, Tensor, Tensor | None]]:
    """Type, values and gradient of every parameter and buffer."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    gradients = {name: one.grad for name, one in named.items()}
    return {
        name: (one.dtype, one.detach().clone(), None if (g := gradients[name]) is None else g.clone())
        for name, one in named.items()
    }


def assert_unchanged(model: nn.Module, before: dict[str, tuple[torch.dtype, Tensor, Tensor | None]]) -> None:
    after = snapshot(model)
    assert set(after) == set(before)
    for name, (dtype, value, gradient) in before.items():
        assert after[name][0] == dtype
        assert torch.equal(after[name][1], value)
        assert_same_gradient(after[name][2], gradient)


def assert_same_gradient(gradient: Tensor | None, other: Tensor | None) -> None:
    assert (gradient is None) == (other is None)
    if gradient is not None and other is not None:
        assert gradient.dtype == other.dtype
        assert torch.equal(gradient, other)


def pruned(model: nn.Module, method: str, sparsity: float = 0.6) -> PruneReport:
    return prune(model, PRUNERS[method](), sparsity, batches=batches(4))


@every_method
@either_type
def test_half__masks_are_those_of_the_float32_copy_and_types_come_back(
    method: str, dtype: torch.dtype
) -> None:
    model = short(dtype)
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    before = snapshot(model)
    whole = copy.deepcopy(model).float()
    expected = pruned(whole, method)
    report = pruned(model, method)
    assert report.masks.fingerprint() == expected.masks.fingerprint()
    assert report.allocation == expected.allocation
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    zeros = 0
    for name, (kind, value, gradient) in snapshot(model).items():
        assert kind == before[name][0]
        assert_same_gradient(gradient, before[name][2])
        if name not in report.masks:
            assert torch.equal(value, before[name][1])
            continue
        kept = report.masks[name]
        assert torch.equal(value != 0, kept)
        zeros += int((value == 0).sum())
        assert torch.equal(value, whole.get_parameter(name).detach().to(kind))
    assert zeros == round(0.6 * report.masks.numel)


class Shrinks(Magnitude):
    """The first weight that falls takes nearly all of the others with it."""

    def order(
        self,
        weights: Mapping[str, Tensor],
        layers: Sequence[PrunableLayer],
        masks: Mapping[str, Tensor],
        fisher: BlockFisher | None,
    ) -> EliminationOrder:
        orders = super().order(weights, layers, masks, fisher)
        for name, order in orders.items():
            size = weights[name].numel()
            columns = weights[name].reshape(1, size) * (1 - 2e-7)
            slots = torch.arange(size, dtype=torch.int16).unsqueeze(0)
            stretch = UpdateSegment(0, 0, columns.float(), torch.ones(1, 1), slots)
            orders[name] = replace(order, updates=(stretch,), block_size=size)
        return orders


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 1.0), (torch.bfloat16, 1e-34)])
def test_half__what_stays_is_never_rounded_to_zero(dtype: torch.dtype, scale: float) -> None:
    model = short(dtype)
    with torch.no_grad():
        for layer in find_layers(model):
            model.get_parameter(layer.name).mul_(scale)
    whole = copy.deepcopy(model).float()
    report, expected = (prune(one, Shrinks(), 0.5) for one in (model, whole))
    assert report.masks.fingerprint() == expected.masks.fingerprint()
    for name, mask in report.masks.items():
        in_float32 = whole.get_parameter(name).detach()
        assert torch.equal(in_float32 != 0, mask)
        assert not in_float32.to(dtype).any()  # all that stays would be rounded to nothing
        assert torch.equal(model.get_parameter(name) != 0, mask)


@every_method
@either_type
def test_half__a_second_step_takes_up_the_zeros_of_the_first(method: str, dtype: torch.dtype) -> None:
    model = short(dtype)
    first = pruned(model, method, 0.3)
    second = pruned(model, method, 0.6)
    assert sum(second.allocation.values()) == round(0.6 * second.masks.numel)
    for name, mask in first.masks.items():
        assert not (second.masks[name] & ~mask).any()


@either_type
def test_half__the_order_gives_the_same_weights_at_another_allocation(dtype: torch.dtype) -> None:
    model = short(dtype)
    before = {layer.name: model.get_parameter(layer.name).detach().clone() for layer in find_layers(model)}
    report = pruned(model, "ovit")
    new, masks = report.order.weights_at(before, report.allocation)
    assert masks.fingerprint() == report.masks.fingerprint()
    for name, weight in new.items():
        assert weight.dtype == dtype
        assert torch.equal(weight, model.get_parameter(name).detach())


@pytest.mark.parametrize("method", ["ovit", "ovit_fast", "woodfisher"])
@either_type
def test_half__after_an_error_all_is_as_it_was(method: str, dtype: torch.dtype) -> None:
    model = short(dtype)
    before = snapshot(model)

    def broken(outputs: Tensor, labels: Tensor) -> Tensor:
        assert outputs.dtype == torch.float32
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        prune(model, PRUNERS[method](), 0.5, batches=batches(2), loss=broken)
    assert_unchanged(model, before)
    with pytest.raises(InputError, match="NaN or Inf in batch 1"):
        prune(model, PRUNERS[method](), 0.5, batches=batches(2, nan_in=1))
    assert_unchanged(model, before)


@either_type
def test_half__damp_auto_leaves_the_types_too(dtype: torch.dtype) -> None:
    model = short(dtype)
    whole = copy.deepcopy(model).float()
    options = {"block_size": 32, "damp": "auto", "gradients": 3}
    report = prune(model, "ovit", 0.6, batches=batches(6), **options)
    expected = prune(whole, "ovit", 0.6, batches=batches(6), **options)
    assert report.damp == expected.damp
    assert report.masks.fingerprint() == expected.masks.fingerprint()
    assert {parameter.dtype for name, parameter in model.named_parameters() if name in report.masks} == {
        dtype
    }
