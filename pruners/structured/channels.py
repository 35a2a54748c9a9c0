"""Structured pruning: the importance of channels, the choice of those that stay, and the remaining weights.

A *channel* is a number that dependent layers pass on. A hidden unit of an MLP is one: a row of the first
matrix, an entry of its bias, and a column of the second matrix. :class:`Channels` says where channels lie in
all parameters (:mod:`pruners.structured.dependency` finds them). The importance of a channel is the sum of
the saliencies of its weights w:

=============  =================  ===================================================================
magnitude      w²                 Li et al., *Pruning Filters for Efficient ConvNets* (ICLR 2017)
taylor         Σ |w g| / m        Molchanov et al., *Importance Estimation* (CVPR 2019), weight by weight
fisher         w² Σ g² / 2m       the diagonal of oViT's Fisher: rise of the loss without the weight
=============  =================  ===================================================================

g are m gradients of the loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pruners.errors import InputError, did_you_mean

WITH_GRADIENTS = ("taylor", "fisher")
"""Kinds of saliency that need gradients."""
KINDS = ("magnitude", *WITH_GRADIENTS)
"""All kinds of saliency."""


@dataclass(frozen=True)
class Member:
    """The positions of channels in one parameter.

    Attributes:
        name: of the parameter.
        dim: the dimension along which they lie.
        positions: (channels, k) long, the k positions of each channel along ``dim``.
    """

    name: str
    dim: int
    positions: Tensor


@dataclass(frozen=True)
class Channels:
    """Channels, each of which is cut in all its parameters or in none.

    Attributes:
        name: of the layer that computes them.
        members: where they lie.
    """

    name: str
    members: tuple[Member, ...]

    @property
    def count(self) -> int:
        """Number of channels."""
        return len(self.members[0].positions)

    def importance(self, saliency: Mapping[str, Tensor]) -> Tensor:
        """The importance of each channel: the sum over its weights.

        Args:
            saliency: of each weight, by parameter name (see :func:`saliencies`).

        Returns:
            (channels,), in float64.
        """
        total = torch.zeros(self.count, dtype=torch.float64)
        for member in self.members:
            values = saliency[member.name].double().cpu().movedim(member.dim, 0)
            total += values.reshape(len(values), -1).sum(1)[member.positions].sum(1)
        return total


def saliencies(
    kind: str, weights: Mapping[str, Tensor], gradients: Iterable[Mapping[str, Tensor]] = ()
) -> dict[str, Tensor]:
    """Compute the saliency of each single weight.

    Args:
        kind: one of :data:`KINDS`.
        weights: by parameter name.
        gradients: several at a time, (k, *shape) by parameter name, as
            :func:`pruners.elimination.gradients.gradients` yields them; not read for ``magnitude``.

    Returns:
        Saliencies by parameter name, of the shapes of the weights.

    Raises:
        InputError: an unknown kind, no gradients where they are needed, or gradients with NaN or Inf.
    """
    if kind not in KINDS:
        raise InputError("importance", kind, f"must be one of {', '.join(KINDS)}{did_you_mean(kind, KINDS)}")
    values = {name: weight.detach() for name, weight in weights.items()}
    if kind == "magnitude":
        return {name: weight.square() for name, weight in values.items()}
    sums = {name: torch.zeros_like(weight) for name, weight in values.items()}
    count = 0
    for batch in gradients:
        for name in sums:
            gradient = batch[name].detach()
            sums[name] += (gradient.abs() if kind == "taylor" else gradient.square()).sum(0)
        count += len(next(iter(batch.values())))
    if not count:
        raise InputError("gradients", 0, f"at least one gradient is needed for {kind}")
    for name, total in sums.items():
        if not bool(torch.isfinite(total.sum())):
            raise InputError("gradient", name, "has NaN or Inf")
    if kind == "taylor":
        return {name: values[name].abs() * total / count for name, total in sums.items()}
    return {name: values[name].square() * total / (2 * count) for name, total in sums.items()}


def most_important(importance: Tensor, keep: int, groups: int = 1) -> Tensor:
    """Choose the channels that stay, those of the largest importance.

    Of equally important channels the first stay, so that the same input leads to the same model on every
    machine.

    Args:
        importance: (channels,).
        keep: how many channels of each group stay, from 1 on.
        groups: number of equal groups of neighbouring channels, such as heads.

    Returns:
        (channels,) bool, ``True`` for those that stay.
    """
    rows = importance.reshape(groups, -1)
    assert 1 <= keep <= rows.shape[1], "the shape was checked"
    order = rows.argsort(dim=1, descending=True, stable=True)[:, :keep]
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, True).flatten()


class Cut:
    """Collects which positions of which parameters are cut, and cuts them.

    The positions that stay keep their order. Heads, and the parts of a matrix for queries, keys and values,
    therefore stay where code expects them.

    Args:
        shapes: of all parameters and buffers, by name.
    """

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self._shapes = shapes
        self._kept: dict[tuple[str, int], Tensor] = {}

    def drop(self, channels: Channels, stays: Tensor) -> None:
        """Cut all channels but those that stay, (channels,) bool."""
        for member in channels.members:
            kept = self.kept(member.name, member.dim)
            kept[member.positions[~stays].flatten()] = False
            self._kept[member.name, member.dim] = kept

    def kept(self, name: str, dim: int) -> Tensor:
        """The positions of a parameter that stay along a dimension, (size,) bool."""
        known = self._kept.get((name, dim))
        return torch.ones(self._shapes[name][dim], dtype=torch.bool) if known is None else known

    def sliced(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict without the cut positions; tensors without any are the same objects."""
        result = dict(state)
        for (name, dim), kept in self._kept.items():
            result[name] = result[name].index_select(dim, kept.nonzero().flatten().to(result[name].device))
        return result

    def zeroed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of the same shapes, with zeros at the cut positions."""
        result = dict(state)
        for (name, dim), kept in self._kept.items():
            shape = [1] * result[name].ndim
            shape[dim] = -1
            result[name] = result[name] * kept.reshape(shape).to(result[name].device)
        return result
