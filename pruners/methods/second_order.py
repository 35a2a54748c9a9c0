"""The base of methods with a Fisher: blocks of a layer, eliminated in chunks, merged by their losses."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from pruners.allocation.sharing import Scope
from pruners.arithmetic import ceil_div
from pruners.elimination.fisher import BlockFisher, SumsOfGradients, to_blocks
from pruners.elimination.kernels import tiles
from pruners.elimination.obs import Elimination
from pruners.elimination.order import EliminationOrder, LayerOrder
from pruners.elimination.updates import UpdateSegment
from pruners.errors import InputError
from pruners.model.layers import PrunableLayer
from pruners.model.sparsity_pattern import UNSTRUCTURED, Pattern

# Numbers of the inverses of a chunk: as many as the caches of a CPU hold, or a share of a GPU's memory.
_WORKING = {"cpu": 6_000_000, "cuda": 250_000_000}
_MARGIN = 1.15  # a pass computes more steps than the mean of all blocks, as some blocks lose more than others
_LEAST = 8  # units that a pass computes at least


@dataclass(frozen=True)
class SecondOrder(ABC):
    """Base class of methods with a block-diagonal Fisher over B consecutive weights.

    Args:
        block_size: B, weights treated as correlated (192 for ViTs, 256 for ResNet-50d, 16 for EfficientNet);
            one for all layers, or one for each module by name.
        damp: λ, added to the diagonal of the Fisher. Results depend on it more than on anything else here.
        relative: whether λ is a share of the mean of each layer's diagonal.
        gradients: m, the default number of gradients.
        pattern: ``unstructured``, ``2:4``, ``4:8``, ``1x4``.
        double: sums in float64, which takes twice the memory.
        scope: which layers share one threshold.
        name: of the method.

    Raises:
        InputError: an unknown pattern.
    """

    block_size: int | Mapping[str, int] = 192
    damp: float = 1e-8
    relative: bool = False
    gradients: int = 4096
    pattern: str = "unstructured"
    double: bool = False
    scope: Scope = "global"
    name: str = ""
    sparsity_pattern: Pattern = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity_pattern", Pattern.parse(self.pattern))

    def fisher(self, layers: Sequence[PrunableLayer]) -> BlockFisher:
        """A Fisher of some layers, without gradients so far."""
        return BlockFisher(
            layers,
            block_size=self.block_size,
            damp=self.damp,
            relative=self.relative,
            pattern=self.sparsity_pattern,
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
        """Put the weights of each layer in the order of their elimination.

        Args:
            weights: current weights, by parameter name.
            layers: the layers to order.
            masks: by parameter name; pruned weights (``False``) come first, at no loss.
            fisher: what :meth:`fisher` returned, with gradients.
            depth: how far the order goes at least, as a sparsity of each layer.
            known: an order of the same weights, masks and Fisher, to continue.

        Returns:
            The order of each layer.

        Raises:
            InputError: there is no Fisher or no gradient, λ is too small, or the zeros of a layer do not
                keep the pattern.
        """
        if fisher is None:
            raise InputError("fisher", None, f"{self.name} needs a Fisher with gradients")
        fisher.flush()
        orders = EliminationOrder()
        pattern = self.sparsity_pattern
        for layer in layers:
            task = Task.of(layer, weights[layer.name], masks[layer.name], fisher, pattern)
            target = math.ceil(depth * layer.numel - 1e-6)
            order = None if known is None else known.get(layer.name)
            least = _LEAST
            while order is None or len(order.indices) < min(target, task.most):
                share = (target - (0 if order is None else len(order.indices))) / layer.numel
                units = max(math.ceil(min(1.0, _MARGIN * share) * task.size / pattern.unit), least)
                least = 2 * units  # a pass ends as soon as one block has used up its computed steps
                before = -1 if order is None else len(order.indices)
                order = self.extend(task, order, units * pattern.unit)
                if len(order.indices) == before:
                    expected = f"gives no finite losses for {layer.name}"
                    raise InputError("damp", fisher.damping(layer.name), expected)
            orders[layer.name] = self.with_scores(order, task)
        return orders

    @abstractmethod
    def extend(self, task: Task, known: LayerOrder | None, steps: int) -> LayerOrder:
        """Compute further steps of the order of a layer.

        Args:
            task: the layer.
            known: its order so far; ``None`` at the beginning.
            steps: number of steps of each Fisher block at most.

        Returns:
            The longer order.
        """

    def with_scores(self, order: LayerOrder, task: Task) -> LayerOrder:
        """The order with the scores that layers are compared by, where those are not its losses."""
        return order


@dataclass(frozen=True)
class Task:
    """One layer to be ordered.

    Attributes:
        layer: the layer, of d weights.
        weight: (d,), in the order in which the pattern flattens them.
        pruned: (d,) bool, whether the mask says that a weight is pruned.
        alive: (d,) bool, whether a weight is neither pruned nor zero.
        fisher: the Fisher of the layer.
        pattern: the sparsity pattern.
        size: B, weights of a Fisher block.
        most: how many weights the pattern lets the layer lose.
    """

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
        """Prepare a layer.

        Args:
            layer: the layer.
            weight: its weights, in the layer's shape.
            mask: its mask (``True``: kept), in the layer's shape.
            fisher: the Fisher, with gradients.
            pattern: the sparsity pattern.

        Returns:
            The task.

        Raises:
            InputError: the layer's zeros do not keep a pattern of whole groups.
        """
        flat = pattern.flat(weight.detach()).float()
        kept = pattern.flat(mask)
        alive = kept & (flat != 0)  # a zero weight is eliminated first, at no loss
        pattern.check_zeros(layer.name, alive)
        most = layer.numel
        if pattern.forced is not None:
            most = int(pattern.room(alive).sum() + (~alive).sum())
        size = fisher.block_size(layer.name)
        return cls(layer, flat, ~kept, alive, fisher, pattern, size, most)

    def initial_order(self) -> LayerOrder:
        """The order before any step: pruned weights first, then other weights that are zero."""
        zeros = torch.cat([self.pruned.nonzero(), (~self.alive & ~self.pruned).nonzero()]).reshape(-1)
        losses = torch.zeros(len(zeros), dtype=torch.float64, device=zeros.device)
        return LayerOrder(zeros.int(), losses, len(zeros), (), self.size, self.pattern)


@dataclass(frozen=True)
class Chunk:
    """Some Fisher blocks of a layer that are worked on together, n of them with r weights each.

    Attributes:
        part: which blocks of the layer.
        slots: (n, r), positions in the block of the weights that are worked on.
        alive: (n, r) bool, which of these weights are alive.
        weights: (n, r).
        fisher: the Fisher of the layer.
        name: of the layer.
    """

    part: slice
    slots: Tensor
    alive: Tensor
    weights: Tensor
    fisher: BlockFisher
    name: str

    @cached_property
    def inverse(self) -> Tensor:
        """The inverse Fisher blocks (n, r, r), computed when they are first asked for."""
        return self.fisher.inverse(self.name, self.part, self.slots, self.alive)

    @property
    def sums(self) -> SumsOfGradients | None:
        """The sums from which the compiled loops compute the inverses; ``None`` if they cannot."""
        return self.fisher.on_cpu(self.name, self.part, self.slots)


@dataclass(frozen=True)
class State:
    """The state of the elimination of a layer with n Fisher blocks.

    Attributes:
        weight: (n, B), updated weights.
        alive: (n, B) bool.
        losses: (n,), loss of each block so far.
        eliminated: (n,), steps of each block so far.
        closed: the updates of these steps; they do not count beyond these steps.
    """

    weight: Tensor
    alive: Tensor
    losses: Tensor
    eliminated: Tensor
    closed: tuple[UpdateSegment, ...]

    @classmethod
    def after(cls, task: Task, known: LayerOrder) -> State:
        """The state of a layer after all steps of an order."""
        count = len(known.indices)
        flat_order = replace(known, pattern=UNSTRUCTURED)  # the weights of a task are flat already
        weight = flat_order.weight(task.weight, count) if count > known.zeros else task.weight
        alive = task.alive.clone()
        alive[known.indices.long()] = False
        blocks = ceil_div(task.layer.numel, task.size)
        losses = torch.zeros(blocks, dtype=torch.float64, device=weight.device)
        of_block = known.indices[known.zeros :].long() // task.size
        losses.scatter_reduce_(0, of_block, known.losses[known.zeros :], "amax")
        eliminated = torch.bincount(of_block, minlength=blocks)
        closed = tuple(
            segment
            if segment.end is not None
            else replace(segment, end=eliminated[segment.block : segment.block + len(segment.columns)])
            for segment in known.updates
        )
        return cls(
            to_blocks(weight, task.size).double(), to_blocks(alive, task.size), losses, eliminated, closed
        )


def chunks(task: Task, weight: Tensor, alive: Tensor) -> Iterator[Chunk]:
    """Divide the blocks of a layer into chunks that fit into the working memory.

    Args:
        task: the layer.
        weight: (n, B), its weights in blocks.
        alive: (n, B) bool; the other weights are left out, as far as every block of a chunk has some.

    Yields:
        The chunks.
    """
    working = _WORKING.get(weight.device.type, _WORKING["cuda"])
    rows = max(int(alive.sum(1).max()), 1)
    together = max(1, working // rows**2)
    for start in range(0, len(weight), together):
        part = slice(start, min(start + together, len(weight)))
        alive_part = alive[part]
        left = max(int(alive_part.sum(1).max()), task.pattern.unit)
        slots = (~alive_part).byte().argsort(dim=1, stable=True)[:, :left]
        kept = alive_part.gather(1, slots)
        yield Chunk(part, slots, kept, weight[part].gather(1, slots), task.fisher, task.layer.name)


class BlockMerge:
    """Merges the eliminations of all blocks of a layer into one order, by their losses.

    Args:
        task: the layer.
        known: the order so far.
        state: how far it goes.
        steps: number of further steps of each block at most.
    """

    def __init__(self, task: Task, known: LayerOrder, state: State, steps: int) -> None:
        self._task = task
        self._known = known
        self._state = state
        self._steps = steps
        self._positions: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._segments = list(state.closed)

    def add(self, chunk: Chunk, elimination: Elimination) -> None:
        """Add the elimination of a chunk; chunks come in the order of :func:`chunks`."""
        padding = (0, self._steps - elimination.losses.shape[1])
        pad = torch.nn.functional.pad
        self._positions.append(pad(chunk.slots.gather(1, elimination.order), padding))
        self._losses.append(pad(elimination.losses, padding, value=torch.inf))
        before = self._state.eliminated[chunk.part]
        begin: int | Tensor = before if bool(before.any()) else 0
        if elimination.numbers is not None:  # all panels are one segment
            y = torch.cat([columns.y for columns in elimination.columns], 1)
            slots = elimination.columns[0].slots
            self._segments.append(_segment(chunk, (elimination.numbers, y, slots), begin, tiles.PANEL))
            return
        for columns in elimination.columns:
            numbers = columns.v.flatten(1), columns.y, columns.slots
            self._segments.append(_segment(chunk, numbers, begin, 0))
            begin = begin + columns.v.shape[1]

    def order(self) -> LayerOrder:
        """The merged order. It ends where the first block has used up its computed steps."""
        unit = self._task.pattern.unit
        # weights that are eliminated together count at the loss of the last of them
        loss = torch.cat(self._losses)[:, unit - 1 :: unit]
        offsets = torch.arange(len(loss), device=loss.device).unsqueeze(1) * self._task.size
        positions = (torch.cat(self._positions) + offsets).reshape(len(loss), -1, unit)
        room = room_of(self._task.pattern, self._state.alive).sum(1)
        unfinished = loss.isfinite().sum(1) * unit < room
        limit = loss[unfinished][:, -1].min() if bool(unfinished.any()) else torch.inf
        # step-major, so that the stable sort keeps each block's own order among equal losses
        ranked, ranking = torch.sort(loss.T.reshape(-1), stable=True)
        ranked = ranked[ranked.isfinite() & (ranked <= limit)]
        eliminated = positions.transpose(0, 1).reshape(-1, unit)[ranking[: len(ranked)]].reshape(-1)
        return replace(
            self._known,
            indices=torch.cat([self._known.indices, eliminated.int()]),
            losses=torch.cat([self._known.losses, ranked.repeat_interleave(unit)]),
            updates=tuple(self._segments),
        )


def _segment(
    chunk: Chunk, updates: tuple[Tensor, Tensor, Tensor | None], begin: int | Tensor, panel: int
) -> UpdateSegment:
    """The updates of a chunk's steps: numbers v in a row, coefficients and slots of :class:`Columns`."""
    numbers, y, slots = updates
    slots = chunk.slots if slots is None else chunk.slots.gather(1, slots)
    return UpdateSegment(
        chunk.part.start, begin, numbers, y.contiguous(), slots.short().contiguous(), panel=panel
    )


def room_of(pattern: Pattern, alive: Tensor) -> Tensor:
    """Number of weights that each group of some blocks may still lose, (n, groups) from ``alive`` (n, B).

    The last group of a block may reach into its padding.
    """
    if pattern.forced is None:
        return alive.long()
    short = -alive.shape[1] % pattern.group
    return pattern.room(torch.nn.functional.pad(alive, (0, short)))
