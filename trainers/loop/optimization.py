"""What a training step is made of besides the model: targets and loss, teacher, precision, moving average."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional

from pruners.errors import InputError, first_line
from pruners.model.layers import PrunableLayer
from pruners.model.masks import MaskSet
from trainers import models
from trainers.config.training import DistillSettings, TrainingSettings

_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
Loss = Callable[[Any, Tensor], Tensor]


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
        InputError: as :func:`matched`.
    """
    for name in matched(model, patterns, {layer.name for layer in layers}):
        model.get_parameter(name).requires_grad_(False)


def matched(model: nn.Module, patterns: Sequence[str], pruned: Collection[str]) -> list[str]:
    """The parameters that some pattern matches.

    Raises:
        InputError: a pattern that matches nothing, or a layer that is pruned and must recover.
    """
    names: list[str] = []
    for pattern in patterns:
        found = [name for name, _ in model.named_parameters() if re.search(pattern, name)]
        if not found:
            raise InputError("training.freeze", pattern, "matches no parameter of the model")
        for name in found:
            if name in pruned:
                raise InputError("training.freeze", pattern, f"{name} is pruned and must be free to recover")
        names += found
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


class Targets:
    """How images and labels are mixed, and the loss that fits; mixing follows numpy's random state."""

    def __init__(self, training: TrainingSettings, classes: int) -> None:
        augment = training.augment
        self._mix: Mixup | None = None
        self.loss: Loss = nn.CrossEntropyLoss(label_smoothing=training.label_smoothing)
        if augment.mixup or augment.cutmix:
            self._mix = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                label_smoothing=training.label_smoothing,
                num_classes=classes,
            )
            self.loss = SoftTargetCrossEntropy()

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images, and labels or shares of the classes."""
        if self._mix is None:
            return images, labels
        if len(images) % 2:  # Mixup pairs images: the odd one of a last batch comes twice
            images, labels = torch.cat([images, images[-1:]]), torch.cat([labels, labels[-1:]])
        mixed: tuple[Tensor, Tensor] = self._mix(images, labels)
        return mixed


class Distillation:
    """A teacher, and the loss of learning from it beside the labels (Hinton et al., 2015; hard: DeiT, 2021).

    Args:
        student: whose preprocessing the images have had.

    Raises:
        InputError: a teacher with other classes.
    """

    def __init__(
        self, settings: DistillSettings, teacher: nn.Module, student: nn.Module, precision: Precision
    ) -> None:
        if models.classes(teacher) != models.classes(student):
            expected = f"has {models.classes(teacher)} classes, and the model {models.classes(student)}"
            raise InputError("training.distill.teacher", settings.teacher, expected)
        self._settings, self._precision = settings, precision
        self._teacher = teacher.eval().requires_grad_(False)
        self._teacher.to(precision.device)
        ours, theirs = models.data_config(student), models.data_config(teacher)
        self._size = tuple(theirs["input_size"][1:])
        scale = [mine / other for mine, other in zip(ours["std"], theirs["std"], strict=True)]
        shift = [
            (mine - other) / std
            for mine, other, std in zip(ours["mean"], theirs["mean"], theirs["std"], strict=True)
        ]
        self._same = scale == [1.0] * len(scale) and not any(shift)
        self._scale = torch.tensor(scale, device=precision.device).view(-1, 1, 1)
        self._shift = torch.tensor(shift, device=precision.device).view(-1, 1, 1)
        # DeiT's: a head of its own learns from the teacher, the other one from the labels
        two_heads = getattr(student, "set_distilled_training", None)
        if callable(two_heads):
            two_heads(True)

    @torch.no_grad()
    def _says(self, images: Tensor) -> Tensor:
        if not self._same:
            images = images * self._scale + self._shift
        if tuple(images.shape[2:]) != self._size:
            images = functional.interpolate(images, self._size, mode="bicubic", antialias=True)
        with self._precision():
            logits: Tensor = self._teacher(images)
        return logits.float()

    def wrap(self, loss: Loss) -> Callable[[Any, Tensor, Tensor], Tensor]:
        """The loss of (outputs, targets, images)."""
        settings = self._settings

        def both(outputs: Any, targets: Tensor, images: Tensor) -> Tensor:
            labelled, taught = outputs if isinstance(outputs, tuple) else (outputs, outputs)
            teacher = self._says(images)
            if settings.kind == "hard":
                lesson = functional.cross_entropy(taught, teacher.argmax(1))
            else:
                t = settings.temperature
                lesson = (
                    t
                    * t
                    * functional.kl_div(
                        (taught.float() / t).log_softmax(1),
                        (teacher / t).log_softmax(1),
                        reduction="batchmean",
                        log_target=True,
                    )
                )
            return (1 - settings.weight) * loss(labelled, targets) + settings.weight * lesson

        return both


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


class Held:
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
