"""Build the parts of a session from its job: the model, its network, its loss, its pruning steps."""

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
    """Write the names of the training images' classes into the model's configuration.

    Raises:
        InputError: the model's checkpoint has other names for the same labels.
    """
    names = datasets.class_names(job.data)
    if job.model.checkpoint is not None:
        check_known(factory.label_names(model), names, key="data.train", uri=str(job.data.train))
    factory.name_classes(model, names)


def wrap_network(job: TrainJob, model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap the model for training.

    Args:
        job: says whether it is compiled.
        model: the model, or the model with fake quantization.
        device: of this worker.

    Returns:
        The model, in DDP if there are several workers, compiled if the recipe asks for it.
    """
    own_ranges = isinstance(model, Prepared)  # ranges are averaged over the workers, not taken from rank 0
    wrapped: nn.Module = model
    if distributed.active():
        wrapped = DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            broadcast_buffers=not own_ranges,
        )
    return cast(nn.Module, torch.compile(wrapped)) if job.training.compile else wrapped


def prepare_for_int8(
    job: TrainJob, model: nn.Module, images: datasets.ImageTable, resume: Path | None
) -> Prepared | None:
    """Add fake quantization to the model, if the job trains for INT8; the parameters are shared.

    Args:
        job: what is done.
        model: on its device.
        images: for calibration, the same ones on every worker.
        resume: a checkpoint folder, whose ranges are used instead if it has some.

    Returns:
        The prepared model; ``None`` for any other job.
    """
    if job.quantize is None:
        return None
    made = Prepared(model, factory.input_size(model), aware=True)
    stored = folder.read_ranges(resume) if resume is not None else None
    if stored is not None:
        made.set_ranges(stored)
        return made
    device = next(model.parameters()).device
    made.calibrate(
        batch.to(device) for batch in datasets.calibration_batches(images, job.quantize.images, job.seed)
    )
    return made


def make_loss(
    job: TrainJob, model: nn.Module, labelled: Loss, precision: Precision
) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """Make the loss of a step.

    Args:
        job: says whether there is a teacher.
        model: the student.
        labelled: the loss of the labels, (outputs, targets) to a scalar.
        precision: of the teacher's forward pass.

    Returns:
        A loss of (outputs, targets, images), with distillation if the job has a teacher.
    """
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
    """Plan the pruning steps of a run.

    Args:
        job: what is done.
        masks: of the layers that the job prunes, from its checkpoint.
        per_epoch: optimizer steps of an epoch.

    Returns:
        The sparsity of each pruning step, by the optimizer step before which it is done.

    Raises:
        InputError: a constant schedule at another sparsity than the checkpoint has, or as
            :func:`trainers.loop.schedules.pruning_plan`.
    """
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


def initial_masks(model: nn.Module, layers: Sequence[PrunableLayer], known: MaskSet | None) -> MaskSet | None:
    """The masks with which pruning begins.

    Args:
        model: with its weights.
        layers: the layers that will be pruned: each gets the checkpoint's mask, or one of its zeros.
        known: masks of the checkpoint.

    Returns:
        Masks of these layers, and of all other sparse layers, whose zeros stay zero too; ``None`` for a dense
        model.
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
    except InputError:  # an architecture whose layers are given by the recipe's patterns alone
        return []


def load_model(job: TrainJob, resume: Path | None) -> tuple[nn.Module, dict[str, Any], MaskSet | None]:
    """Load the model from which a run starts or resumes.

    Args:
        job: what is done.
        resume: a checkpoint folder; default: the job's model.

    Returns:
        The model, the keyword arguments with which timm builds it, and its masks.

    Raises:
        InputError: a model that cannot be loaded, or ``drop_path`` for a model without it.
    """
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
        # all workers of a node read the same dense model, and each has its own copy of a checkpoint to resume
        layers = job.pruning.layers if job.pruning else None
        loaded = load_checkpoint(source, layers=layers, shared=resume is None, **extra)
    except InputError as error:
        if not extra or "drop_path" not in error.expected:
            raise
        raise InputError("training.drop_path", drop_path, "the model has no drop path") from None
    return loaded.model, dict(loaded.arguments), loaded.masks
