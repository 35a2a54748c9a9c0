"""What the speed benchmark measures with: layers, gradients, a clock, and the obvious way to compute oViT."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import timm
import torch
from torch import Tensor

from pruners import PrunableLayer, find_layers
from pruners.elimination.fisher import to_blocks

B = 192
DAMP = 1e-8
POOL = 64


def layer_sets(device: torch.device) -> dict[str, list[PrunableLayer]]:
    """Real layers by the name of their model."""
    with torch.device("meta"):
        small = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=192, depth=6, num_heads=3
        )
        deit = find_layers(timm.create_model("deit_small_patch16_224"))
        sets = {"vit 192×6": find_layers(small)}
        if device.type == "cuda":
            return sets | {"DeiT-B": find_layers(timm.create_model("deit_base_patch16_224"))}
    return sets | {"DeiT-S block": [layer for layer in deit if layer.name.startswith("blocks.0.")]}


@dataclass
class Problem:
    """Weights, and as many different gradients as are asked for, of a set of layers."""

    name: str
    layers: list[PrunableLayer]
    device: torch.device
    pool: list[dict[str, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        random = torch.Generator(self.device).manual_seed(0)

        def normal(layer: PrunableLayer) -> Tensor:
            return torch.randn(layer.shape, generator=random, device=self.device)

        self.weights = {layer.name: 0.05 * normal(layer) for layer in self.layers}
        self.masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in self.weights.items()}
        size = {
            layer.name: 1e-3 * torch.rand(layer.shape, generator=random, device=self.device)
            for layer in self.layers
        }
        common = {layer.name: normal(layer) for layer in self.layers}
        pool = POOL if self.numel < 10_000_000 else 4
        for _ in range(pool):  # correlated: some of every gradient is common to all
            share = torch.randn(1, generator=random, device=self.device)
            self.pool.append(
                {one.name: size[one.name] * (normal(one) + share * common[one.name]) for one in self.layers}
            )

    @property
    def numel(self) -> int:
        return sum(layer.numel for layer in self.layers)

    def gradients(self, first: int, last: int) -> Iterator[dict[str, Tensor]]:
        """Gradients by number; beyond the pool the same ones, shifted."""
        for number in range(first, last):
            gradient = self.pool[number % len(self.pool)]
            shift = 7 * (number // len(self.pool))
            yield {name: one.roll(shift) for name, one in gradient.items()} if shift else gradient

    def blocks(self, tensors: dict[str, Tensor]) -> Tensor:
        """All layers' blocks as one (n, B)."""
        return torch.cat([to_blocks(tensors[layer.name].reshape(-1), B) for layer in self.layers])


class Clock:
    """Seconds of a piece of work, when the device has done it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spent = 0.0

    def __enter__(self) -> Clock:
        self._sync()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self._sync()
        self.spent += time.perf_counter() - self._start

    def _sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def matrix_rate(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Operations a second of the machine's own matrix product."""
    size = 4096 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)
    times = []
    for _ in range(5):
        with Clock(device) as clock:
            torch.mm(a, a, out=out)
        times.append(clock.spent)
    return 2 * size**3 / min(times)


def bandwidth(device: torch.device) -> float:
    """Bytes a second of a copy (read and written)."""
    a = torch.ones(1 << 28, device=device)
    out = torch.empty_like(a)
    times = []
    for _ in range(4):
        with Clock(device) as clock:
            out.copy_(a)
        times.append(clock.spent)
    return 2 * a.nbytes / min(times)


class Obvious:
    """Rank-one updates of the inverse, then a full downdate for each weight (METHODS: oViT 1 and 2)."""

    def __init__(self, blocks: int, device: torch.device, dtype: torch.dtype = torch.float64) -> None:
        self.inverse = torch.eye(B, dtype=dtype, device=device).repeat(blocks, 1, 1) / DAMP

    def add(self, gradient: Tensor, count: int) -> None:
        g = gradient.to(self.inverse.dtype).unsqueeze(2)
        u = torch.bmm(self.inverse, g)
        scale = torch.bmm(g.transpose(1, 2), u).add_(count)
        self.inverse.baddbmm_(u / scale, u.transpose(1, 2), alpha=-1)

    def eliminate(self, weights: Tensor, steps: int = B) -> Tensor:
        """(n, steps): the weights of each block as they fall."""
        w = weights.to(self.inverse.dtype).clone()
        rows = torch.arange(len(w), device=w.device)
        left = torch.ones_like(w, dtype=torch.bool)
        order = []
        diagonal = self.inverse.diagonal(dim1=1, dim2=2)
        for _ in range(steps):
            pivot = (w.square() / diagonal).masked_fill_(~left, torch.inf).argmin(1)
            column = self.inverse[rows, :, pivot]
            at = column[rows, pivot].unsqueeze(1)
            w -= column * (w[rows, pivot].unsqueeze(1) / at)
            self.inverse.baddbmm_((column / at).unsqueeze(2), column.unsqueeze(1), alpha=-1)
            left[rows, pivot] = False
            order.append(pivot)
        return torch.stack(order, 1)
