"""Train a model, or prune it gradually and let it recover. No engine: any ``report`` will do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from pruners.allocation import Sharing, scale
from pruners.costs import cost_model
from pruners.masks import MaskSet
from pruners.methods import create_pruner
from pruners.one_shot import pattern_budget
from trainers import distributed, models
from trainers.config import PruningSettings, TrainJob
from trainers.evaluate import evaluate
from trainers.prune_step import Goal, StepReport, ordering, prune_step
from trainers.schedules import learning_rate, pruning_epochs, step_sparsities
from trainers.session import Session, seed_everything

Metrics = dict[str, float | int | list[float]]


@dataclass(frozen=True)
class Progress:
    """What is reported after each epoch; ``save`` writes the checkpoint folder when one is due."""

    metrics: Metrics
    save: Callable[[Path], None] | None


Report = Callable[[Progress], None]


def run(job: TrainJob, report: Report, device: torch.device, resume: Path | None = None) -> None:
    """Run a job to its end: dense training if it names no pruning, else prune → recover → prune …

    Every epoch ends with an evaluation on the validation images and a report. An epoch's randomness comes
    from (seed, epoch, rank), so that a run resumed from a checkpoint goes on as the undisturbed one.
    """
    session = Session.open(job, device, resume)
    plan = _pruning_plan(job)
    costs = cost_model(session.model, models.input_size(session.model))
    final_epoch = max(plan, default=0)
    while session.epoch < job.training.epochs:
        epoch = session.epoch
        seed_everything(job.seed, epoch, distributed.rank())
        step = _prune(session, plan[epoch], last=epoch == final_epoch) if epoch in plan else None
        losses, rates = train_epoch(session, jumps=sorted(plan))
        session.epoch += 1
        result = evaluate(session.model, session.validation)
        at_target = epoch >= final_epoch
        metrics: Metrics = {
            "epoch": session.epoch,
            "step": session.epoch * len(losses),
            "train_loss": sum(losses) / len(losses),
            "val_loss": result.loss,
            "val_top1": result.top1,
            "sparsity": session.sparsity,
            "lr": rates[-1],
            "score": result.score if at_target else -1.0,  # only at the final sparsity trials compare
            "recovery_epochs": session.epoch - final_epoch if at_target else 0,
            **costs.at(session.masks.pruned() if session.masks is not None else {}).as_dict(),
            "step_loss": losses,
            "step_lr": rates,
            **_damp_metrics(step),
        }
        due = session.epoch % job.training.checkpoint_every == 0 or session.epoch == job.training.epochs
        report(Progress(metrics, _saver(session, metrics) if due else None))


def train_epoch(session: Session, jumps: list[int]) -> tuple[list[float], list[float]]:
    """One pass over this worker's images; returns the loss and learning rate of every step.

    Pruned weights are exactly zero again after each step of the optimizer.
    """
    training = session.job.training
    mix, criterion = _targets(session)
    hold = _holder(session.masks, session.model)
    parameters = [parameter for group in session.optimizer.param_groups for parameter in group["params"]]
    losses: list[Tensor] = []
    rates: list[float] = []
    session.network.train()
    sampler = session.train.sampler
    if isinstance(sampler, torch.utils.data.DistributedSampler):
        sampler.set_epoch(session.epoch)
    for step, (images, labels) in enumerate(session.train):
        done = session.epoch + step / len(session.train)
        rate = learning_rate(training.lr, done, training.epochs, jumps)
        for group in session.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        mixed, targets = mix(images.to(session.device), labels.to(session.device))
        loss = criterion(session.network(mixed), targets)
        session.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if training.clip_grad is not None:
            nn.utils.clip_grad_norm_(parameters, training.clip_grad)
        session.optimizer.step()
        hold()
        losses.append(loss.detach())
        rates.append(rate)
    mean = distributed.sum_over_workers(torch.stack(losses)) / distributed.world_size()
    values = mean.tolist()
    if not torch.isfinite(mean).all():
        bad = int((~torch.isfinite(mean)).nonzero()[0])
        raise FloatingPointError(f"the loss is {values[bad]} in step {bad} of epoch {session.epoch}")
    return values, rates


def _pruning_plan(job: TrainJob) -> dict[int, float]:
    """Epochs that begin with a pruning step, and the sparsity it reaches."""
    if job.pruning is None:
        return {}
    epochs = pruning_epochs(job.pruning.schedule, job.training.epochs)
    sparsities = step_sparsities(job.pruning.schedule, job.pruning.sparsity)
    return dict(zip(epochs, sparsities, strict=True))


def _prune(session: Session, sparsity: float, *, last: bool) -> StepReport:
    """One pruning step; the last one takes the searched allocation as it is, earlier ones scaled down."""
    job = session.job
    settings: PruningSettings | None = job.pruning
    assert settings is not None, "a plan comes from pruning settings"
    assert job.method is not None, "a pruning job names its method"
    pruner = create_pruner(job.method, **settings.options(job.method))
    masks = session.masks or MaskSet.dense(session.model, session.layers)
    total = max(pattern_budget(session.layers, sparsity, pruner.form, masks), sum(masks.pruned().values()))
    scope = settings.scope or pruner.scope
    target: dict[str, int] | Sharing = Sharing(scope, settings.floor, settings.ceiling, settings.table)
    if job.allocation is not None:
        unit = pruner.form.unit
        target = (
            dict(job.allocation)
            if last
            else scale(dict(job.allocation), session.layers, total, masks.pruned(), unit)
        )
    source = session.gradients(pruner, session.epoch)
    work = ordering(session.model, session.layers, masks, pruner, source)
    report = prune_step(work, source, Goal(total, target))
    session.masks = report.masks
    session.mask_moments()
    return report


def _damp_metrics(step: StepReport | None) -> Metrics:
    """The λ that a pruning step took where it tried several, and the held-out loss at each."""
    if step is None or step.damp is None:
        return {}
    curve: Metrics = {f"damp_loss_{damp:g}": loss for damp, loss in step.damp.losses.items()}
    return {"damp": step.damp.damp, **curve}


def _targets(
    session: Session,
) -> tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], Callable[[Tensor, Tensor], Tensor]]:
    """How images and labels are mixed, and the loss that fits."""
    training = session.job.training
    if training.augment.mixup or training.augment.cutmix:
        mix = Mixup(
            mixup_alpha=training.augment.mixup,
            cutmix_alpha=training.augment.cutmix,
            label_smoothing=training.label_smoothing,
            num_classes=session.model.num_classes,
        )

        def mixed(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            if len(images) % 2:  # Mixup pairs images: the odd one of a last batch comes twice
                images, labels = torch.cat([images, images[-1:]]), torch.cat([labels, labels[-1:]])
            both: tuple[Tensor, Tensor] = mix(images, labels)
            return both

        return mixed, SoftTargetCrossEntropy()
    return lambda images, labels: (images, labels), nn.CrossEntropyLoss(
        label_smoothing=training.label_smoothing
    )


def _holder(masks: MaskSet | None, model: nn.Module) -> Callable[[], None]:
    """What sets pruned weights back to zero after a step, its look-ups done once."""
    if masks is None:
        return lambda: None
    weights = dict(model.named_parameters())
    pairs = [(weights[name], ~mask.to(weights[name].device)) for name, mask in masks.items()]

    @torch.no_grad()
    def hold() -> None:
        for weight, pruned in pairs:
            weight.masked_fill_(pruned, 0.0)

    return hold


def _saver(session: Session, metrics: Metrics) -> Callable[[Path], None]:
    figures = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
    return lambda folder: session.save(folder, figures)
