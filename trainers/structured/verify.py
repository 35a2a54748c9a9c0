"""Verify a model that was cut in width.

Its logits are compared, in float64, with three others: those of the uncut model, whose removed channels are
zeroed and ignored by norms; its own, with attention computed in the other way (fused or step by step), which
shows a wrong scale; and those of the model that is read back from the file. Its parameters are counted.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pruners.structured.channels import Cut
from trainers.models import factory

_TOLERANCE = 1e-9  # largest difference, as a share of the largest logit in float64; faults cause far more


def check_cut(made: nn.Module, dense: nn.Module, cut: Cut, *, planned: int) -> None:
    """Compare a model that was cut with the one that it was cut from, both in float64 and eval mode.

    Args:
        made: the smaller model.
        dense: the model that it was cut from.
        cut: the channels that were removed.
        planned: number of parameters of the smaller model.

    Raises:
        RuntimeError: it differs; says by which check.
    """
    _check_parameters(made, planned)
    images = noise(made).double()
    outputs = forward(made, images)
    _check_same(
        "beside the uncut model without those channels", forward(reference(dense, cut), images), outputs
    )
    _check_same("with attention computed the other way", outputs, forward(made, images, other=True))


def check_reloaded(made: nn.Module, again: nn.Module, *, planned: int) -> None:
    """Compare a model with the one that was read back from its file.

    Args:
        made: the model.
        again: the model that was read back.
        planned: number of parameters.

    Raises:
        RuntimeError: the logits differ by a bit, or the number of parameters does.
    """
    _check_parameters(again, planned)
    images = noise(made)
    for other in (False, True):
        was, outputs = (forward(candidate.eval(), images, other=other) for candidate in (made, again))
        if not torch.equal(was, outputs):
            raise RuntimeError(f"structured pruning: reloaded, {_differs(was, outputs)}")


class _NormOfKept(nn.Module):
    """A layer norm that ignores some channels, whose outputs are zero."""

    def __init__(self, norm: nn.LayerNorm, kept: Tensor) -> None:
        super().__init__()
        self._norm, self._kept = norm, kept

    def forward(self, inputs: Tensor) -> Tensor:
        norm, kept = self._norm, self._kept
        bias = None if norm.bias is None else norm.bias[kept]
        outputs = torch.zeros_like(inputs)
        outputs[..., kept] = functional.layer_norm(
            inputs[..., kept], (int(kept.sum()),), norm.weight[kept], bias, norm.eps
        )
        return outputs


def reference(dense: nn.Module, cut: Cut) -> nn.Module:
    """The uncut model with removed channels zeroed, and norms that ignore them: it equals the cut one."""
    zeroed = copy.deepcopy(dense)
    zeroed.load_state_dict(cut.zeroed(dense.state_dict()))
    norms = [(name, part) for name, part in zeroed.named_modules() if isinstance(part, nn.LayerNorm)]
    for name, norm in norms:
        kept = cut.kept(f"{name}.weight", 0)
        if not bool(kept.all()):
            parent, _, own = name.rpartition(".")
            setattr(zeroed.get_submodule(parent), own, _NormOfKept(norm, kept))
    return zeroed


def noise(model: nn.Module) -> Tensor:
    """Two images of noise, the same at each call."""
    return torch.randn(2, *factory.input_size(model), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def forward(model: nn.Module, images: Tensor, *, other: bool = False) -> Tensor:
    """Compute the logits of images.

    Args:
        model: the model.
        images: (N, 3, H, W).
        other: compute attention in the other way: step by step where it is fused, and fused where it is not.

    Returns:
        (N, classes).
    """
    parts: list[Any] = [part for part in model.modules() if hasattr(part, "fused_attn")] if other else []
    for part in parts:
        part.fused_attn = not part.fused_attn
    try:
        outputs: Tensor = model(images)
    finally:
        for part in parts:
            part.fused_attn = not part.fused_attn
    return outputs


def _check_parameters(model: nn.Module, planned: int) -> None:
    count = sum(weight.numel() for weight in model.parameters())
    if count != planned:
        raise RuntimeError(f"structured pruning: {count:,} parameters are left, and {planned:,} were planned")


def _check_same(where: str, expected: Tensor, outputs: Tensor) -> None:
    scale = max(float(expected.abs().max()), 1.0)
    if not torch.allclose(outputs, expected, rtol=0, atol=_TOLERANCE * scale):
        raise RuntimeError(f"structured pruning: {where}, {_differs(expected, outputs)}")


def _differs(expected: Tensor, outputs: Tensor) -> str:
    by, of = float((outputs - expected).abs().max()), float(expected.abs().max())
    return f"timm's model differs by {by:.3g} in logits of up to {of:.3g}"
