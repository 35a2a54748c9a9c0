"""Zeros of pruned weights to the bit, and optimizers that step in one pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pruners.model.masks import MaskSet
from trainers.config.training import TrainingSettings
from trainers.loop.optimization import MaskEnforcer, make_optimizer


def masked(weight: Tensor) -> tuple[nn.Module, Tensor]:
    """A module with this weight and a gradient, and the mask of every third entry."""
    model = nn.Module()
    model.weight = nn.Parameter(weight)
    model.weight.grad = weight.detach().clone() + 1
    return model, (torch.arange(weight.numel()) % 3 != 0).reshape(weight.shape)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_mask_enforcer__pruned_entries_are_positive_zero_and_others_as_they_were(
    kind: torch.dtype, channels_last: bool
) -> None:
    weight = torch.randn(4, 6, 3, 3, dtype=kind)
    weight.view(-1)[0], weight.view(-1)[3], weight.view(-1)[6] = float("nan"), -0.0, float("-inf")
    if channels_last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    model, mask = masked(weight)
    parameter: Any = model.weight
    before, gradient = parameter.detach().clone(), parameter.grad.clone()
    enforcer = MaskEnforcer(model, MaskSet({"weight": mask}))
    enforcer.zero_weights_()
    enforcer.zero_grad_()
    for after, old in ((parameter.detach(), before), (parameter.grad, gradient)):
        assert torch.equal(after[mask], old[mask])
        assert not after[~mask].any()
        assert not torch.signbit(after[~mask]).any()


@pytest.mark.parametrize(
    ("settings", "fused"),
    [
        ({}, True),
        ({"optimizer": "momentum"}, True),
        ({"optimizer": "lamb"}, None),  # has no such step
        ({"channels_last": True}, None),  # in one pass moments in another order would be taken for others
        ({"optimizer_args": {"foreach": True}}, None),
        ({"optimizer_args": {"fused": False}}, False),
    ],
)
def test_make_optimizer__steps_in_one_pass_where_nothing_else_is_asked_for(
    settings: dict[str, Any], fused: bool | None
) -> None:
    content = {"epochs": 1, "lr": {"kind": "constant", "peak": 1e-3}} | settings
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(TrainingSettings.model_validate(content), model)
    assert {group.get("fused") for group in optimizer.param_groups} == {fused}


def test_make_optimizer__one_pass_makes_the_step_of_many() -> None:
    def after(**args: Any) -> Tensor:
        torch.manual_seed(0)
        content = {"epochs": 1, "lr": {"kind": "constant", "peak": 1e-2}, "optimizer_args": args}
        model = nn.Linear(30, 20)
        optimizer = make_optimizer(TrainingSettings.model_validate(content), model)
        for step in range(20):
            model(torch.full((2, 30), 0.1 * step)).square().sum().backward()
            optimizer.step()
        return model.weight.detach()

    torch.testing.assert_close(after(), after(fused=False), rtol=1e-4, atol=1e-6)
