"""One optimizer step, and what may go wrong in it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainers import distributed
from trainers.schedules import learning_rate
from trainers.session import Session, seed_everything

_PATIENCE = 10  # steps of a run that may be left out because they were not finite
_LOOK = 10  # on a GPU, steps between two looks at whether they were


def train_step(session: Session, batch: Sequence[Tensor]) -> None:
    """Forward, backward, update; pruned weights are exactly zero again after it.

    Workers may have different numbers of images: their losses count by their shares of the global batch, so
    that N of them train as one does.

    Raises:
        FloatingPointError: a loss or gradient that is not finite, with the step and the layer it came from.
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
    for some, theirs, last in _parts(images, labels, training.accumulate):
        mixed, targets = session.targets(some, theirs)
        with _together(session.network, last), session.precision():
            part = session.loss(session.network(mixed), targets, mixed)
            part = part * (share * len(some) / len(images))
            scaler.scale(part).backward()  # type: ignore[no-untyped-call]
        loss += part.detach()
    scaler.unscale_(optimizer)
    session.held.gradients()
    norm = nn.utils.clip_grad_norm_(session.trained, training.clip_grad or torch.inf)
    if _looks(session) and not bool(torch.isfinite(norm)):
        _not_finite(session, images, loss)
    else:
        scaler.step(optimizer)
        session.held.weights()
        if session.prepared is not None:
            session.prepared.agree()
        if session.average is not None:
            session.average.update(session.model)
    scaler.update()
    session.meter.record(loss, rate, skipped)


def _parts(images: Tensor, labels: Tensor, count: int) -> list[tuple[Tensor, Tensor, bool]]:
    """The images of a step in up to ``count`` parts, and whether a part is the last."""
    size = -(-len(images) // count)
    pairs = list(zip(torch.split(images, size), torch.split(labels, size), strict=True))
    return [(some, theirs, number == len(pairs) - 1) for number, (some, theirs) in enumerate(pairs)]


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


def _looks(session: Session) -> bool:
    """Whether this step's numbers are looked at: that makes the host wait for a GPU."""
    if session.job.training.precision == "float16":
        return False  # the scaler looks, and leaves steps out of itself
    every = session.device.type == "cpu" or session.job.training.on_nan == "skip"
    return every or session.step % _LOOK == 0


def _not_finite(session: Session, images: Tensor, loss: Tensor) -> None:
    """Leave the step out, or end the run and say where it went wrong."""
    meter = session.meter
    meter.left_out += 1
    if session.job.training.on_nan == "skip" and meter.left_out <= _PATIENCE:
        return
    per_epoch = len(session.sampler)
    step, epoch = session.step % per_epoch, session.epoch
    where = [text for text in distributed.gather(_culprit(session, images)) if text]
    value = float(distributed.mean_over_workers(loss))
    raise FloatingPointError(
        f"the loss is {value:g} in step {step} of epoch {epoch}"
        + (f", after {meter.left_out - 1} steps left out" if meter.left_out > 1 else "")
        + f"; {where[0] if where else 'gradients alone are not finite'}"
    )


@torch.no_grad()
def _culprit(session: Session, images: Tensor) -> str | None:
    """The first layer of this worker whose output is not finite, and the images it was so for."""
    found: list[str] = []
    hooks = [
        module.register_forward_hook(_watch(name, found))
        for name, module in session.model.named_modules()
        if name and not any(module.children())
    ]
    try:
        outputs = session.model(images)
    finally:
        for hook in hooks:
            hook.remove()
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    if not found and bool(torch.isfinite(logits).all()):
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
    layer = found[0] if found else "the model's output"
    return f"{layer} is the first that is not finite, for {'; '.join(named)}{more}"


def _watch(name: str, found: list[str]) -> object:
    def hook(module: nn.Module, given: object, output: object) -> None:
        if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
            found.append(name)

    return hook
