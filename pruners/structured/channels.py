"""Structured pruning: what whole channels are worth, which of them stay, and weights without the others.

A *channel* is what a set of coupled layers passes on: a hidden unit of an MLP is a row of its first matrix, a
bias, and a column of its second. :class:`Channels` says where each one lies, in any number of parameters
(:mod:`pruners.structured.dependency` finds that out). Its worth is the sum of the worth of all its weights w:

=============  =================  ===================================================================
magnitude      w²                 Li et al., *Pruning Filters for Efficient ConvNets* (ICLR 2017)
taylor         Σ |w g| / m        Molchanov et al., *Importance Estimation* (CVPR 2019), weight by weight
fisher         w² Σ g² / 2m       the diagonal of oViT's Fisher: what the loss rises by without the weight
=============  =================  ===================================================================

g are the m gradients of the loss that were taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pruners.errors import InputError, did_you_mean

WITH_GRADIENTS = ("taylor", "fisher")
KINDS = ("magnitude", *WITH_GRADIENTS)


@dataclass(frozen=True)
class Member:
    """Where channels lie in one parameter: channel c has the k positions ``places[c]`` along ``dim``.

    ``places`` is (channels, k), long.
    """

    name: str
    dim: int
    places: Tensor


@dataclass(frozen=True)
class Channels:
    """Channels that are cut in all their members, or in none."""

    name: str
    members: tuple[Member, ...]

    @property
    def count(self) -> int:
        return len(self.members[0].places)

    def worth(self, saliency: Mapping[str, Tensor]) -> Tensor:
        """The worth of each channel, (channels,), in float64: the sum over its weights.

        Args:
            saliency: the worth of each weight, by parameter name (see :func:`saliencies`).
        """
        total = torch.zeros(self.count, dtype=torch.float64)
        for member in self.members:
            values = saliency[member.name].double().cpu().movedim(member.dim, 0)
            total += values.reshape(len(values), -1).sum(1)[member.places].sum(1)
        return total


def saliencies(
    kind: str, weights: Mapping[str, Tensor], gradients: Iterable[Mapping[str, Tensor]] = ()
) -> dict[str, Tensor]:
    """What each single weight is worth, by one of :data:`KINDS`; of the shape of the weights.

    Args:
        gradients: some at a time, (k, *shape) by parameter name, as
            :func:`pruners.elimination.gradients.gradients` yields them; not read for ``magnitude``.

    Raises:
        InputError: an unknown kind, no gradients where they are needed, or some with NaN or Inf.
    """
    if kind not in KINDS:
        raise InputError("importance", kind, f"must be one of {', '.join(KINDS)}{did_you_mean(kind, KINDS)}")
    found = {name: weight.detach() for name, weight in weights.items()}
    if kind == "magnitude":
        return {name: weight.square() for name, weight in found.items()}
    sums = {name: torch.zeros_like(weight) for name, weight in found.items()}
    count = 0
    for some in gradients:
        for name in sums:
            gradient = some[name].detach()
            sums[name] += (gradient.abs() if kind == "taylor" else gradient.square()).sum(0)
        count += len(next(iter(some.values())))
    if not count:
        raise InputError("gradients", 0, f"at least one gradient is needed for {kind}")
    for name, total in sums.items():
        if not bool(torch.isfinite(total.sum())):
            raise InputError("gradient", name, "has NaN or Inf")
    if kind == "taylor":
        return {name: found[name].abs() * total / count for name, total in sums.items()}
    return {name: found[name].square() * total / (2 * count) for name, total in sums.items()}


def best(worth: Tensor, keep: int, groups: int = 1) -> Tensor:
    """The channels that stay, as booleans (channels,): ``keep`` of each of ``groups`` equal, adjacent groups.

    Of equals the first stay, so that the same input leads to the same model on every machine.
    """
    rows = worth.reshape(groups, -1)
    assert 1 <= keep <= rows.shape[1], "the shape was checked"
    order = rows.argsort(dim=1, descending=True, stable=True)[:, :keep]
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, True).flatten()


class Cut:
    """Which positions of which parameters stay; every group of channels adds what it gives up.

    Positions keep their order, so that heads, and the parts of a matrix for queries, keys and values, stay
    where code looks for them.

    Args:
        shapes: of all parameters and buffers, by name.
    """

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self._shapes = shapes
        self._kept: dict[tuple[str, int], Tensor] = {}

    def drop(self, channels: Channels, stays: Tensor) -> None:
        """Give up the channels that do not stay (booleans, one for each)."""
        for member in channels.members:
            kept = self.kept(member.name, member.dim)
            kept[member.places[~stays].flatten()] = False
            self._kept[member.name, member.dim] = kept

    def kept(self, name: str, dim: int) -> Tensor:
        """The positions of a parameter that stay along a dimension, as booleans."""
        known = self._kept.get((name, dim))
        return torch.ones(self._shapes[name][dim], dtype=torch.bool) if known is None else known

    def sliced(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict without what was given up; what nothing was cut from is the same tensor."""
        found = dict(state)
        for (name, dim), kept in self._kept.items():
            found[name] = found[name].index_select(dim, kept.nonzero().flatten().to(found[name].device))
        return found

    def zeroed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same state dict, of the old shapes, with zeros where something was given up."""
        found = dict(state)
        for (name, dim), kept in self._kept.items():
            shape = [1] * found[name].ndim
            shape[dim] = -1
            found[name] = found[name] * kept.reshape(shape).to(found[name].device)
        return found
