"""Pruning steps that the tests of several workers run: in one process, and in each of several."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from helpers import CONVOLUTIONS, batches, tiny_conv, tiny_swin
from safetensors.torch import save_file
from torch import Tensor

from pruners import METHODS, InputError, MaskSet, PrunableLayer, Pruner, Sharing, create_pruner, find_layers
from pruners.elimination.fisher import BlockFisher
from pruners.elimination.gradients import Batch
from pruners.elimination.memory import fisher_bytes
from pruners.elimination.order import EliminationOrder
from pruners.methods.ovit import OViT
from trainers import distributed
from trainers.config.pruning import FisherSettings
from trainers.data.datasets import first_images
from trainers.loop.prune_step import (
    Goal,
    Gradients,
    gradient_source,
    ordering,
    prune_step,
    reconstruct_step,
)

HELD_OUT = batches(13)[8:]


@dataclass(frozen=True)
class FailsOnOne(OViT):
    """λ = 1e-6 is too small on the first worker alone."""

    name: str = "fails on one"

    def order(
        self,
        weights: Mapping[str, Tensor],
        layers: Sequence[PrunableLayer],
        masks: Mapping[str, Tensor],
        fisher: BlockFisher | None,
        *,
        depth: float = 1.0,
        known: EliminationOrder | None = None,
    ) -> EliminationOrder:
        if self.damp == 1e-6 and distributed.rank() == 0:
            raise InputError("damp", self.damp, "too small")
        return super().order(weights, layers, masks, fisher, depth=depth, known=known)


@dataclass(frozen=True)
class Case:
    """A run of some pruning steps, whoever shares the work."""

    pruner: Pruner
    steps: tuple[float, ...] = (0.4, 0.7)
    sharing: Sharing | None = None
    given: int = 8
    auto: bool = False
    per_sample: int | None = None
    memory: int | None = None
    convolutions: bool = False
    reconstruct: bool = False

    def source(self, rank: int, world: int) -> Gradients:
        def shard(every: Sequence[Batch]) -> Callable[[], Iterable[Batch]]:
            return lambda: iter(every[rank::world])

        if self.per_sample is not None:
            settings = FisherSettings(gradients=self.per_sample, batch_size=4, per_sample=True)
            return gradient_source(
                Images(), settings, self.pruner, tries_damps=False, rank=rank, world=world, seed=3
            )
        held_out = shard(HELD_OUT) if self.auto else None
        return Gradients(shard(batches(8)[: self.given]), held_out=held_out, memory=self.memory)

    def run(self, rank: int, world: int) -> dict[str, Tensor]:
        """Weights (``w:``), masks (``m:``), and the curve (``damp:``) after the last step."""
        model = tiny_conv() if self.convolutions else tiny_swin()
        layers = find_layers(model, CONVOLUTIONS if self.convolutions else None)
        masks = MaskSet.dense(model, layers)
        numel = sum(layer.numel for layer in layers)
        curve = {}
        for number, sparsity in enumerate(self.steps):
            source = self.source(rank, world)
            sharing = self.sharing or Sharing(self.pruner.scope, 0.1, 0.95)
            total = round(sparsity * numel / 4) * 4
            work = ordering(model, layers, masks, self.pruner, source)
            before = copy.deepcopy(model)
            report = prune_step(work, source, Goal(total, sharing))
            masks = report.masks
            if self.reconstruct:
                images = first_images(Images(), 21, rank=rank, world=world, seed=3)
                done = reconstruct_step(model, before, layers, masks, images)
                curve[f"images:{number}"] = torch.tensor(done.images)
            if report.damp is not None:
                curve[f"damp:{number}"] = torch.tensor(list(report.damp.losses.values()))
                curve[f"chosen:{number}"] = torch.tensor(report.damp.damp)
        weights = {f"w:{name}": value.clone() for name, value in model.state_dict().items()}
        return weights | {f"m:{name}": mask for name, mask in masks.items()} | curve


class Images(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Those of eight batches, one by one."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = batches(8)[index // 4]
        return images[index % 4], int(labels[index % 4])


SMALL = fisher_bytes(PrunableLayer("", "", 0, (16, 64)), 16)  # two groups of layers
OVIT = OViT(block_size=16, damp=1e-4)


def made(name: str) -> Pruner:
    if not create_pruner(name).gradients:
        return create_pruner(name)
    damp = 1e-2 if name == "ovit_fast" else 1e-4  # the former relative
    return create_pruner(name, block_size=16, damp=damp)


CASES: dict[str, Case] = {
    **{name: Case(made(name)) for name in METHODS},
    "layer": Case(OVIT, sharing=Sharing("layer")),
    "module": Case(OVIT, sharing=Sharing("module", floor={r"mlp\.fc1": 0.2})),
    "table": Case(OVIT, sharing=Sharing(table={r"attn\..*": 0.2, r"mlp\..*": 0.6})),
    "2:4": Case(replace(OVIT, pattern="2:4"), steps=(0.3, 0.5), sharing=Sharing("global"), convolutions=True),
    "1x4": Case(replace(OVIT, pattern="1x4"), convolutions=True),
    "double": Case(replace(OVIT, double=True)),
    "relative": Case(replace(OVIT, damp=1e-2, relative=True)),
    "fewer batches than workers": Case(OVIT, given=3),
    "single images": Case(OVIT, per_sample=18),  # four batches and a half
    "fewer images than workers": Case(OVIT, per_sample=6),
    "several passes": Case(OVIT, memory=SMALL),
    "auto": Case(OVIT, steps=(0.6,), auto=True),
    "auto in several passes": Case(OVIT, steps=(0.6,), auto=True, memory=SMALL),
    "reconstructed": Case(OVIT, reconstruct=True),
    "reconstructed convolutions": Case(create_pruner("lamp"), convolutions=True, reconstruct=True),
    "a λ fails on one": Case(FailsOnOne(block_size=16), steps=(0.6,), auto=True),
    "a λ fails on one in several passes": Case(
        FailsOnOne(block_size=16), steps=(0.6,), auto=True, memory=SMALL
    ),
}


def work(rank: int, world: int, folder: str) -> None:
    """What one worker of several does: all cases, its results in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world)
    try:
        results = {name: case.run(rank, world) for name, case in CASES.items()}
        flat = {f"{name}|{key}": tensor for name, named in results.items() for key, tensor in named.items()}
        save_file(flat, f"{folder}/{world}-{rank}.safetensors")
    finally:
        dist.destroy_process_group()
