"""Which weight of a block may fall next in an elimination: any, a few of each group, or whole groups."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Rule(Protocol):
    """Which weight of each block falls next; what has fallen has an infinite weight."""

    @property
    def unit(self) -> int:
        """How many fall together."""

    def start(self, inverse: Tensor) -> None:
        """A panel begins with the downdated ``inverse`` (n, r, r)."""

    def pick(self, weights: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor]:
        """(score, position) of the next to fall, (n,) each; an infinite score where nothing may."""

    def fell(self, pivot: Tensor, column: Tensor, active: Tensor) -> None:
        """``pivot`` (n,) fell with the normalised ``column`` (n, r) in the ``active`` blocks."""

    def keep(self, places: Tensor) -> None:
        """Only ``places`` (n, r') of the r positions are left."""


class AnyWeight:
    """The smallest ``w² / [H⁻¹]_jj``, wherever it is."""

    unit = 1

    def start(self, inverse: Tensor) -> None: ...

    def pick(self, weights: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor]:
        score, pivot = weights.square().div_(diagonal).min(1)
        return score, pivot

    def fell(self, pivot: Tensor, column: Tensor, active: Tensor) -> None: ...

    def keep(self, places: Tensor) -> None: ...


class FewOfEach:
    """N:M: a group that has lost all it may stays, and still follows the others.

    Args:
        groups: (n, B), the group of each position.
        room: (n, number of groups), how many more weights each may lose.
    """

    unit = 1

    def __init__(self, groups: Tensor, room: Tensor) -> None:
        self._groups = groups
        self._room = room.clone()

    def start(self, inverse: Tensor) -> None: ...

    def pick(self, weights: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor]:
        full = self._room.gather(1, self._groups) <= 0
        score, pivot = weights.square().div_(diagonal).masked_fill_(full, torch.inf).min(1)
        return score, pivot

    def fell(self, pivot: Tensor, column: Tensor, active: Tensor) -> None:
        group = self._groups.gather(1, pivot.unsqueeze(1))
        self._room.scatter_add_(1, group, -active.to(self._room.dtype).unsqueeze(1))

    def keep(self, places: Tensor) -> None:
        self._groups = self._groups.gather(1, places)


class WholeGroups:
    """Groups of ``size`` neighbours fall together, those of the smallest joint loss ½ wᵀ(H⁻¹)⁻¹w first.

    The joint loss is that of eliminating a group's members one after the other.
    """

    def __init__(self, size: int) -> None:
        self.unit = size
        self._member = 0
        self._first = torch.empty(0)
        self._corner = torch.empty(0)

    def start(self, inverse: Tensor) -> None:
        blocks, rows, _ = inverse.shape
        tiled = inverse.view(blocks, rows // self.unit, self.unit, rows // self.unit, self.unit)
        self._corner = tiled.diagonal(dim1=1, dim2=3).movedim(-1, 1).clone()  # (n, groups, size, size)

    def pick(self, weights: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor]:
        if self._member:  # the others of a group that has begun to fall
            pivot = self._first + self._member
            score = (weights.square() / diagonal).gather(1, pivot.unsqueeze(1)).squeeze(1)
            return score, pivot
        loss = self._joint_loss(weights)
        best, group = loss.min(1)
        self._first = group * self.unit
        pivot = self._first
        score = (weights.square() / diagonal).gather(1, pivot.unsqueeze(1)).squeeze(1)
        return torch.where(best.isfinite(), score, torch.inf), pivot

    def _joint_loss(self, weights: Tensor) -> Tensor:
        tiny = torch.finfo(weights.dtype).tiny
        grouped = weights.reshape(len(weights), -1, self.unit)
        fallen = grouped.isinf().any(2)
        left = grouped.masked_fill(fallen.unsqueeze(2), 0.0)
        corner = self._corner.clone()
        loss = torch.zeros_like(left[..., 0])
        for member in range(self.unit):
            pivot = corner[..., member, member].clamp_min(tiny)
            y = left[..., member] / pivot.sqrt()
            loss += y.square()
            column = corner[..., member] / pivot.sqrt().unsqueeze(2)
            left = left - y.unsqueeze(2) * column
            corner = corner - column.unsqueeze(3) * column.unsqueeze(2)
        return loss.masked_fill_(fallen, torch.inf)

    def fell(self, pivot: Tensor, column: Tensor, active: Tensor) -> None:
        grouped = column.reshape(len(column), -1, self.unit)
        self._corner -= grouped.unsqueeze(3) * grouped.unsqueeze(2)
        self._member = (self._member + 1) % self.unit

    def keep(self, places: Tensor) -> None: ...
