"""Train a model, or prune it gradually and let it recover. No engine: any ``report`` will do."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from pruners.allocation.sharing import Sharing, scale
from pruners.errors import InputError
from pruners.methods.registry import create_pruner
from pruners.one_shot import pattern_budget
from trainers import distributed, storage
from trainers.config.jobs import TrainJob
from trainers.loop.evaluation import Evaluation, evaluate
from trainers.loop.metrics import Metrics, numbers
from trainers.loop.prune_step import Goal, StepReport, ordering, prune_step, sharing_of
from trainers.loop.session import Session
from trainers.loop.train_step import settle, train_step

_LOOK = 10  # steps between two looks at the clock
_ASK_SECONDS = 5.0  # between two questions to the cluster, which takes some milliseconds to answer
_ASK, _SAVE = 1, 2


@dataclass(frozen=True)
class Progress:
    """What is reported after each epoch; ``save`` writes the checkpoint folder when one is due.

    Within an epoch ``metrics`` hold no ``epoch``, but the step, and by what the last epoch is judged.
    """

    metrics: Metrics
    save: Callable[[Path], None] | None


Report = Callable[[Progress], None]
Stepped = Callable[[int, int], None]


def run(
    job: TrainJob,
    report: Report,
    device: torch.device,
    resume: Path | None = None,
    *,
    branch: Path | None = None,
    leaving: Callable[[], str | None] = lambda: None,
    stepped: Stepped = lambda done, total: None,
    notes: Sequence[str] = (),
    repeat: bool = False,
) -> None:
    """Run a job to its end: dense training if it names no pruning, else prune → recover → prune …

    Every epoch ends with an evaluation on the validation images and a report. What is drawn comes from (seed,
    step, rank) and (seed, epoch, image), so that a resumed run goes on as the undisturbed one.

    Args:
        resume: a checkpoint folder of this job to go on from.
        branch: without one, the checkpoint folder of the job's ``origin``, to begin from.
        leaving: asked now and then, by all workers together: which machines are about to be taken away, if
            any are. The run is saved once for each answer.
        stepped: told after each step how many are done, and how many there are.
        notes: what the user should hear of, said with the first report.
        repeat: a run that goes on begins with its last report, which nobody may have lived to hear.
    """
    session = Session.open(job, device, resume, branch)
    place: Metrics = {"kept_at": job.keep_folder}
    told: Metrics = {"notes": list(notes)} if notes else {}
    ended = session.step == session.steps  # it was not heard, or the run would not go on
    if ended or (repeat and resume is not None and session.last):
        report(Progress(session.last | place | told, None))
        told = {}
    while session.step < session.steps:
        train_epoch(session, report, leaving, stepped)
        session.last = end_epoch(session)
        done = session.step == session.steps
        due = done or session.epoch % job.training.checkpoint_every == 0
        report(Progress(session.last | place | told, _saver(session) if due else None))
        told = {}


def train_epoch(
    session: Session, report: Report, leaving: Callable[[], str | None], stepped: Stepped
) -> None:
    """The rest of an epoch: pruning steps where the plan has them, an optimizer step for each batch."""
    per_epoch = len(session.sampler)
    session.sampler.start(session.epoch, session.step % per_epoch)
    session.network.train()
    for batch in session.train:
        if session.step in session.plan:
            _prune(session, session.plan[session.step])
        train_step(session, batch)
        session.step += 1
        stepped(session.step, session.steps)
        if session.step % per_epoch and _due(session, leaving):
            settle(session)
            report(Progress(_between(session), _saver(session)))


def end_epoch(session: Session) -> Metrics:
    """Evaluate, keep the model if it is the best at a sparsity that is kept, and say how things stand.

    Raises:
        FloatingPointError: losses, weights or answers that are not finite: nothing is kept, or said, of them.
    """
    job, measured = session.job, session.metrics
    settle(session)
    measured.check(job.data.bad_limit)
    finite = [loss for loss in measured.losses if math.isfinite(loss)]
    session.check_finite()
    result = evaluate(session.evaluated, session.validation)
    at_target = job.pruning is None or session.target == job.pruning.sparsity
    metrics: Metrics = {
        "epoch": session.epoch,
        "step": session.step,
        "train_loss": sum(finite) / len(finite) if finite else math.nan,  # all of its steps were left out
        "val_loss": result.loss,
        "val_top1": result.top1,
        "sparsity": session.sparsity,
        "lr": measured.rates[-1],
        "score": result.score if at_target else -1.0,  # only at the final sparsity trials compare
        "recovery_epochs": session.recovery_epochs if at_target else 0,
        **session.costs.at(session.pruned_weights).as_dict(),
        "step_loss": measured.losses,
        "step_lr": measured.rates,
        **measured.facts,
    }
    measured.next_epoch()
    _keep(session, metrics, result)
    return metrics | {"kept": dict(session.kept)}


def _between(session: Session) -> Metrics:
    """What is said of a checkpoint within an epoch: who compares runs always finds what it compares by."""
    judged = {
        key: session.last.get(key, unknown) for key, unknown in (("score", -1.0), ("recovery_epochs", 0))
    }
    return {"step": session.step, **judged}


def _due(session: Session, leaving: Callable[[], str | None]) -> bool:
    """Whether a checkpoint within the epoch is due; all workers answer alike."""
    training = session.job.training
    if training.checkpoint_steps is not None and session.step % training.checkpoint_steps == 0:
        return True
    if session.step % _LOOK:
        return False
    now, minutes = time.monotonic(), training.checkpoint_minutes
    wish = _ASK if now - session.asked_at > _ASK_SECONDS else 0
    if minutes is not None and now - session.saved_at > 60 * minutes:
        wish = _SAVE
    agreed = distributed.broadcast_int(wish)
    if agreed == _ASK:
        session.asked_at = now
        before, session.notice = session.notice, leaving()
        return session.notice not in (None, before)
    return agreed == _SAVE


def _keep(session: Session, metrics: Metrics, result: Evaluation) -> None:
    """Write the model where the best of its sparsity is kept, if it is one and the best so far."""
    pruning = session.job.pruning
    wanted = {session.target} if pruning is None else {pruning.sparsity, *pruning.keep}
    level = next((f"{one:g}" for one in wanted if abs(one - session.target) < 1e-6), None)
    if level is None or not result.score > session.kept.get(level, {}).get("level_score", -math.inf):
        return
    figures = numbers(metrics)
    session.kept[level] = figures | {"level_score": result.score}
    folder = session.job.keep_folder
    if folder is not None and distributed.rank() == 0:
        with TemporaryDirectory(prefix="espalier-") as local:
            session.save(Path(local), figures, whole=False)
            storage.upload(Path(local), f"{folder}/{level}")


def _prune(session: Session, sparsity: float) -> None:
    """One pruning step; the last one takes the searched allocation as it is, earlier ones scaled down."""
    job, settings = session.job, session.job.pruning
    assert settings is not None, "a plan comes from pruning settings"
    assert job.method is not None, "a pruning job names its method"
    pruner = create_pruner(job.method, **settings.options(job.method))
    masks = session.layer_masks
    gone = sum(masks.pruned().values())

    def budget_at(level: float) -> int:
        return max(pattern_budget(session.layers, level, pruner.sparsity_pattern, masks), gone)

    total = budget_at(sparsity)
    target: dict[str, int] | Sharing = sharing_of(settings, pruner)
    if job.allocation is not None:
        _check_allocation(job.allocation, budget_at(settings.sparsity), settings.sparsity)
        last = sparsity == settings.sparsity
        unit = pruner.sparsity_pattern.unit
        target = (
            dict(job.allocation)
            if last
            else scale(dict(job.allocation), session.layers, total, masks.pruned(), unit)
        )
    source = session.gradients(pruner)
    work = ordering(session.model, session.layers, masks, pruner, source)
    report = prune_step(work, source, Goal(total, target))
    session.pruned(report.masks)
    session.metrics.facts |= _damp_facts(report)


def _check_allocation(allocation: Mapping[str, int], budget: int, sparsity: float) -> None:
    """Raises:
    InputError: an allocation of another sparsity than the run is to end at, and would be told of it.
    """
    given = sum(allocation.values())
    if given != budget:
        expected = f"must be the sparsity of the allocation: {given:,} weights, and this is {budget:,}"
        raise InputError("pruning.sparsity", sparsity, expected)


def _damp_facts(step: StepReport) -> dict[str, float]:
    """The λ that a pruning step took where it tried several, and the held-out loss at each."""
    if step.damp is None:
        return {}
    return {
        "damp": step.damp.damp,
        **{f"damp_loss_{damp:g}": loss for damp, loss in step.damp.losses.items()},
    }


def _saver(session: Session) -> Callable[[Path], None]:
    session.check_finite()  # by every worker: only the first one saves, and the others would wait for it
    session.saved_at = time.monotonic()
    return lambda folder: session.save(folder, session.last)
