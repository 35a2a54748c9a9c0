"""Parts of a training step: the optimizer, frozen parameters, mixed precision, moving average, masks."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from pruners.errors import InputError, first_line
from pruners.model.layers import PrunableLayer
from pruners.model.masks import MaskSet
from trainers.config.training import TrainingSettings

_STEPS = {"fused", "foreach", "differentiable", "capturable"}  # arguments that exclude each other
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def make_optimizer(training: TrainingSettings, model: nn.Module) -> torch.optim.Optimizer:
    """Make timm's optimizer by its name; biases and norms have no weight decay.

    On CPUs torch's own optimizers make fused steps, which are about four times as fast.

    Raises:
        InputError: timm has none of that name, or it refuses its arguments.
    """
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model,
            training.optimizer,
            lr=training.lr.peak,
            weight_decay=training.weight_decay,
            layer_decay=training.layer_decay,
            **_fused(training, model),
            **training.optimizer_args,
        )
        return optimizer
    except (ValueError, AssertionError) as error:
        raise InputError("training.optimizer", training.optimizer, first_line(error)) from None
    except TypeError as error:
        raise InputError("training.optimizer_args", training.optimizer_args, first_line(error)) from None


def _fused(training: TrainingSettings, model: nn.Module) -> dict[str, bool]:
    """``fused=True`` on CPUs, if the optimizer supports it and the recipe does not choose otherwise."""
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return {}  # on GPUs torch chooses by itself how it steps
    if training.channels_last:
        return {}  # moments from a checkpoint have another memory format, which fused steps ignore
    kind = get_optimizer_class(training.optimizer, bind_defaults=False)
    known = "fused" in inspect.signature(kind).parameters
    return {"fused": True} if known and not _STEPS & training.optimizer_args.keys() else {}


def freeze(model: nn.Module, patterns: Sequence[str], layers: Sequence[PrunableLayer]) -> None:
    """Exclude the parameters that a pattern matches from training.

    Args:
        model: its parameters are changed in place.
        patterns: regular expressions of parameter names.
        layers: the layers that are pruned, which must not be frozen.

    Raises:
        InputError: as :func:`matching_parameters`.
    """
    for name in matching_parameters(model, patterns, {layer.name for layer in layers}):
        model.get_parameter(name).requires_grad_(False)


def matching_parameters(model: nn.Module, patterns: Sequence[str], pruned: Collection[str]) -> list[str]:
    """Find the parameters that any pattern matches.

    Args:
        model: the model.
        patterns: regular expressions of parameter names.
        pruned: names of the weights that are pruned, which must not match.

    Returns:
        Names of the parameters.

    Raises:
        InputError: a pattern that matches nothing, or a layer that is pruned and must recover.
    """
    names: list[str] = []
    for pattern in patterns:
        matches = [name for name, _ in model.named_parameters() if re.search(pattern, name)]
        if not matches:
            raise InputError("training.freeze", pattern, "matches no parameter of the model")
        for name in matches:
            if name in pruned:
                raise InputError("training.freeze", pattern, f"{name} is pruned and must be free to recover")
        names += matches
    return names


@dataclass
class Precision:
    """Automatic mixed precision: bfloat16, float16 with loss scaling, or float32.

    Calling it returns the context of a forward pass.

    Attributes:
        kind: ``float32``, ``bfloat16`` or ``float16``.
        device: where the model is.
        scaler: of the loss; does nothing unless ``kind`` is ``float16``.
    """

    kind: str
    device: torch.device

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.kind == "float16")

    def __call__(self) -> AbstractContextManager[Any]:
        """Make the context of a forward pass."""
        if self.kind == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_TYPES[self.kind])


def moving_average(model: nn.Module, decay: float | None) -> ModelEmaV3 | None:
    """timm's moving average of a model's weights, if the recipe has a ``decay``."""
    return None if decay is None else ModelEmaV3(model, decay=decay)


class BufferSnapshot:
    """Restores the buffers that a forward pass changes (running statistics, ranges) after a skipped step.

    Otherwise a NaN would stay in them for the rest of the run.

    Args:
        network: its floating-point buffers are restored.
    """

    def __init__(self, network: nn.Module) -> None:
        self._buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
        self._before: list[Tensor] = []

    @torch.no_grad()
    def take(self) -> None:
        """Copy the buffers, before a step."""
        self._before = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def restore_unless(self, stepped: Tensor) -> None:
        """Restore the buffers if ``stepped``, a boolean scalar, is false; the device is not synchronised."""
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(torch.where(stepped, buffer, before))


class MaskEnforcer:
    """Zeroes gradients and weights of pruned entries; parameters are looked up once.

    Gradients are zeroed so that pruned weights count neither in the gradients' norm nor in the optimizer's
    moments.

    Args:
        model: its parameters are changed in place.
        masks: of the pruned layers; ``None``: nothing is pruned.
    """

    def __init__(self, model: nn.Module, masks: MaskSet | None) -> None:
        weights = dict(model.named_parameters())
        self._pairs = [
            (weights[name], _selector(weights[name], mask)) for name, mask in (masks or {}).items()
        ]

    @torch.no_grad()
    def zero_grad_(self) -> None:
        """Zero the gradients of pruned weights, before an optimizer step."""
        for weight, selector in self._pairs:
            if weight.grad is not None:
                _zero_(weight.grad, selector)

    @torch.no_grad()
    def zero_weights_(self) -> None:
        """Zero the pruned weights, after a step: weight decay and momentum of some optimizers move them."""
        for weight, selector in self._pairs:
            _zero_(weight, selector)


def _selector(weight: Tensor, mask: Tensor) -> Tensor:
    """The selector for :func:`_zero_`: on CPUs all bits of kept weights, elsewhere the pruned weights."""
    if weight.device.type != "cpu":
        return ~mask
    return torch.empty_like(weight, dtype=_WORDS[weight.element_size()]).copy_(mask).neg_()


def _zero_(tensor: Tensor, selector: Tensor) -> None:
    """Zero the pruned entries, even if they are NaN.

    On CPUs this masks the bits of the numbers: torch's ``masked_fill_`` works entry by entry there, which
    takes twenty times as long.
    """
    if selector.dtype == torch.bool:
        tensor.masked_fill_(selector, 0.0)
    else:
        tensor.view(selector.dtype).bitwise_and_(selector)
