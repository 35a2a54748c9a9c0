"""Whether a model can become INT8 in a way, known from the model alone; and whether a file really is INT8."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from pruners.errors import InputError
from trainers.config.quantization import Mode

LEAST = 0.5
"""The share of a model's parameters that are int8 in a file that may be called INT8."""


def check_mode(model: nn.Module, mode: Mode, pruned: Collection[str], key: str) -> None:
    """Whether a model's weights can be quantised so.

    Args:
        model: on any device, also the meta device.
        pruned: names of the weights that have zeros, each of which has to be 0 in int8.
        key: by which ``mode`` was asked for.

    Raises:
        InputError: ``dynamic`` for a model of convolutions, or ``qat`` for one with batch norms.
    """
    kind = type(model).__name__
    if mode == "qat" and any(isinstance(module, _BatchNorm) for module in model.modules()):
        expected = f"{kind} has batch norms, which training for INT8 does not hold; take static"
        raise InputError(key, mode, expected)
    if mode != "dynamic":
        return
    convolutions = _convolutions(model)
    share = share_of(sum(convolutions.values()), model)
    lost = next((name for name in pruned if name in convolutions), None)
    if lost is not None or share > 1 - LEAST:
        example = "" if lost is None else f", {lost} among them, which is pruned"
        expected = f"leaves convolutions in float32: {100 * share:.0f} % of {kind}'s weights{example}"
        raise InputError(key, mode, f"{expected}; static quantises them (it takes training images)")


def _convolutions(model: nn.Module) -> dict[str, int]:
    """Weights of each convolution, by parameter name."""
    return {
        f"{name}.weight": module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, _ConvNd)
    }


def share_of(values: int, model: nn.Module) -> float:
    """The share of a model's parameters that so many values are."""
    return values / sum(parameter.numel() for parameter in model.parameters())


def check_share(values: int, model: nn.Module) -> None:
    """Whether a file with so many int8 weights may be called INT8.

    Raises:
        InputError: the larger part of the model's weights is not int8.
    """
    share = share_of(values, model)
    if share < LEAST:
        kind, percent = type(model).__name__, f"{100 * share:.0f} %"
        raise InputError("model", kind, f"{percent} of its weights would be int8: such a file is no INT8 one")
