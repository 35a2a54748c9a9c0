"""Reports of a run: the contract between worker, search, MLflow and display.

A worker reports an :class:`EpochReport` after each epoch (:mod:`trainers.loop.gradual`); a one-shot trial of
a search reports one without training. The groups of keys below say which keys are series in MLflow, and which
are kept in the record of a trial, so that no other list of these keys is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict, cast

COST_KEYS = ("parameters", "parameters_sparse", "macs", "macs_sparse")
"""Keys of costs (:class:`pruners.model.costs.Costs`)."""
LATENCY_KEYS = ("latency", "latency_dense")
"""Keys of predicted latencies."""


class Figures(TypedDict, total=False):
    """The numbers that are measured of a model in training; any key may be missing.

    Where several λ were compared there are also ``damp_loss_λ``, the held-out loss of each.

    Attributes:
        epoch: epochs done.
        step: optimizer steps done.
        train_loss: mean loss of the epoch's steps; NaN if all of them were left out.
        val_loss: mean cross-entropy on the validation images.
        val_top1: share of the validation images that are classified correctly, 0…1.
        sparsity: share of zeros in the pruned layers, 0…1.
        lr: learning rate of the epoch's last step.
        score: by which trials are compared: top-1, and the loss where that is equal; -1 before the final
            sparsity is reached.
        recovery_epochs: epochs since the last pruning step; 0 before the final sparsity is reached.
        parameters, parameters_sparse: weights of the model, and those that are not zero.
        macs, macs_sparse: multiply-accumulates for an image, and those that are not by zero.
        skipped_images: images of the run that could not be read.
        skipped_steps: steps of the run that were left out because they were not finite.
        damp: the λ that the pruning step chose.
        layer_error_before, layer_error: where the pruning step solved its layers again, the mean squared
            error of their outputs before and after, as a share of the outputs' variance.
        images: one-shot trials: number of evaluated images.
        latency, latency_dense: predicted seconds for a batch, of the pruned and of the dense model.
        dense_top1: top-1 of the dense model on the same images.
    """

    epoch: int
    step: int
    train_loss: float
    val_loss: float
    val_top1: float
    sparsity: float
    lr: float
    score: float
    recovery_epochs: int
    parameters: int
    parameters_sparse: int
    macs: int
    macs_sparse: int
    skipped_images: int
    skipped_steps: int
    damp: float
    layer_error_before: float
    layer_error: float
    images: int
    latency: float
    latency_dense: float
    dense_top1: float


class KeptFigures(Figures, total=False):
    """Figures of the best model at a sparsity that is kept; it is chosen by ``level_score``."""

    level_score: float


class Pruned(TypedDict, total=False):
    """What an allocation prunes.

    Attributes:
        allocation: number of pruned weights by layer.
        shares: sparsity of each group of layers.
    """

    allocation: dict[str, int]
    shares: dict[str, float]


class EpochReport(Figures, Pruned, total=False):
    """What is reported after an epoch, or within one, when a checkpoint is saved; any key may be missing.

    Within an epoch there is no ``epoch``: a report has ``step``, and the last epoch's ``score`` and
    ``recovery_epochs``.

    Attributes:
        step_loss: loss of each step of the epoch.
        step_lr: learning rate of each step of the epoch.
        kept: figures of the best model at each sparsity that is kept, by ``0.75`` and the like.
        kept_at: folder of the kept models.
        notes: lines to show to the user.
        complete: one-shot trials: whether all images were evaluated.
        pbt: which member of a population the trial is, as the search adds it.
    """

    step_loss: list[float]
    step_lr: list[float]
    kept: dict[str, KeptFigures]
    kept_at: str | None
    notes: list[str]
    complete: bool
    pbt: dict[str, Any]


def of_epoch(result: Mapping[str, Any]) -> EpochReport | None:
    """The report that a search's result holds beside the keys of Tune's own.

    Args:
        result: the flat dictionary that Ray hands on.

    Returns:
        The report of an epoch's end or of a one-shot trial; ``None``: it is of a checkpoint within an epoch.
    """
    within = "step" in result and "epoch" not in result
    return None if within else cast(EpochReport, result)


SERIES_KEYS = ("train_loss", "val_loss", "val_top1", "sparsity", "lr", *COST_KEYS, *LATENCY_KEYS)
"""Keys that are logged to MLflow at each report."""
TRIAL_KEYS = (
    "images",
    *COST_KEYS,
    *LATENCY_KEYS,
    "dense_top1",
    "epoch",
    "step",
    "val_top1",
    "val_loss",
    "train_loss",
    "sparsity",
    "lr",
    "allocation",
    "shares",
)
"""Keys of the last report that are kept in the record of a trial."""


def figures_of(report: Figures | Pruned, keys: Iterable[str]) -> dict[str, Any]:
    """The figures of a report under these keys, in their order, as far as it has them."""
    figures = cast(Mapping[str, Any], report)
    return {key: figures[key] for key in keys if key in figures}


def without_not_finite(figures: Mapping[str, object]) -> Figures:
    """The figures without numbers that are NaN or infinite, which JSON cannot hold."""
    kept = {
        key: value for key, value in figures.items() if not isinstance(value, float) or math.isfinite(value)
    }
    return cast(Figures, kept)


def finite_numbers(figures: Mapping[str, object]) -> Figures:
    """The figures that JSON can hold as numbers: without NaN, infinities, texts and lists."""
    numbers = {
        key: value
        for key, value in figures.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    return cast(Figures, numbers)


def recordable(report: EpochReport) -> EpochReport:
    """The part of a report that a record keeps: figures and series that JSON can hold as numbers."""
    own = figures_of(report, EpochReport.__annotations__)
    series = {
        key: own[key] for key in ("step_loss", "step_lr") if key in own and all(map(math.isfinite, own[key]))
    }
    return cast(EpochReport, {**finite_numbers(own), **series})
