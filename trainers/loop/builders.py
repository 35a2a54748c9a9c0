"""From a job to the parts of a session: the model, what is trained of it, its loss, its pruning steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pruners.errors import InputError, first_line
from pruners.model.layers import PrunableLayer, find_layers
from pruners.model.masks import MaskSet
from trainers import distributed
from trainers.checkpoint import folder
from trainers.checkpoint.folder import load_checkpoint
from trainers.config.jobs import TrainJob
from trainers.data import datasets
from trainers.loop.losses import Distillation, Loss
from trainers.loop.optimization import Precision
from trainers.loop.schedules import pruning_plan
from trainers.models import factory
from trainers.models.weights_file import from_file
from trainers.quantization.fake_quant import Prepared
from trainers.sources.classes import check_known


def name_classes(job: TrainJob, model: nn.Module) -> None:
    """Let the model say what the training images call its classes.

    Raises:
        InputError: the checkpoint that it comes from calls them otherwise.
    """
    names = datasets.class_names(job.data)
    if job.model.checkpoint is not None:
        check_known(factory.label_names(model), names, key="data.train", uri=str(job.data.train))
    factory.name_classes(model, names)


def network(job: TrainJob, model: nn.Module, device: torch.device) -> nn.Module:
    """What is trained: the model in DDP where there are several workers, compiled if asked."""
    own_ranges = isinstance(model, Prepared)  # which the workers agree on, instead of taking the first one's
    wrapped: nn.Module = model
    if distributed.active():
        wrapped = DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            broadcast_buffers=not own_ranges,
        )
    return cast(nn.Module, torch.compile(wrapped)) if job.training.compile else wrapped


def prepared(
    job: TrainJob, model: nn.Module, images: datasets.ImageTable, resume: Path | None
) -> Prepared | None:
    """The model with fake quantisation, if the job trains for INT8; its parameters are the model's own.

    Every worker begins with the ranges of the same images, or goes on with those of the checkpoint.
    """
    if job.quantize is None:
        return None
    made = Prepared(model, factory.input_size(model), aware=True)
    known = folder.read_ranges(resume) if resume is not None else None
    if known is not None:
        made.set_ranges(known)
        return made
    device = next(model.parameters()).device
    made.calibrate(
        batch.to(device) for batch in datasets.calibration_batches(images, job.quantize.images, job.seed)
    )
    return made


def loss(
    job: TrainJob, model: nn.Module, labelled: Loss, precision: Precision
) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """The loss of (outputs, targets, images), with the teacher's part if there is one."""
    settings = job.training.distill
    if settings is not None:
        return Distillation(settings, _teacher(job), model, precision).wrap(labelled)
    return lambda outputs, targets, images: labelled(outputs, targets)


def _teacher(job: TrainJob) -> nn.Module:
    assert job.training.distill is not None, "only distillation has a teacher"
    name = job.training.distill.teacher
    source = job.model.checkpoint if name == "dense" else name
    if source is None:
        raise InputError("training.distill.teacher", name, "the model starts from no weights; name a teacher")
    if timm.is_model(source.split(".")[0]) and "/" not in source:
        try:
            teacher: nn.Module = timm.create_model(source, pretrained=True)
            return teacher
        except RuntimeError as error:
            raise InputError("training.distill.teacher", name, first_line(error)) from None
    if source == job.model.checkpoint and job.model.is_file:
        return from_file(job.model)
    return load_checkpoint(source, key="training.distill.teacher", shared=True).model


def pruning_steps(job: TrainJob, masks: MaskSet | None, per_epoch: int) -> dict[int, float]:
    """Steps that begin with a pruning step, and the sparsity it reaches."""
    if job.pruning is None:
        return {}
    schedule = job.pruning.schedule
    if schedule.kind == "constant":
        held = masks.sparsity if masks is not None else 0.0
        if abs(held - job.pruning.sparsity) > 1e-3:
            expected = f"constant holds what the checkpoint has, which is {held:.4g}"
            raise InputError("pruning.sparsity", job.pruning.sparsity, expected)
    length = job.training.epochs * (per_epoch if schedule.unit == "steps" else 1)
    times = pruning_plan(schedule, job.pruning.sparsity, length)
    return {
        time * (1 if schedule.unit == "steps" else per_epoch): sparsity for time, sparsity in times.items()
    }


def all_masks(model: nn.Module, layers: Sequence[PrunableLayer], known: MaskSet | None) -> MaskSet | None:
    """The masks to begin pruning ``layers`` with: a checkpoint's, and zeros that it has no masks of.

    Other layers have one where they are sparse: their zeros stay zero as well. Nothing of a dense model.
    """
    given = known or MaskSet({})
    missing = MaskSet.from_zeros(model, [layer for layer in layers if layer.name not in given])
    others = MaskSet.from_zeros(model, _known_layers(model))
    sparse = MaskSet({name: mask for name, mask in others.items() if not mask.all()})
    masks = given.over(missing).over(sparse)
    return masks if known is not None or masks.sparsity > 0 else None


def _known_layers(model: nn.Module) -> list[PrunableLayer]:
    try:
        return find_layers(model)
    except InputError:  # a recipe's patterns alone know this model's layers
        return []


def load(job: TrainJob, resume: Path | None) -> tuple[nn.Module, dict[str, Any], MaskSet | None]:
    """The model to start from, or to go on with: itself, the arguments that build it, its masks."""
    drop_path = job.training.drop_path
    source = str(resume) if resume is not None else job.model.checkpoint
    if source is None or (source == job.model.checkpoint and job.model.is_file):
        settings = job.model
        if drop_path is not None:
            settings = settings.model_copy(update={"args": {**settings.args, "drop_path_rate": drop_path}})
        build = factory.build_model if source is None else from_file
        return build(settings, job.data), dict(job.model.args), None
    extra: dict[str, Any] = {} if drop_path is None else {"drop_path_rate": drop_path}
    try:
        # every worker reads the dense model, and each its own copy of what it goes on from
        layers = job.pruning.layers if job.pruning else None
        loaded = load_checkpoint(source, layers=layers, shared=resume is None, **extra)
    except InputError as error:
        if not extra or "drop_path" not in error.expected:
            raise
        raise InputError("training.drop_path", drop_path, "the model has no drop path") from None
    return loaded.model, dict(loaded.arguments), loaded.masks
