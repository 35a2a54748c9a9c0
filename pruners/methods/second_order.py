"""What methods with a Fisher share: layers cut into blocks, worked on in chunks, merged by their losses."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pruners.allocation.sharing import Scope
from pruners.elimination.fisher import BlockFisher, to_blocks
from pruners.elimination.obs import Columns
from pruners.elimination.order import EliminationOrder, LayerOrder, Stretch
from pruners.errors import InputError
from pruners.model.layers import PrunableLayer
from pruners.model.sparsity_pattern import UNSTRUCTURED, Pattern

# numbers of the inverses that are worked on at a time: what caches hold on a CPU, a GPU's share of its memory
_WORKING = {"cpu": 6_000_000, "cuda": 250_000_000}
_DEEPER = 1.15  # how much further than the mean a pass goes, as blocks do not lose the same share
_LEAST = 8  # units that a pass goes at least


@dataclass(frozen=True)
class SecondOrder(ABC):
    """Methods that follow gradients, by a Fisher of blocks of B consecutive weights.

    Args:
        block_size: B, weights treated as correlated (192 for ViTs, 256 for ResNet-50d, 16 for EfficientNet);
            one for all layers, or one for each module by name.
        damp: λ, added to the diagonal of the Fisher; the touchiest parameter of these methods.
        relative: λ is a share of the mean of each layer's diagonal.
        gradients: m, how many gradients are taken unless it is said otherwise.
        pattern: ``unstructured``, ``2:4``, ``4:8``, ``1x4``.
        double: sums in float64 (twice the memory).
    """

    block_size: int | Mapping[str, int] = 192
    damp: float = 1e-8
    relative: bool = False
    gradients: int = 4096
    pattern: str = "unstructured"
    double: bool = False
    scope: Scope = "global"
    name: str = ""
    form: Pattern = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "form", Pattern.parse(self.pattern))

    def fisher(self, layers: Sequence[PrunableLayer]) -> BlockFisher:
        return BlockFisher(
            layers,
            block_size=self.block_size,
            damp=self.damp,
            relative=self.relative,
            pattern=self.form,
            dtype=torch.float64 if self.double else torch.float32,
        )

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
        """The order of the layers' weights, at least as deep as ``depth`` of each layer.

        Args:
            known: an order of the same weights, masks and Fisher, to go on from.
        """
        if fisher is None:
            raise InputError("fisher", None, f"{self.name} needs a Fisher with gradients")
        fisher.flush()
        orders = EliminationOrder()
        for layer in layers:
            task = Task.of(layer, weights[layer.name], masks[layer.name], fisher, self.form)
            target = math.ceil(depth * layer.numel - 1e-6)
            found = None if known is None else known.get(layer.name)
            least = _LEAST
            while found is None or len(found.indices) < min(target, task.most):
                share = (target - (0 if found is None else len(found.indices))) / layer.numel
                units = max(math.ceil(min(1.0, _DEEPER * share) * task.size / self.form.unit), least)
                least = 2 * units  # a pass ends where the first block does not know what falls next
                before = -1 if found is None else len(found.indices)
                found = self.deepen(task, found, units * self.form.unit)
                if len(found.indices) == before:
                    expected = f"gives no finite losses for {layer.name}"
                    raise InputError("damp", fisher.damping(layer.name), expected)
            orders[layer.name] = self.priced(found, task)
        return orders

    @abstractmethod
    def deepen(self, task: Task, known: LayerOrder | None, steps: int) -> LayerOrder:
        """An order that goes up to ``steps`` further in every block."""

    def priced(self, order: LayerOrder, task: Task) -> LayerOrder:
        """The order with the prices by which layers are compared, if they are not its losses."""
        return order


@dataclass(frozen=True)
class Task:
    """One layer to be ordered: flat weights (d,), which of them are ``alive`` (neither pruned nor zero)."""

    layer: PrunableLayer
    weight: Tensor
    pruned: Tensor
    alive: Tensor
    fisher: BlockFisher
    pattern: Pattern
    size: int
    most: int

    @classmethod
    def of(
        cls, layer: PrunableLayer, weight: Tensor, mask: Tensor, fisher: BlockFisher, pattern: Pattern
    ) -> Task:
        flat = pattern.flat(weight.detach()).float()
        kept = pattern.flat(mask)
        alive = kept & (flat != 0)  # a zero weight falls first, at no loss
        pattern.check_zeros(layer.name, alive)
        most = layer.numel
        if pattern.forced is not None:
            most = int(pattern.room(alive).sum() + (~alive).sum())
        size = fisher.block_size(layer.name)
        return cls(layer, flat, ~kept, alive, fisher, pattern, size, most)

    def start(self) -> LayerOrder:
        """What is zero already: the pruned first, then weights that happen to be zero."""
        zeros = torch.cat([self.pruned.nonzero(), (~self.alive & ~self.pruned).nonzero()]).reshape(-1)
        losses = torch.zeros(len(zeros), dtype=torch.float64, device=zeros.device)
        return LayerOrder(zeros.int(), losses, len(zeros), (), self.size, self.pattern)


@dataclass(frozen=True)
class Chunk:
    """Some blocks of a layer: ``slots`` (n, r) of them are worked on, with ``alive`` (n, r) of them alive."""

    part: slice
    slots: Tensor
    alive: Tensor
    weights: Tensor
    inverse: Tensor


@dataclass(frozen=True)
class Steps:
    """(n, steps) positions in the block that fell, and losses; ``inf`` where nothing did."""

    places: Tensor
    losses: Tensor

    def padded(self, steps: int) -> Steps:
        more = (0, steps - self.places.shape[1])
        pad = torch.nn.functional.pad
        return Steps(pad(self.places, more), pad(self.losses, more, value=torch.inf))


@dataclass(frozen=True)
class State:
    """Where an elimination stands: (n, B) weights and what is alive of them; (n,) losses and steps so far."""

    weight: Tensor
    alive: Tensor
    losses: Tensor
    fallen: Tensor
    closed: tuple[Stretch, ...]

    @classmethod
    def after(cls, task: Task, known: LayerOrder) -> State:
        """``closed``: the stretches of ``known``, which count no further than it goes."""
        count = len(known.indices)
        unpatterned = replace(known, pattern=UNSTRUCTURED)  # the task is flat already
        weight = unpatterned.weight(task.weight, count) if count > known.zeros else task.weight
        alive = task.alive.clone()
        alive[known.indices.long()] = False
        blocks = -(-task.layer.numel // task.size)
        losses = torch.zeros(blocks, dtype=torch.float64, device=weight.device)
        of_block = known.indices[known.zeros :].long() // task.size
        losses.scatter_reduce_(0, of_block, known.losses[known.zeros :], "amax")
        fallen = torch.bincount(of_block, minlength=blocks)
        closed = tuple(
            one if one.end is not None else replace(one, end=fallen[one.block : one.block + len(one.columns)])
            for one in known.updates
        )
        return cls(to_blocks(weight, task.size).double(), to_blocks(alive, task.size), losses, fallen, closed)


def chunks(task: Task, weight: Tensor, alive: Tensor) -> Iterator[Chunk]:
    """A layer's blocks, as many at a time as fit; only what is alive in them is worked on."""
    working = _WORKING.get(weight.device.type, _WORKING["cuda"])
    rows = max(int(alive.sum(1).max()), 1)
    together = max(1, working // rows**2)
    for start in range(0, len(weight), together):
        part = slice(start, min(start + together, len(weight)))
        here = alive[part]
        left = max(int(here.sum(1).max()), task.pattern.unit)
        slots = (~here).byte().argsort(dim=1, stable=True)[:, :left]
        kept = here.gather(1, slots)
        inverse = task.fisher.inverse(task.layer.name, part, slots, kept)
        yield Chunk(part, slots, kept, weight[part].gather(1, slots), inverse)


def stretch_of(chunk: Chunk, columns: Columns, begin: int | Tensor) -> Stretch:
    slots = chunk.slots if columns.slots is None else chunk.slots.gather(1, columns.slots)
    y, places = columns.y.contiguous(), slots.short().contiguous()
    v = columns.v.mT.contiguous().mT
    return Stretch(chunk.part.start, begin, v, y, places, ranked=columns.ranked)


def merged(
    task: Task, known: LayerOrder, state: State, found: list[Steps], stretches: list[Stretch]
) -> LayerOrder:
    """The blocks' orders as one for the layer, by their losses, as far as every block knows its own."""
    unit = task.pattern.unit
    # what falls together counts when all of it has
    loss = torch.cat([steps.losses for steps in found])[:, unit - 1 :: unit]
    offsets = torch.arange(len(loss), device=loss.device).unsqueeze(1) * task.size
    places = (torch.cat([steps.places for steps in found]) + offsets).reshape(len(loss), -1, unit)
    unfinished = loss.isfinite().sum(1) * unit < room_of(task.pattern, state.alive).sum(1)
    limit = loss[unfinished][:, -1].min() if bool(unfinished.any()) else torch.inf
    # step-major, so that the stable sort keeps each block's own order among equal losses
    ranked, ranking = torch.sort(loss.T.reshape(-1), stable=True)
    ranked = ranked[ranked.isfinite() & (ranked <= limit)]
    fallen = places.transpose(0, 1).reshape(-1, unit)[ranking[: len(ranked)]].reshape(-1)
    return replace(
        known,
        indices=torch.cat([known.indices, fallen.int()]),
        losses=torch.cat([known.losses, ranked.repeat_interleave(unit)]),
        updates=tuple(stretches),
    )


def room_of(pattern: Pattern, alive: Tensor) -> Tensor:
    """How many more weights each group of (n, B) blocks may lose; a last group may reach into the padding."""
    if pattern.forced is None:
        return alive.long()
    short = -alive.shape[1] % pattern.group
    return pattern.room(torch.nn.functional.pad(alive, (0, short)))
