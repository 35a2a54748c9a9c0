"""One optimizer step, and the checks that its loss and gradients are finite."""

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
from trainers.models.private_apis import uncompiled

_MOST_LEFT_OUT = 10  # steps of a run that may be left out because they were not finite
_CHECK_STEPS = 10  # on a GPU, steps between two checks of the gradients
_MOST_OVERFLOWS = 30  # steps in a row that float16 may leave out; each halves its scale, at first 65536


def train_step(session: Session, batch: Sequence[Tensor]) -> None:
    """Forward, backward, update; pruned weights are exactly zero again afterwards.

    Workers may have different numbers of images: their losses are weighted by their shares of the global
    batch, so that several workers train as one would.

    Args:
        session: the run.
        batch: of this worker: pixels (N, H, W, 3), uint8; rectangles to erase (N, 4); labels (N,); images
            skipped (N,).

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
    if _skips_steps(session):
        session.buffers.take()
    least = 2 if factory.batch_normed(session.model) else 1
    for part_images, part_labels, last in _parts(
        images, labels, min(training.accumulate, len(images) // least)
    ):
        mixed, targets = session.targets(part_images, part_labels)
        with _gradient_sync(session.network, last), session.precision():
            part = session.loss(session.network(mixed), targets, mixed)
            part = part * (share * len(part_images) / len(images))
            scaler.scale(part).backward()  # type: ignore[no-untyped-call]
        loss += part.detach()
    session.mask_enforcer.zero_grad_()  # first: the scaler must not skip a step for pruned weights' gradients
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(session.trained, training.clip_grad or torch.inf)
    finite = torch.isfinite(norm)
    if _checks_each_step(session) and not bool(finite):
        _leave_out(session, images, loss)
        session.buffers.restore_unless(finite)
    else:
        scaler.step(optimizer)
        session.mask_enforcer.zero_weights_()
        if training.precision == "float16":
            session.buffers.restore_unless(finite)
        if session.prepared is not None:
            session.prepared.average_ranges()
        if session.average is not None:
            session.average.update(session.model)
    scaler.update()
    session.metrics.record(loss, rate, skipped, norm)
    if not _checks_each_step(session) and session.step % _CHECK_STEPS == 0:
        _check_gradients(session, session.step)


def reduce_metrics(session: Session) -> None:
    """Average the losses over all workers and check them, before a model is evaluated or saved.

    Raises:
        FloatingPointError: a loss or gradients that are not finite, by the step; more such steps than may be
            left out; a run of which no step was made.
    """
    training, metrics = session.job.training, session.metrics
    _check_gradients(session, session.step - 1)
    new = metrics.reduce()
    for step, (loss, finite) in enumerate(new, session.step - len(new)):
        if not math.isfinite(loss):
            if training.on_nan == "stop":
                raise FloatingPointError(f"the loss is {loss:g} in {_where(session, step)}")
            # steps with gradients that are not finite were counted when they were left out
            metrics.left_out += training.precision == "float16" or finite
        elif training.precision == "float16":
            metrics.overflows += not finite
    if metrics.left_out > _MOST_LEFT_OUT:
        raise FloatingPointError(
            f"{metrics.left_out} steps were not finite up to {_where(session, session.step - 1)}"
        )
    if metrics.idle >= session.step == session.steps:
        raise FloatingPointError(f"each of the run's {session.steps} steps was left out: none was finite")


def _parts(images: Tensor, labels: Tensor, count: int) -> list[tuple[Tensor, Tensor, bool]]:
    """Split the images of a step for gradient accumulation.

    Args:
        images: (N, 3, H, W).
        labels: (N,).
        count: number of parts, whose sizes differ by one image at most.

    Returns:
        Images and labels of each part, and whether it is the last one.
    """
    pairs = list(zip(images.tensor_split(count), labels.tensor_split(count), strict=True))
    return [
        (part_images, part_labels, number == len(pairs) - 1)
        for number, (part_images, part_labels) in enumerate(pairs)
    ]


def _gradient_sync(network: nn.Module, last: bool) -> AbstractContextManager[None]:
    """DDP averages gradients over the workers in the last part of a step only."""
    inner = uncompiled(network)
    if last or not isinstance(inner, DistributedDataParallel):
        return nullcontext()
    return inner.no_sync()


def _set_rate(session: Session) -> float:
    """Set the learning rate of the current step, and return it."""
    training, per_epoch = session.job.training, len(session.sampler)
    jumps = [step / per_epoch for step in session.plan]
    rate = learning_rate(training.lr, session.step / per_epoch, training.epochs, jumps)
    for group in session.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    return rate


def _skips_steps(session: Session) -> bool:
    """Return whether steps that are not finite are left out, instead of ending the run."""
    return session.job.training.on_nan == "skip" or session.job.training.precision == "float16"


def _checks_each_step(session: Session) -> bool:
    """Return whether each step's gradients are checked before they are used; the host waits for a GPU then.

    In float16 the scaler checks them, and leaves steps out itself.
    """
    if session.job.training.precision == "float16":
        return False
    return session.device.type == "cpu" or session.job.training.on_nan == "skip"


def _check_gradients(session: Session, last: int) -> None:
    """Check the gradients of the steps up to ``last`` that have not been checked.

    Raises:
        FloatingPointError: they were not finite; in float16, in too many steps in a row.
    """
    training, metrics = session.job.training, session.metrics
    finite = metrics.check_gradients()
    if training.precision == "float16":
        if metrics.idle >= _MOST_OVERFLOWS:
            raise FloatingPointError(
                f"the last {metrics.idle} steps up to {_where(session, last)} were left out: their gradients "
                "are not finite in float16, at any scale; take bfloat16 or float32"
            )
    elif training.on_nan == "stop" and not all(finite):
        step = last + 1 - len(finite) + finite.index(False)
        later = f", seen {last - step} steps later" if last > step else ""
        raise FloatingPointError(f"the gradients are not finite in {_where(session, step)}{later}")


def _where(session: Session, step: int) -> str:
    epoch, number = divmod(step, len(session.sampler))
    return f"step {number} of epoch {epoch}"


def _leave_out(session: Session, images: Tensor, loss: Tensor) -> None:
    """Count a step that is left out, or end the run.

    Raises:
        FloatingPointError: the run ends; says in which layer and for which images it went wrong.
    """
    metrics = session.metrics
    metrics.left_out += 1
    if session.job.training.on_nan == "skip" and metrics.left_out <= _MOST_LEFT_OUT:
        return
    where = [text for text in distributed.all_gather(_first_bad_layer(session, images)) if text]
    value = float(distributed.mean_over_workers(loss))
    raise FloatingPointError(
        f"the loss is {value:g} in {_where(session, session.step)}"
        + (f", after {metrics.left_out - 1} steps left out" if metrics.left_out > 1 else "")
        + f"; {where[0] if where else 'gradients alone are not finite'}"
    )


@torch.no_grad()
def _first_bad_layer(session: Session, images: Tensor) -> str | None:
    """The first layer whose output is not finite on this worker, and the images of which it is not."""
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
