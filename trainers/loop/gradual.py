"""Train a model, or prune it gradually and let it recover; results go to a callback, which may be Ray's."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import cast

import torch

from pruners.allocation.sharing import scale
from pruners.errors import InputError
from pruners.methods.base import Pruner
from pruners.methods.registry import create_pruner
from pruners.model.masks import MaskSet
from pruners.one_shot import pattern_budget, round_budget
from pruners.reconstruction.reconstruct import Reconstruction
from trainers import distributed, storage
from trainers.config.jobs import TrainJob
from trainers.host_memory import keep_freed_memory
from trainers.loop.elimination import round_of
from trainers.loop.evaluation import Evaluation, evaluate
from trainers.loop.prune_step import Goal, StepReport, ordering, prune_step, reconstruct_step, sharing_of
from trainers.loop.report import EpochReport, finite_numbers
from trainers.loop.session import Session
from trainers.loop.train_step import reduce_metrics, train_step

_MOST_STEPS = 10  # between two looks at the clock
_LOOK_SECONDS = 1.0  # likewise, as far as steps are so short
_ASK_SECONDS = 5.0  # between two questions to the cluster, which takes some milliseconds to answer
_ASK, _SAVE, _STOP = 1, 2, 3


class Stopped(Exception):  # noqa: N818 - it is no error
    """A run was asked to stop: raised after the same step on all workers."""


@dataclass(frozen=True)
class Progress:
    """The report of a run after each epoch, and for a checkpoint within an epoch.

    Attributes:
        metrics: the figures.
        save: writes the checkpoint folder; ``None``: no checkpoint is due.
    """

    metrics: EpochReport
    save: Callable[[Path], None] | None


Report = Callable[[Progress], None]
Stepped = Callable[[int, int], None]
"""(steps done, steps in all)."""


def run(
    job: TrainJob,
    report: Report,
    device: torch.device,
    resume: Path | None = None,
    *,
    branch: Path | None = None,
    leaving: Callable[[], str | None] = lambda: None,
    stopping: Callable[[], bool] = lambda: False,
    stepped: Stepped = lambda done, total: None,
    notes: Sequence[str] = (),
    repeat: bool = False,
) -> None:
    """Run a job to its end: dense training if it names no pruning, else prune → recover → prune …

    Every epoch ends with an evaluation on the validation images and a report. Random numbers are drawn from
    (seed, step, rank) and (seed, epoch, image), so that a resumed run continues exactly like one that was not
    interrupted.

    Args:
        job: what to do.
        report: called by every worker with each :class:`Progress`.
        device: of this worker.
        resume: a checkpoint folder of this job to resume from.
        branch: where there is none, the checkpoint folder of the job's ``origin`` to start from.
        leaving: called now and then, by all workers together: names the machines that will be preempted, or
            returns ``None``. The run is saved once for each answer.
        stopping: called now and then: whether the run must stop. Only the first worker's answer counts.
        stepped: called after each step with the steps done and the steps in all.
        notes: lines for the user, sent with the first report.
        repeat: send the last report of a resumed run again, because its receiver may have died before it
            arrived.

    Raises:
        Stopped: the run was asked to stop; it has not saved or reported anything since.
    """
    keep_freed_memory()
    session = Session.open(job, device, resume, branch)
    kept_at: EpochReport = {"kept_at": job.keep_folder}
    unsent: EpochReport = {"notes": list(notes)} if notes else {}
    ended = session.step == session.steps  # its last report did not arrive, or the run would not be resumed
    if ended or (repeat and resume is not None and session.last):
        report(Progress(session.last | kept_at | unsent, None))
        unsent = {}
    while session.step < session.steps:
        train_epoch(session, report, leaving, stopping, stepped)
        session.last = end_epoch(session)
        done = session.step == session.steps
        due = done or session.epoch % job.training.checkpoint_every == 0
        report(Progress(session.last | kept_at | unsent, _saver(session) if due else None))
        unsent = {}


def train_epoch(
    session: Session,
    report: Report,
    leaving: Callable[[], str | None],
    stopping: Callable[[], bool],
    stepped: Stepped,
) -> None:
    """Train the rest of an epoch: pruning steps where the plan has them, an optimizer step for each batch.

    Args:
        session: its ``step`` says where in the epoch it begins.
        report: called when a checkpoint is due within the epoch.
        leaving: as in :func:`run`.
        stopping: as in :func:`run`.
        stepped: as in :func:`run`.

    Raises:
        Stopped: the run was asked to stop.
    """
    per_epoch = len(session.sampler)
    session.sampler.start(session.epoch, session.step % per_epoch)
    session.network.train()
    for batch in session.train:
        if session.step in session.plan:
            _prune(session, session.plan[session.step])
        train_step(session, batch)
        session.step += 1
        stepped(session.step, session.steps)
        decision = _decision(session, stopping)
        if decision == _STOP:
            raise Stopped
        if session.step % per_epoch and _due(session, decision, leaving):
            reduce_metrics(session)
            report(Progress(_between(session), _saver(session)))


def end_epoch(session: Session) -> EpochReport:
    """Evaluate, keep the model if it is the best at a sparsity to keep, and return the epoch's figures.

    Raises:
        FloatingPointError: losses, weights or logits that are not finite: nothing is kept or reported then.
    """
    job, measured = session.job, session.metrics
    reduce_metrics(session)
    measured.check(job.data.bad_limit)
    finite = [loss for loss in measured.losses if math.isfinite(loss)]
    session.check_finite()
    result = evaluate(session.evaluated, session.validation)
    at_target = job.pruning is None or session.target == job.pruning.sparsity
    costs = session.costs.at(session.pruned_weights)
    report: EpochReport = {
        "epoch": session.epoch,
        "step": session.step,
        "train_loss": sum(finite) / len(finite) if finite else math.nan,  # NaN: all steps were left out
        "val_loss": result.loss,
        "val_top1": result.top1,
        "sparsity": session.sparsity,
        "lr": measured.rates[-1],
        "score": result.score if at_target else -1.0,  # trials are compared at the final sparsity only
        "recovery_epochs": session.recovery_epochs if at_target else 0,
        "parameters": costs.parameters,
        "parameters_sparse": costs.parameters_sparse,
        "macs": costs.macs,
        "macs_sparse": costs.macs_sparse,
        "step_loss": measured.losses,
        "step_lr": measured.rates,
    }
    report |= cast(EpochReport, measured.facts)  # skipped images and steps, and the λ of a pruning step
    measured.next_epoch()
    _keep(session, report, result)
    report["kept"] = dict(session.kept)
    return report


def _between(session: Session) -> EpochReport:
    """The report of a checkpoint within an epoch, with the keys by which schedulers compare runs."""
    last = session.last
    return {
        "step": session.step,
        "score": last.get("score", -1.0),
        "recovery_epochs": last.get("recovery_epochs", 0),
    }


def _decision(session: Session, stopping: Callable[[], bool]) -> int:
    """The first worker's decision after a step, the same on all: ask about preemption, save, stop, or 0."""
    if session.step < session.look_at:
        return 0
    now, minutes = time.monotonic(), session.job.training.checkpoint_minutes
    decision = _ASK if now - session.asked_at > _ASK_SECONDS else 0
    if minutes is not None and now - session.saved_at > 60 * minutes:
        decision = _SAVE
    if stopping():
        decision = _STOP
    slow = now - session.looked_at > _LOOK_SECONDS
    steps = max(session.look_steps // 2, 1) if slow else min(session.look_steps + 1, _MOST_STEPS)
    # the workers' clocks differ
    decision, session.look_steps = divmod(distributed.broadcast_int(decision * 100 + steps), 100)
    session.looked_at, session.look_at = now, session.step + session.look_steps
    return decision


def _due(session: Session, decision: int, leaving: Callable[[], str | None]) -> bool:
    """Return whether a checkpoint within the epoch is due; the same on all workers."""
    steps = session.job.training.checkpoint_steps
    if steps is not None and session.step % steps == 0:
        return True
    if decision == _ASK:
        session.asked_at = time.monotonic()
        before, session.notice = session.notice, leaving()
        return session.notice not in (None, before)
    return decision == _SAVE


def _keep(session: Session, report: EpochReport, result: Evaluation) -> None:
    """Keep the model if its sparsity is one to keep, and it is the best model at this sparsity so far."""
    pruning = session.job.pruning
    sparsities = {session.target} if pruning is None else {pruning.sparsity, *pruning.keep}
    level = next((f"{sparsity:g}" for sparsity in sparsities if abs(sparsity - session.target) < 1e-6), None)
    if level is None or not result.score > session.kept.get(level, {}).get("level_score", -math.inf):
        return
    figures = finite_numbers(report)
    session.kept[level] = {**figures, "level_score": result.score}
    folder = session.job.keep_folder
    if folder is not None and distributed.rank() == 0:
        with TemporaryDirectory(prefix="espalier-") as local:
            session.save(Path(local), figures, whole=False)
            storage.upload(Path(local), f"{folder}/{level}")


def _prune(session: Session, sparsity: float) -> None:
    """Do one pruning step: one round or several, with a reconstruction after each if it is requested.

    Nothing is saved before the step is done: a run that is interrupted within it repeats all of it.
    """
    job, settings = session.job, session.job.pruning
    assert settings is not None, "a plan comes from pruning settings"
    assert job.method is not None, "a pruning job names its method"
    pruner = create_pruner(job.method, **settings.options(job.method))
    masks = session.layer_masks
    levels = settings.rounds(job.method, masks.sparsity, sparsity)
    before = copy.deepcopy(session.model) if settings.reconstruct else None
    facts: dict[str, float] = {}
    for number, level in enumerate(levels):
        source = session.gradients(pruner, *round_of(settings, pruner, levels, number))
        work = ordering(session.model, session.layers, masks, pruner, source)
        goal = _goal(session, pruner, masks, level, last=number == len(levels) - 1)
        report = prune_step(work, source, goal)
        masks, facts = report.masks, _damp_facts(report)
        if before is not None:
            images = session.images_to_solve_on(settings.reconstruct)
            done = reconstruct_step(session.model, before, session.layers, masks, images)
            facts |= _reconstruction_facts(done)
    session.pruned(masks)
    session.metrics.facts |= facts


def _goal(session: Session, pruner: Pruner, masks: MaskSet, sparsity: float, *, last: bool) -> Goal:
    """The goal of a round.

    The last round of the last step uses the searched allocation, earlier ones scale it down.

    Args:
        session: of the run.
        pruner: the method.
        masks: of the layers as they are.
        sparsity: after the round.
        last: whether it is the last round of its step; the others prune at least to the layers' floors.
    """
    job, settings = session.job, session.job.pruning
    assert settings is not None, "a plan comes from pruning settings"
    layers, pattern, pruned = session.layers, pruner.sparsity_pattern, masks.pruned()

    def budget_at(level: float) -> int:
        return max(pattern_budget(layers, level, pattern, masks), sum(pruned.values()))

    total, sharing = budget_at(sparsity), sharing_of(settings, pruner)
    if job.allocation is None:
        return Goal(
            total if last else max(total, round_budget(sharing, layers, sparsity, pattern, masks)), sharing
        )
    allocation = dict(job.allocation)
    _check_allocation(allocation, budget_at(settings.sparsity), settings.sparsity)
    if last and sparsity == settings.sparsity:
        return Goal(total, allocation)
    return Goal(total, scale(allocation, layers, total, pruned, pattern.unit))


def _check_allocation(allocation: Mapping[str, int], budget: int, sparsity: float) -> None:
    """Check that an allocation has the sparsity at which the run ends.

    Raises:
        InputError: it has another one.
    """
    given = sum(allocation.values())
    if given != budget:
        expected = f"must be the sparsity of the allocation: {given:,} weights, and this is {budget:,}"
        raise InputError("pruning.sparsity", sparsity, expected)


def _damp_facts(step: StepReport) -> dict[str, float]:
    """The λ that a pruning step chose where it compared several, and the held-out loss of each."""
    if step.damp is None:
        return {}
    return {
        "damp": step.damp.damp,
        **{f"damp_loss_{damp:g}": loss for damp, loss in step.damp.losses.items()},
    }


def _reconstruction_facts(done: Reconstruction) -> dict[str, float]:
    """The mean error of the layers that were solved again, before and after, as a share of the variance."""
    before, after = (mean(pair[end] for pair in done.errors.values()) for end in (0, 1))
    return {"layer_error_before": before, "layer_error": after}


def _saver(session: Session) -> Callable[[Path], None]:
    """A function that writes the checkpoint folder of the current state."""
    session.check_finite()  # by every worker: if rank 0 alone raised, the others would wait for it
    session.saved_at = time.monotonic()
    return lambda folder: session.save(folder, session.last)
