"""Constraints on an elimination: which weight of a block may be pruned next under a sparsity pattern."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Constraint(Protocol):
    """Selects the weight of each block that is eliminated next, and records it.

    :func:`pruners.elimination.obs.eliminate` calls it like this, for n blocks with r weights left::

        for each panel:
            constraint.begin_panel(inverse)
            for each step of the panel:
                score, pivot = constraint.select(weights, diagonal)
                ...eliminate the pivots...
                constraint.record(pivot, column, active)
            if rows were dropped:
                constraint.compact(positions)

    Weights that are eliminated already are infinite.
    """

    @property
    def unit(self) -> int:
        """Number of weights that are eliminated together."""

    def begin_panel(self, inverse: Tensor) -> None:
        """Start a panel of steps.

        Args:
            inverse: (n, r, r), the inverse Fisher blocks after all steps so far.
        """

    def select(self, weights: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor]:
        """Select the next weight of each block.

        Args:
            weights: (n, r), as all steps so far have changed them.
            diagonal: (n, r), of the inverse Fisher blocks after all steps so far.

        Returns:
            The scores w² / [H⁻¹]_jj (n,) of the weights selected, infinite where none may be eliminated,
            and their positions (n,).
        """

    def record(self, pivot: Tensor, column: Tensor, active: Tensor) -> None:
        """Record one step.

        Args:
            pivot: (n,), positions of the eliminated weights.
            column: (n, r), the normalised columns of the inverse that the step subtracts.
            active: (n,) bool, ``False`` for blocks without a step.
        """

    def compact(self, positions: Tensor) -> None:
        """Keep only ``positions`` (n, r') of the r positions."""


class Unconstrained:
    """Any weight may be next: the one of the smallest score ``w² / [H⁻¹]_jj``."""

    unit = 1

    def begin_panel(self, inverse: Tensor) -> None:
        """Do nothing."""

    def select(self, weights: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor]:
        """Select the smallest score of each block."""
        score, pivot = weights.square().div_(diagonal).min(1)
        return score, pivot

    def record(self, pivot: Tensor, column: Tensor, active: Tensor) -> None:
        """Do nothing."""

    def compact(self, positions: Tensor) -> None:
        """Do nothing."""


class GroupLimits:
    """N:M: each group may lose a limited number of weights; its other weights are still updated.

    Args:
        groups: (n, B), the group of each position.
        room: (n, number of groups), how many more weights each group may lose.
    """

    unit = 1

    def __init__(self, groups: Tensor, room: Tensor) -> None:
        self._groups = groups
        self._room = room.clone()

    def begin_panel(self, inverse: Tensor) -> None:
        """Do nothing."""

    def select(self, weights: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor]:
        """Select the smallest score among the groups that have room."""
        full = self._room.gather(1, self._groups) <= 0
        score, pivot = weights.square().div_(diagonal).masked_fill_(full, torch.inf).min(1)
        return score, pivot

    def record(self, pivot: Tensor, column: Tensor, active: Tensor) -> None:
        """Reduce the room of each pivot's group by one."""
        group = self._groups.gather(1, pivot.unsqueeze(1))
        self._room.scatter_add_(1, group, -active.to(self._room.dtype).unsqueeze(1))

    def compact(self, positions: Tensor) -> None:
        """Keep the groups of the positions that are left."""
        self._groups = self._groups.gather(1, positions)


class WholeGroups:
    """Groups of neighbours are eliminated together, by the smallest joint loss ½ wᵀ(H⁻¹)⁻¹w first.

    The joint loss of a group is that of eliminating its members one after the other.

    Args:
        size: number of weights in a group.
    """

    def __init__(self, size: int) -> None:
        self.unit = size
        self._member = 0
        self._first = torch.empty(0)
        self._corner = torch.empty(0)

    def begin_panel(self, inverse: Tensor) -> None:
        """Copy the diagonal block of each group, (n, groups, size, size), out of the inverse."""
        blocks, rows, _ = inverse.shape
        tiled = inverse.view(blocks, rows // self.unit, self.unit, rows // self.unit, self.unit)
        self._corner = tiled.diagonal(dim1=1, dim2=3).movedim(-1, 1).clone()

    def select(self, weights: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor]:
        """Select the next member of the current group; after its last member, the first of the best group."""
        if self._member:
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
        """The joint losses (n, groups); infinite for groups that are eliminated already."""
        tiny = torch.finfo(weights.dtype).tiny
        grouped = weights.reshape(len(weights), -1, self.unit)
        eliminated = grouped.isinf().any(2)
        left = grouped.masked_fill(eliminated.unsqueeze(2), 0.0)
        corner = self._corner.clone()
        loss = torch.zeros_like(left[..., 0])
        for member in range(self.unit):
            pivot = corner[..., member, member].clamp_min(tiny)
            y = left[..., member] / pivot.sqrt()
            loss += y.square()
            column = corner[..., member] / pivot.sqrt().unsqueeze(2)
            left = left - y.unsqueeze(2) * column
            corner = corner - column.unsqueeze(3) * column.unsqueeze(2)
        return loss.masked_fill_(eliminated, torch.inf)

    def record(self, pivot: Tensor, column: Tensor, active: Tensor) -> None:
        """Bring the diagonal blocks of the groups up to date."""
        grouped = column.reshape(len(column), -1, self.unit)
        self._corner -= grouped.unsqueeze(3) * grouped.unsqueeze(2)
        self._member = (self._member + 1) % self.unit

    def compact(self, positions: Tensor) -> None:
        """Do nothing: the next panel copies the diagonal blocks again."""
