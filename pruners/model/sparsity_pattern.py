"""Sparsity patterns: unstructured, N:M (2:4, 4:8), or blocks of 1×4 weights.

A pattern divides the input dimension of a weight, (out, in) or (out, in, height, width), into groups of
neighbours: the weights that one output multiplies one after the other. A convolution is therefore read with
its inputs last.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pruners.errors import InputError

if TYPE_CHECKING:  # recipes are checked with this module, without waiting for torch
    from torch import Tensor

    from pruners.model.layers import PrunableLayer

_FORMS = "unstructured, N:M as 2:4 or 4:8, or 1xB as 1x4"


@dataclass(frozen=True)
class Pattern:
    """A sparsity pattern: what may be zero in each group of neighbouring inputs.

    >>> Pattern.parse("2:4")
    Pattern(name='2:4', group=4, keep=2, whole=False)

    Attributes:
        name: as recipes write it.
        group: number of inputs in a group; 1 for unstructured.
        keep: weights of each group that stay at least (N of N:M).
        whole: whether all weights of a group are pruned together (1×B blocks).
    """

    name: str = "unstructured"
    group: int = 1
    keep: int = 0
    whole: bool = False

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read the name of a pattern: ``unstructured``, ``2:4`` (two of four weights stay), ``1x4``.

        Raises:
            InputError: another text.
        """
        if text == "unstructured":
            return cls()
        if match := re.fullmatch(r"(\d+):(\d+)", text):
            keep, group = int(match[1]), int(match[2])
            if 0 < keep < group:
                return cls(text, group, keep)
        if (match := re.fullmatch(r"1x(\d+)", text)) and int(match[1]) > 1:
            return cls(text, int(match[1]), 0, whole=True)
        raise InputError("pattern", text, f"must be {_FORMS}")

    @property
    def structured(self) -> bool:
        """Return whether the pattern has groups."""
        return self.group > 1

    @property
    def unit(self) -> int:
        """Number of weights that are pruned together."""
        return self.group if self.whole else 1

    @property
    def forced(self) -> float | None:
        """The sparsity that N:M implies; ``None`` for patterns that leave it free."""
        return None if self.whole or not self.structured else 1 - self.keep / self.group

    def fits(self, layer: PrunableLayer) -> bool:
        """Return whether the inputs of a layer can be divided into groups."""
        return layer.shape[1] % self.group == 0

    def flat(self, tensor: Tensor, *, batched: bool = False) -> Tensor:
        """Flatten a tensor of a layer so that each group lies together.

        Args:
            tensor: (out, in, …), of the layer's shape; with ``batched`` (k, out, in, …).
            batched: whether it holds k such tensors.

        Returns:
            (d,), or (k, d) with ``batched``.
        """
        first = 1 if batched else 0
        if self.structured:
            tensor = tensor.movedim(first + 1, -1)
        return tensor.reshape(*tensor.shape[:first], -1)

    def shaped(self, flat: Tensor, shape: Sequence[int]) -> Tensor:
        """Undo :meth:`flat`: a tensor of ``shape`` from its (d,) numbers."""
        if not self.structured:
            return flat.reshape(tuple(shape))
        return flat.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()

    def free(self, magnitudes: Tensor, alive: Tensor) -> Tensor:
        """The weights that N:M can prune when all are judged at once: the smallest of each group.

        Args:
            magnitudes: (d,) scores of the weights, in the order of :meth:`flat`.
            alive: (d,) bool, ``False`` for weights that are zero; they count as zeros of their group.

        Returns:
            (d,) bool.
        """
        if not self.structured or self.whole:
            return alive.new_ones(alive.shape)
        groups = magnitudes.masked_fill(~alive, -1.0).reshape(-1, self.group)
        rank = groups.argsort(dim=1, stable=True).argsort(dim=1)
        return (rank < self.group - self.keep).reshape(-1) | ~alive

    def room(self, alive: Tensor) -> Tensor:
        """Number of weights that each group can still lose: (…, d / group) from ``alive`` (…, d)."""
        dead = (~alive).reshape(*alive.shape[:-1], -1, self.group).sum(-1)
        return (self.group - self.keep - dead).clamp_min(0)

    def check_zeros(self, name: str, alive: Tensor) -> None:
        """Check that the zeros of a layer keep the pattern, where it prunes whole groups.

        Args:
            name: of the layer, for the error.
            alive: (d,) bool, ``False`` for weights that are zero, in the order of :meth:`flat`.

        Raises:
            InputError: some groups are zero in part.
        """
        if not self.whole:
            return
        left = alive.reshape(-1, self.group).sum(1)
        broken = int(((left > 0) & (left < self.group)).sum())
        if broken:
            expected = f"{broken} of its blocks are zero in part; {self.name} needs whole ones"
            raise InputError("pattern", name, expected)


UNSTRUCTURED = Pattern()


def fitting_layers(
    layers: Sequence[PrunableLayer], pattern: Pattern, *, unfit: str = "refuse"
) -> list[PrunableLayer]:
    """Choose the layers whose inputs a pattern can divide into groups.

    Args:
        layers: the candidates.
        pattern: the sparsity pattern.
        unfit: what to do with the other layers: ``refuse`` them by an error, or leave them ``dense``.

    Returns:
        The layers that fit, in their order.

    Raises:
        InputError: a layer that does not fit (``refuse``), or none that does.
    """
    if unfit not in ("refuse", "dense"):
        raise InputError("unfit", unfit, "must be refuse or dense")
    chosen = [layer for layer in layers if pattern.fits(layer)]
    if len(chosen) < len(layers) and (unfit == "refuse" or not chosen):
        bad = next(layer for layer in layers if not pattern.fits(layer))
        raise InputError(
            "pattern",
            pattern.name,
            f"cannot fit {bad.name}, which has {bad.shape[1]} inputs (no multiple of {pattern.group}); "
            "leave it out, or say unfit: dense",
        )
    return chosen
