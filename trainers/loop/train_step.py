"""One optimizer step, and what may go wrong in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainers import distributed
from trainers.loop.schedules import learning_rate
from trainers.loop.session import Session, seed_everything
from trainers.models import factory

_PATIENCE = 10  # steps of a run that may be left out because they were not finite
_LOOK = 10  # on a GPU, steps between two looks at whether they were
_OVERFLOWS = 30  # steps in a row that float16 may leave out; its first scale of 65536 is halved by each


def train_step(session: Session, batch: Sequence[Tensor]) -> None:
    """Forward, backward, update; pruned weights are exactly zero again after it.

    Workers may have different numbers of images: their losses count by their shares of the global batch, so
    that N of them train as one does.

    Raises:
        FloatingPointError: a loss or gradient that is not finite, with the step and the layer it came from;
            on a GPU up to ten steps later.
    """
    training, optimizer, scaler = session.job.training, session.optimizer, session.precision.scaler
    seed_everything(session.job.seed, session.step, distributed.rank())
    rate = _set_rate(session)
    pixels, rectangles, labels, skipped = (part.to(session.device, non_blocking=True) for part in batch)
    images = session.normalise(pixels, rectangles)
    if training.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    share = session.sampler.share(session.step % len(session.sampler))
    loss = torch.zeros((), device=session.device)
    optimizer.zero_grad(set_to_none=True)
    if _goes_on(session):
        session.moved.remember()
    least = 2 if factory.batch_normed(session.model) else 1
    for part_images, part_labels, last in _parts(
        images, labels, min(training.accumulate, len(images) // least)
    ):
        mixed, targets = session.targets(part_images, part_labels)
        with _together(session.network, last), session.precision():
            part = session.loss(session.network(mixed), targets, mixed)
            part = part * (share * len(part_images) / len(images))
            scaler.scale(part).backward()  # type: ignore[no-untyped-call]
        loss += part.detach()
    session.held.gradients()  # first: what is pruned has no say in whether the scaler leaves the step out
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(session.trained, training.clip_grad or torch.inf)
    sound = torch.isfinite(norm)
    if _at_once(session) and not bool(sound):
        _not_finite(session, images, loss)
        session.moved.put_back(sound)
    else:
        scaler.step(optimizer)
        session.held.weights()
        if training.precision == "float16":
            session.moved.put_back(sound)
        if session.prepared is not None:
            session.prepared.average_ranges()
        if session.average is not None:
            session.average.update(session.model)
    scaler.update()
    session.metrics.record(loss, rate, skipped, norm)
    if not _at_once(session) and session.step % _LOOK == 0:
        _look(session, session.step)


def settle(session: Session) -> None:
    """Bring the losses of all workers together, before a model is evaluated or saved.

    Raises:
        FloatingPointError: a loss or gradients that are not finite, by the step; more such steps than may be
            left out; a run of which no step was made.
    """
    training, metrics = session.job.training, session.metrics
    _look(session, session.step - 1)
    new = metrics.settle()
    for step, (loss, sound) in enumerate(new, session.step - len(new)):
        if not math.isfinite(loss):
            if training.on_nan == "stop":
                raise FloatingPointError(f"the loss is {loss:g} in {_where(session, step)}")
            # others that were left out are counted already
            metrics.left_out += training.precision == "float16" or sound
        elif training.precision == "float16":
            metrics.overflows += not sound
    if metrics.left_out > _PATIENCE:
        raise FloatingPointError(
            f"{metrics.left_out} steps were not finite up to {_where(session, session.step - 1)}"
        )
    if metrics.idle >= session.step == session.steps:
        raise FloatingPointError(f"each of the run's {session.steps} steps was left out: none was finite")


def _parts(images: Tensor, labels: Tensor, count: int) -> list[tuple[Tensor, Tensor, bool]]:
    """The images of a step in ``count`` parts, which differ by one image at most; whether it is the last."""
    pairs = list(zip(images.tensor_split(count), labels.tensor_split(count), strict=True))
    return [
        (part_images, part_labels, number == len(pairs) - 1)
        for number, (part_images, part_labels) in enumerate(pairs)
    ]


def _together(network: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Gradients are shared with the last part of a step alone."""
    inner = getattr(network, "_orig_mod", network)  # torch.compile wraps what it compiles
    if last or not isinstance(inner, DistributedDataParallel):
        return nullcontext()
    return inner.no_sync()


