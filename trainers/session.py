"""What one worker holds during a run: opened from a job, saved to a checkpoint folder, restored from it."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pruners.base import Pruner
from pruners.costs import count_costs
from pruners.errors import InputError
from pruners.layers import PrunableLayer
from pruners.masks import MaskSet
from trainers import checkpoint as folder_format
from trainers import data, distributed, models
from trainers.checkpoint import load_checkpoint, save_checkpoint
from trainers.config import TrainJob
from trainers.prune_step import Gradients, gradient_source, prunable_layers
from trainers.storage import local_copy

STATE, PROGRESS = "trainer.safetensors", "trainer.json"


@dataclass
class Session:
    """One worker's run. ``model`` is the bare model, ``network`` what is trained (DDP around it)."""

    job: TrainJob
    model: nn.Module
    network: nn.Module
    model_args: dict[str, Any]
    layers: list[PrunableLayer]
    masks: MaskSet | None
    optimizer: torch.optim.Optimizer
    train: data.Batches
    validation: data.Batches
    gradient_images: torch.utils.data.Dataset[tuple[Tensor, int]]
    device: torch.device
    epoch: int = 0
    lineage: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, job: TrainJob, device: torch.device, resume: Path | None = None) -> Session:
        """Build everything that the job names; with ``resume`` go on from a checkpoint folder of ours.

        Raises:
            InputError: whatever of the job cannot be used.
        """
        torch.set_num_threads(job.threads)
        world = distributed.world_size()
        batch = job.training.batch_size
        if batch % world:
            raise InputError("training.batch_size", batch, f"must be a multiple of the {world} workers")
        seed_everything(job.seed)
        model, args, masks = _load(job, resume)
        model.to(device)
        network = (
            DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
            if distributed.active()
            else model
        )
        config = models.data_config(model)
        plain = data.eval_transform(config)
        session = cls(
            job=job,
            model=model,
            network=network,
            model_args=args,
            layers=prunable_layers(model, job.pruning) if job.pruning else [],
            masks=masks,
            optimizer=_optimizer(job, model),
            train=data.train_loader(
                data.split(job.data, "train", data.train_transform(config, job.training.augment), job.seed),
                batch // world,
                rank=distributed.rank(),
                world=world,
                seed=job.seed,
                processes=job.training.data_workers,
            ),
            validation=data.eval_loader(
                data.split(job.data, "validation", plain, job.seed), 128, distributed.rank(), world
            ),
            gradient_images=data.split(job.data, "train", plain, job.seed),
            device=device,
        )
        if resume is not None:
            session._restore(resume)
        return session

    def gradients(self, pruner: Pruner, epoch: int) -> Gradients:
        """This worker's gradients for a pruning step."""
        settings = self.job.pruning
        assert settings is not None, "pruning settings ask for gradients"
        world, rank = distributed.world_size(), distributed.rank()
        tries = self.job.method is not None and settings.tries_damps(self.job.method)
        return gradient_source(
            self.gradient_images,
            settings.fisher,
            pruner,
            tries_damps=tries,
            rank=rank,
            world=world,
            seed=self.job.seed + epoch,
        )

    @property
    def sparsity(self) -> float:
        return self.masks.sparsity if self.masks is not None else 0.0

    def mask_moments(self) -> None:
        """What the optimizer remembers of pruned weights is forgotten."""
        if self.masks is None:
            return
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for parameter, state in self.optimizer.state.items():
            moments = {key: value for key, value in state.items() if torch.is_tensor(value)}
            for moment in moments.values():
                if moment.shape == parameter.shape:
                    self.masks.mask_({names[id(parameter)]: moment})

    def save(self, folder: Path, metrics: dict[str, float]) -> None:
        """Write the checkpoint folder, with what is needed to go on from it."""
        pruned = self.masks.pruned() if self.masks is not None else {}
        record = {
            "method": self.job.method or "dense",
            "sparsity": self.sparsity,
            "allocation": pruned,
            "figures": metrics,
            "costs": count_costs(self.model, models.input_size(self.model), pruned).as_dict(),
            "recipe": self.job.model_dump(mode="json", include={"seed", "training", "pruning"}),
            **self.job.lineage,
        }
        save_checkpoint(folder, self.model, model_args=self.model_args, masks=self.masks, record=record)
        tensors, plain = _flatten(self.optimizer.state_dict())
        save_file(tensors, folder / STATE)
        # some optimizers count their steps in the parameter groups
        groups = [
            {key: _plain(value) for key, value in group.items() if key != "params"}
            for group in self.optimizer.state_dict()["param_groups"]
        ]
        progress = {"epoch": self.epoch, "optimizer": plain, "groups": groups}
        (folder / PROGRESS).write_text(json.dumps(progress))

    def _restore(self, folder: Path) -> None:
        progress = json.loads((folder / PROGRESS).read_text())
        state = self.optimizer.state_dict()
        self.optimizer.load_state_dict(
            _unflatten(
                load_file(folder / STATE),
                progress["optimizer"],
                [new | old for new, old in zip(state["param_groups"], progress["groups"], strict=True)],
            )
        )
        self.epoch = progress["epoch"]


def seed_everything(*parts: int) -> None:
    """Seed every source of randomness from some numbers (seed, epoch, rank)."""
    seed = int(np.random.SeedSequence([abs(part) for part in parts]).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _load(job: TrainJob, resume: Path | None) -> tuple[nn.Module, dict[str, Any], MaskSet | None]:
    source = str(resume) if resume is not None else job.model.checkpoint
    if source is None:
        arguments = dict(job.model.args)
        return models.build_model(job.model, job.data), arguments, None
    loaded = load_checkpoint(source, layers=job.pruning.layers if job.pruning else None)
    if source.startswith("hf-hub:"):
        return loaded.model, {}, loaded.masks
    with local_copy(source) as folder:
        return loaded.model, folder_format.model_args(folder), loaded.masks


def _optimizer(job: TrainJob, model: nn.Module) -> torch.optim.Optimizer:
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model, job.training.optimizer, lr=job.training.lr.peak, weight_decay=job.training.weight_decay
        )
        return optimizer
    except (ValueError, AssertionError) as error:
        raise InputError("training.optimizer", job.training.optimizer, str(error)) from None


def _flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of an optimizer's state by ``number/key``, and the rest as JSON can hold it."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for number, values in state["state"].items():
        for key, value in values.items():
            if torch.is_tensor(value):
                tensors[f"{number}/{key}"] = value.contiguous()
            else:
                plain[f"{number}/{key}"] = value
    return tensors, plain


def _unflatten(
    tensors: dict[str, Tensor], plain: dict[str, Any], groups: list[dict[str, Any]]
) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for place, value in {**plain, **tensors}.items():
        number, key = place.split("/", 1)
        state.setdefault(int(number), {})[key] = value
    return {"state": state, "param_groups": groups}


def _plain(value: Any) -> Any:
    return value.item() if torch.is_tensor(value) else value
