"""The state of one worker during a run: built from a job, saved to a checkpoint folder, restored from it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from pruners.methods.base import Pruner
from pruners.model.costs import CostModel, cost_model
from pruners.model.layers import PrunableLayer
from pruners.model.masks import MaskSet
from trainers import distributed
from trainers.checkpoint import trainer_state
from trainers.checkpoint.finite import check_finite
from trainers.checkpoint.folder import save_checkpoint
from trainers.checkpoint.records import PruningRecord
from trainers.config.jobs import TrainJob
from trainers.config.pruning import PruningSettings
from trainers.data import datasets
from trainers.data.augment import Augment, Normalise
from trainers.data.sampler import EpochBatches
from trainers.loop import builders
from trainers.loop.losses import Targets
from trainers.loop.metrics import MetricsAccumulator
from trainers.loop.optimization import (
    BufferSnapshot,
    MaskEnforcer,
    Precision,
    freeze,
    make_optimizer,
    moving_average,
)
from trainers.loop.prune_step import Gradients, gradient_source, prunable_layers
from trainers.loop.report import EpochReport, KeptFigures, finite_numbers
from trainers.models import factory
from trainers.quantization.fake_quant import Prepared


@dataclass
class Session:
    """The state of one worker's run.

    Attributes:
        job: what is done.
        device: of this worker.
        model: the timm model.
        network: what is trained: the model, in DDP with several workers, compiled if the recipe asks for it.
        model_args: keyword arguments with which timm builds the model.
        layers: the layers that the job prunes.
        costs: parameters and multiply-accumulates at any allocation.
        masks: of all layers with pruned weights; ``None``: the model is dense.
        optimizer: of the parameters that are trained.
        precision: of forward passes.
        average: the moving average of the model, if the recipe asks for one.
        targets: mixes images and labels.
        loss: of (outputs, targets, images).
        train: loader of this worker's training batches.
        normalise: makes images of the batches' pixels.
        sampler: of the training batches; its length is the number of steps of an epoch.
        images: the training images without augmentation.
        validation: loader of this worker's validation batches.
        plan: the sparsity of each pruning step, by the optimizer step before which it is done.
        mask_enforcer: keeps pruned weights at zero.
        buffers: restores the buffers after a skipped step.
        prepared: the model with fake quantization, if it is trained for INT8.
        metrics: what is measured of the epoch so far.
        step: optimizer steps done.
        kept: figures of the best model at each sparsity that is kept.
        last: the last epoch's report.
        saved_at: time of the last checkpoint, in seconds of the monotonic clock.
        asked_at: time of the last question about preemption, likewise.
        look_at: step after which the workers look at the clock together.
        look_steps: steps between the last look and this one.
        looked_at: time of the last look.
        notice: the machines that the cluster named at that question.
    """

    job: TrainJob
    device: torch.device
    model: nn.Module
    network: nn.Module
    model_args: dict[str, Any]
    layers: list[PrunableLayer]
    costs: CostModel
    masks: MaskSet | None
    optimizer: torch.optim.Optimizer
    precision: Precision
    average: ModelEmaV3 | None
    targets: Targets
    loss: Callable[[Any, Tensor, Tensor], Tensor]
    train: datasets.Batches
    normalise: Normalise
    sampler: EpochBatches
    images: datasets.ImageTable
    validation: datasets.Batches
    plan: dict[int, float]
    mask_enforcer: MaskEnforcer
    buffers: BufferSnapshot
    prepared: Prepared | None = None
    metrics: MetricsAccumulator = field(default_factory=MetricsAccumulator)
    step: int = 0
    kept: dict[str, KeptFigures] = field(default_factory=dict)
    last: EpochReport = field(default_factory=EpochReport)
    saved_at: float = field(default_factory=time.monotonic)
    asked_at: float = field(default_factory=time.monotonic)
    look_at: int = 0
    look_steps: int = 1
    looked_at: float = field(default_factory=time.monotonic)
    notice: str | None = None

    @classmethod
    def open(
        cls,
        job: TrainJob,
        device: torch.device,
        resume: Path | None = None,
        branch: Path | None = None,
    ) -> Session:
        """Build everything that a job needs.

        Args:
            job: what to do.
            device: of this worker.
            resume: a checkpoint folder of this job to resume from.
            branch: where there is none, the checkpoint folder of the job's ``origin`` to start from.

        Returns:
            The session at its first step, or at the step of the checkpoint.

        Raises:
            InputError: a part of the job that cannot be used.
        """
        torch.set_num_threads(job.threads)
        training = job.training
        seed_everything(job.seed)
        source = resume or branch
        model, args, masks = builders.load_model(job, source)
        builders.name_classes(job, model)
        layers = prunable_layers(model, job.pruning) if job.pruning else []
        if job.pruning is not None:
            masks = builders.initial_masks(model, layers, masks)
        prunes = job.pruning is not None and job.pruning.schedule.kind != "constant"
        freeze(model, training.freeze, layers if prunes else [])
        model.to(device)
        masks = None if masks is None else masks.to(device)  # a checkpoint's are read on the CPU
        if training.channels_last:
            model.to(memory_format=torch.channels_last)
        precision = Precision(training.precision, device)
        targets = Targets(training, factory.classes(model))
        loss = builders.make_loss(job, model, targets.loss, precision)
        config = factory.data_config(model)
        plain = datasets.eval_transform(config)
        world, rank = distributed.world_size(), distributed.rank()
        images = datasets.split(job.data, "train", plain, job.seed)
        train, sampler = datasets.train_loader(
            images,
            Augment(config, training.augment),
            training.batch_size,
            rank=rank,
            world=world,
            seed=job.seed,
            processes=training.data_workers,
            pin=device.type == "cuda",
            normed=factory.batch_normed(model),
        )
        prepared = builders.prepare_for_int8(job, model, images, source)
        session = cls(
            job=job,
            device=device,
            model=model,
            network=builders.wrap_network(job, model if prepared is None else prepared, device),
            model_args=args,
            layers=layers,
            costs=cost_model(model, factory.input_size(model)),
            masks=masks,
            optimizer=make_optimizer(training, model),
            precision=precision,
            average=moving_average(model, training.ema),
            targets=targets,
            loss=loss,
            train=train,
            normalise=Normalise(config, training.augment, device),
            sampler=sampler,
            images=images,
            validation=datasets.eval_loader(
                datasets.split(job.data, "validation", plain, job.seed), 128, rank, world
            ),
            plan=builders.pruning_steps(job, masks and masks.of(layers), len(sampler)),
            mask_enforcer=MaskEnforcer(model, masks),
            buffers=BufferSnapshot(model if prepared is None else prepared),
            prepared=prepared,
        )
        if source is not None:
            session._restore(source, branches=resume is None)
        return session

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that the optimizer updates."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.step // len(self.sampler)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.job.training.epochs * len(self.sampler)

    @property
    def target(self) -> float:
        """The sparsity that the latest pruning step should reach; 0 before the first one."""
        if self.job.pruning is not None and not self.plan:
            return self.job.pruning.sparsity
        return max((sparsity for step, sparsity in self.plan.items() if step < self.step), default=0.0)

    @property
    def pruned_weights(self) -> dict[str, int]:
        """Number of pruned weights of each layer."""
        return self.masks.pruned() if self.masks is not None else {}

    @property
    def layer_masks(self) -> MaskSet:
        """Masks of the layers that the job prunes."""
        if self.masks is None:
            return MaskSet.dense(self.model, self.layers)
        return self.masks.of(self.layers)

    @property
    def sparsity(self) -> float:
        """Share of zeros in the layers that the job prunes; if it prunes none, in all layers with masks."""
        if self.masks is None:
            return 0.0
        return self.layer_masks.sparsity if self.layers else self.masks.sparsity

    @property
    def shown(self) -> nn.Module:
        """The model that is saved and evaluated: the moving average, if there is one."""
        return self.model if self.average is None else self.average.module

    @property
    def evaluated(self) -> nn.Module:
        """The model to evaluate: :attr:`shown`, or the model with fake quantization in training for INT8."""
        return self.shown if self.prepared is None else self.prepared

    def check_finite(self) -> None:
        """Check that the weights of the model and of its average are finite.

        Raises:
            FloatingPointError: one is not; raised on every worker.
        """
        models = [self.model] if self.shown is self.model else [self.model, self.shown]
        for model in models:
            check_finite(model.state_dict(), f"after step {self.step - 1}")

    def gradients(self, pruner: Pruner, settings: PruningSettings, skip: int) -> Gradients:
        """This worker's gradients for a round of a pruning step.

        Args:
            pruner: the method.
            settings: of the round.
            skip: number of gradients that earlier rounds used.
        """
        tries = self.job.method is not None and settings.tries_damps(self.job.method)
        return gradient_source(
            self.images,
            settings.fisher,
            pruner,
            tries_damps=tries,
            rank=distributed.rank(),
            world=distributed.world_size(),
            seed=self.job.seed + self.epoch,
            skip=skip,
        )

    def images_to_solve_on(self, count: int) -> list[Tensor]:
        """This worker's batches of the first images of a pruning step, for its reconstruction."""
        return datasets.first_images(
            self.images,
            count,
            rank=distributed.rank(),
            world=distributed.world_size(),
            seed=self.job.seed + self.epoch,
        )

    def pruned(self, masks: MaskSet) -> None:
        """Take over the masks of a pruning step.

        The optimizer's moments of pruned weights, or all of them, are reset, and the moving average restarts.
        """
        self.masks = masks = masks.over(self.masks)  # layers that this job does not prune keep their masks
        self.mask_enforcer = MaskEnforcer(self.model, masks)
        if self.job.training.moments == "reset":
            self.optimizer.state.clear()
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for parameter, entries in self.optimizer.state.items():
            for moment in entries.values():
                if torch.is_tensor(moment) and moment.shape == parameter.shape:
                    masks.mask_({names[id(parameter)]: moment})
        if self.average is not None:
            self.average.set(self.model)

    @property
    def recovery_epochs(self) -> int:
        """Epochs since the latest pruning step."""
        before = max((step for step in self.plan if step < self.step), default=0)
        return self.epoch - before // len(self.sampler)

    def save(self, folder: Path, figures: Mapping[str, object], *, whole: bool = True) -> None:
        """Write the checkpoint folder.

        Args:
            folder: made if need be.
            figures: of the model; the numbers among them are recorded.
            whole: with the state of training, for resuming.
        """
        pruned = self.pruned_weights
        recorded = {"seed", "training", "pruning"} | (set() if self.job.quantize is None else {"quantize"})
        record: PruningRecord = {
            "method": self.job.method or "dense",
            "sparsity": self.sparsity,
            "allocation": pruned,
            "figures": finite_numbers(figures),
            "costs": self.costs.at(pruned).as_dict(),
            "recipe": self.job.model_dump(mode="json", include=recorded),
        }
        save_checkpoint(
            folder,
            self.shown,
            model_args=self.model_args,
            masks=self.masks,
            record={**record, **self.job.lineage},
            ranges=None if self.prepared is None else self.prepared.ranges(),
        )
        if not whole:
            return
        tensors, optimizer = trainer_state.flatten_optimizer(self.optimizer.state_dict())
        tensors = {f"optimizer/{key}": tensor for key, tensor in tensors.items()}
        if self.average is not None:
            tensors |= {f"model/{key}": tensor for key, tensor in self.model.state_dict().items()}
        progress = {
            "step": self.step,
            "optimizer": optimizer,
            "scaler": self.precision.scaler.state_dict(),
            "meter": self.metrics.state(),
            "kept": self.kept,
            "last": self.last,
            "job": trainer_state.identity(self.job),
        }
        trainer_state.write_state(folder, tensors, progress)

    def _restore(self, folder: Path, *, branches: bool) -> None:
        """Restore the state of a checkpoint folder.

        Args:
            branches: it is a checkpoint of another run: some settings may differ, and its best models are not
                those of this run.
        """
        tensors, progress = trainer_state.read_state(folder)
        differs = self.job.origin.differs if branches and self.job.origin else ()
        trainer_state.check_identity(self.job, progress["job"], differs)
        if self.average is not None:
            # the weights of the folder's model are those of the moving average
            trained = {
                key.removeprefix("model/"): tensor
                for key, tensor in tensors.items()
                if key.startswith("model/")
            }
            self.model.load_state_dict(trained)
        moments = {
            key.removeprefix("optimizer/"): tensor
            for key, tensor in tensors.items()
            if key.startswith("optimizer/")
        }
        groups = self.optimizer.state_dict()["param_groups"]
        own = trainer_state.GROUP_SETTINGS if branches else ()
        self.optimizer.load_state_dict(
            trainer_state.unflatten_optimizer(moments, progress["optimizer"], groups, own)
        )
        self.precision.scaler.load_state_dict(progress["scaler"])
        self.metrics = MetricsAccumulator.restored(progress["meter"])
        self.step, self.kept, self.last = progress["step"], progress["kept"], progress["last"]
        if branches:  # the kept models are in the other run's folder
            self.kept, self.last = {}, self.last | {"kept": {}}


def seed_everything(*parts: int) -> None:
    """Seed the generators of Python, numpy and torch from several numbers (seed, step, rank)."""
    seed = int(np.random.SeedSequence([abs(part) for part in parts]).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
