"""What a training step is made of besides the model: targets and loss, teacher, precision, moving average."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from pruners.errors import InputError, first_line
from pruners.model.layers import PrunableLayer
from pruners.model.masks import MaskSet
from trainers.config.training import TrainingSettings

_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def make_optimizer(training: TrainingSettings, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer by its name; biases and norms have no weight decay.

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
            **training.optimizer_args,
        )
        return optimizer
    except (ValueError, AssertionError) as error:
        raise InputError("training.optimizer", training.optimizer, first_line(error)) from None
    except TypeError as error:
        raise InputError("training.optimizer_args", training.optimizer_args, first_line(error)) from None


def freeze(model: nn.Module, patterns: Sequence[str], layers: Sequence[PrunableLayer]) -> None:
    """Parameters that a pattern matches are not trained.

    Raises:
        InputError: as :func:`matching_parameters`.
    """
    for name in matching_parameters(model, patterns, {layer.name for layer in layers}):
        model.get_parameter(name).requires_grad_(False)


def matching_parameters(model: nn.Module, patterns: Sequence[str], pruned: Collection[str]) -> list[str]:
    """The parameters that some pattern matches.

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
    """Automatic mixed precision: bfloat16 as it is, float16 with its losses scaled."""

    kind: str
    device: torch.device

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.kind == "float16")

    def __call__(self) -> AbstractContextManager[Any]:
        """The context of a forward pass."""
        if self.kind == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_TYPES[self.kind])


def moving_average(model: nn.Module, decay: float | None) -> ModelEmaV3 | None:
    """timm's moving average of a model's weights, if one is asked for."""
    return None if decay is None else ModelEmaV3(model, decay=decay)


class Moved:
    """What a forward pass of training moves itself: running statistics of norms, ranges of int8.

    A step that is left out must not have moved them: NaN would stay in them for ever.
    """

    def __init__(self, network: nn.Module) -> None:
        self._own = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
        self._before: list[Tensor] = []

    @torch.no_grad()
    def remember(self) -> None:
        """Before a step."""
        self._before = [buffer.clone() for buffer in self._own]

    @torch.no_grad()
    def put_back(self, unless: Tensor) -> None:
        """After it, unless a boolean of one number says that it was made; the device is not waited for."""
        for buffer, before in zip(self._own, self._before, strict=True):
            buffer.copy_(torch.where(unless, buffer, before))


class MaskEnforcer:
    """Keeps pruned weights at exactly zero, its look-ups done once.

    Their gradients are zeroed too: what was pruned has no part in the norm, and gathers no moments.
    """

    def __init__(self, model: nn.Module, masks: MaskSet | None) -> None:
        weights = dict(model.named_parameters())
        self._pairs = [(weights[name], ~mask) for name, mask in (masks or {}).items()]

    @torch.no_grad()
    def gradients(self) -> None:
        """Before an optimizer step."""
        for weight, pruned in self._pairs:
            if weight.grad is not None:
                weight.grad.masked_fill_(pruned, 0.0)

    @torch.no_grad()
    def weights(self) -> None:
        """After it: decay and momentum of some optimizers move zeros."""
        for weight, pruned in self._pairs:
            weight.masked_fill_(pruned, 0.0)