def _set_rate(session: Session) -> float:
    training, per_epoch = session.job.training, len(session.sampler)
    jumps = [step / per_epoch for step in session.plan]
    rate = learning_rate(training.lr, session.step / per_epoch, training.epochs, jumps)
    for group in session.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    return rate


def _goes_on(session: Session) -> bool:
    """Whether the run may go on after a step that was not finite."""
    return session.job.training.on_nan == "skip" or session.job.training.precision == "float16"


def _at_once(session: Session) -> bool:
    """Whether each step's gradients are looked at before they are used: that makes the host wait for a GPU.

    In float16 the scaler looks, and leaves steps out of itself.
    """
    if session.job.training.precision == "float16":
        return False
    return session.device.type == "cpu" or session.job.training.on_nan == "skip"


def _look(session: Session, last: int) -> None:
    """Look at the gradients of the steps up to ``last`` that nobody has looked at.

    Raises:
        FloatingPointError: they were not finite; in float16, too often one after the other.
    """
    training, metrics = session.job.training, session.metrics
    sound = metrics.look()
    if training.precision == "float16":
        if metrics.idle >= _OVERFLOWS:
            raise FloatingPointError(
                f"the last {metrics.idle} steps up to {_where(session, last)} were left out: their gradients "
                "are not finite in float16, at any scale; take bfloat16 or float32"
            )
    elif training.on_nan == "stop" and not all(sound):
        step = last + 1 - len(sound) + sound.index(False)
        later = f", seen {last - step} steps later" if last > step else ""
        raise FloatingPointError(f"the gradients are not finite in {_where(session, step)}{later}")


def _where(session: Session, step: int) -> str:
    epoch, number = divmod(step, len(session.sampler))
    return f"step {number} of epoch {epoch}"


def _not_finite(session: Session, images: Tensor, loss: Tensor) -> None:
    """Leave the step out, or end the run and say where it went wrong."""
    metrics = session.metrics
    metrics.left_out += 1
    if session.job.training.on_nan == "skip" and metrics.left_out <= _PATIENCE:
        return
    where = [text for text in distributed.all_gather(_culprit(session, images)) if text]
    value = float(distributed.mean_over_workers(loss))
    raise FloatingPointError(
        f"the loss is {value:g} in {_where(session, session.step)}"
        + (f", after {metrics.left_out - 1} steps left out" if metrics.left_out > 1 else "")
        + f"; {where[0] if where else 'gradients alone are not finite'}"
    )


@torch.no_grad()
def _culprit(session: Session, images: Tensor) -> str | None:
    """The first layer of this worker whose output is not finite, and the images it was so for."""
    layers: list[str] = []
    hooks = [
        module.register_forward_hook(_watch(name, layers))
        for name, module in session.model.named_modules()
        if name and not any(module.children())
    ]
    try:
        outputs = session.model(images)
    finally:
        for hook in hooks:
            hook.remove()
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    if not layers and bool(torch.isfinite(logits).all()):
        names = [
            name
            for name, parameter in session.model.named_parameters()
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
        ]
        return f"the gradient of {names[-1]} is the first that is not finite" if names else None
    rows = (~torch.isfinite(logits).flatten(1).all(1)).nonzero().flatten().tolist()
    samples = session.sampler.samples(session.epoch, session.step % len(session.sampler))
    named = [session.images.where(samples[row].row) for row in rows[:3]]
    more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
    layer = layers[0] if layers else "the model's output"
    return f"{layer} is the first that is not finite, for {'; '.join(named)}{more}"


def _watch(name: str, layers: list[str]) -> object:
    def hook(module: nn.Module, given: object, output: object) -> None:
        if not layers and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
            layers.append(name)

    return hook
