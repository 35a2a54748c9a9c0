"""Losses: cross-entropy with label smoothing or soft targets, and distillation from a teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional

from pruners.errors import InputError
from trainers.config.training import DistillSettings, TrainingSettings
from trainers.loop.optimization import Precision
from trainers.models import factory

Loss = Callable[[Any, Tensor], Tensor]
"""(outputs (N, classes), targets (N,) or (N, classes)) to a scalar."""


class Targets:
    """Mixup and CutMix of images and labels, and the loss that fits; they draw from numpy's random state.

    Args:
        training: the recipe's training.
        classes: number of classes.

    Attributes:
        loss: of (logits (N, classes), targets): for labels (N,), or for soft targets (N, classes) if images
            are mixed.
    """

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
        """Mix a batch.

        Args:
            images: (N, 3, H, W).
            labels: (N,), int64.

        Returns:
            Images (M, 3, H, W), and labels (N,), or soft targets (M, classes) if images are mixed; M is N, or
            N + 1 where N is odd and images are mixed.
        """
        if self._mix is None:
            return images, labels
        if len(images) % 2:  # Mixup pairs images: the last one of an odd batch is used twice
            images, labels = torch.cat([images, images[-1:]]), torch.cat([labels, labels[-1:]])
        mixed: tuple[Tensor, Tensor] = self._mix(images, labels)
        return mixed


class Distillation:
    """Distillation from a teacher: the loss is a weighted mean of that of the labels and that of the teacher.

    ``soft``: the Kullback-Leibler divergence of the softened outputs, times the squared temperature (Hinton
    et al., "Distilling the Knowledge in a Neural Network", 2015). ``hard``: cross-entropy with the class that
    the teacher predicts (Touvron et al., "Training data-efficient image transformers", 2021).

    Args:
        settings: kind, weight and temperature.
        teacher: moved to the device, in eval mode.
        student: the model; its preprocessing, which the images have had, is converted to the teacher's.
        precision: of the teacher's forward pass.

    Raises:
        InputError: a teacher with other classes.
    """

    def __init__(
        self, settings: DistillSettings, teacher: nn.Module, student: nn.Module, precision: Precision
    ) -> None:
        if factory.classes(teacher) != factory.classes(student):
            expected = f"has {factory.classes(teacher)} classes, and the model {factory.classes(student)}"
            raise InputError("training.distill.teacher", settings.teacher, expected)
        self._settings, self._precision = settings, precision
        self._teacher = teacher.eval().requires_grad_(False)
        self._teacher.to(precision.device)
        ours, theirs = factory.data_config(student), factory.data_config(teacher)
        self._size = tuple(theirs["input_size"][1:])
        scale = [own / other for own, other in zip(ours["std"], theirs["std"], strict=True)]
        shift = [
            (own - other) / std
            for own, other, std in zip(ours["mean"], theirs["mean"], theirs["std"], strict=True)
        ]
        self._same = scale == [1.0] * len(scale) and not any(shift)
        self._scale = torch.tensor(scale, device=precision.device).view(-1, 1, 1)
        self._shift = torch.tensor(shift, device=precision.device).view(-1, 1, 1)
        # DeiT's: a head of its own learns from the teacher, the other one from the labels
        two_heads = getattr(student, "set_distilled_training", None)
        if callable(two_heads):
            two_heads(True)

    @torch.no_grad()
    def _teacher_logits(self, images: Tensor) -> Tensor:
        """Logits (N, classes), float32, of images (N, 3, H, W) that are normalised for the student."""
        if not self._same:
            images = images * self._scale + self._shift
        if tuple(images.shape[2:]) != self._size:
            images = functional.interpolate(images, self._size, mode="bicubic", antialias=True)
        with self._precision():
            logits: Tensor = self._teacher(images)
        return logits.float()

    def wrap(self, loss: Loss) -> Callable[[Any, Tensor, Tensor], Tensor]:
        """Add distillation to a loss.

        Args:
            loss: of the labels, (outputs, targets) to a scalar.

        Returns:
            A loss of (outputs, targets, images): outputs (N, classes), or a pair of them for a student with a
            distillation head; targets as in :class:`Targets`; images (N, 3, H, W), normalised.
        """
        settings = self._settings

        def both(outputs: Any, targets: Tensor, images: Tensor) -> Tensor:
            labelled, taught = outputs if isinstance(outputs, tuple) else (outputs, outputs)
            teacher = self._teacher_logits(images)
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
