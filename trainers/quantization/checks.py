"""Checks of quantization: that a model can be quantized in a mode, and that enough of a file is INT8."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from pruners.errors import InputError
from trainers.config.quantization import Mode
from trainers.models.private_apis import AnyBatchNorm, AnyConvolution

LEAST_INT8_SHARE = 0.5
"""The least share of a model's parameters that must be int8 in a file that is called INT8."""


def check_mode(model: nn.Module, mode: Mode, pruned: Collection[str], key: str) -> None:
    """Check that a model's weights can be quantized in a mode.

    Args:
        model: on any device, the meta device too.
        mode: ``dynamic``, ``static`` or ``qat``.
        pruned: names of the weights that have zeros, each of which must be 0 in int8.
        key: the option or recipe key of ``mode``, for the error message.

    Raises:
        InputError: ``dynamic`` for a model of convolutions, or ``qat`` for one with batch norms.
    """
    kind = type(model).__name__
    if mode == "qat" and any(isinstance(module, AnyBatchNorm) for module in model.modules()):
        expected = f"{kind} has batch norms, which training for INT8 does not hold; take static"
        raise InputError(key, mode, expected)
    if mode != "dynamic":
        return
    convolutions = _convolutions(model)
    left_out = next((name for name in pruned if name in convolutions), None)
    if left_out is not None or needs_calibration(model):
        share = share_of(sum(convolutions.values()), model)
        example = "" if left_out is None else f", {left_out} among them, which is pruned"
        expected = f"leaves convolutions in float32: {100 * share:.0f} % of {kind}'s weights{example}"
        raise InputError(key, mode, f"{expected}; static quantises them (it takes training images)")


def needs_calibration(model: nn.Module) -> bool:
    """Return whether INT8 needs ranges of activations from images: most weights are those of convolutions."""
    return share_of(sum(_convolutions(model).values()), model) > 1 - LEAST_INT8_SHARE


def _convolutions(model: nn.Module) -> dict[str, int]:
    """Number of weights of each convolution, by parameter name."""
    return {
        f"{name}.weight": module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, AnyConvolution)
    }


def share_of(values: int, model: nn.Module) -> float:
    """The share of a model's parameters that ``values`` weights are, 0…1."""
    return values / sum(parameter.numel() for parameter in model.parameters())


def check_share(values: int, model: nn.Module) -> None:
    """Check that enough weights of a file are int8.

    Args:
        values: number of int8 weights in the file.
        model: the model that it was made from.

    Raises:
        InputError: the larger part of the model's weights is not int8.
    """
    share = share_of(values, model)
    if share < LEAST_INT8_SHARE:
        kind, percent = type(model).__name__, f"{100 * share:.0f} %"
        raise InputError("model", kind, f"{percent} of its weights would be int8: such a file is no INT8 one")
