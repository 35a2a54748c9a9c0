"""Which zeros a sparse engine can use: any, N of every M inputs (2:4, 4:8), or whole 1×4 blocks.

Patterns run along the input dimension of a weight, (out, in) or (out, in, kernel): the numbers that one
output multiplies one after the other. A convolution is therefore read with its inputs last.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pruners.errors import InputError

if TYPE_CHECKING:  # recipes are checked by this file, without waiting for torch
    from torch import Tensor

    from pruners.model.layers import PrunableLayer

_FORMS = "unstructured, N:M as 2:4 or 4:8, or 1xB as 1x4"


@dataclass(frozen=True)
class Pattern:
    """``group`` inputs in a row; of each at least ``keep`` stay (N:M), or all fall together (``whole``).

    Unstructured is a group of one.
    """

    name: str = "unstructured"
    group: int = 1
    keep: int = 0
    whole: bool = False

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """``unstructured``, ``2:4`` (two of four stay), ``1x4``.

        Raises:
            InputError: anything else.
        """
        if text == "unstructured":
            return cls()
        if found := re.fullmatch(r"(\d+):(\d+)", text):
            keep, group = int(found[1]), int(found[2])
            if 0 < keep < group:
                return cls(text, group, keep)
        if (found := re.fullmatch(r"1x(\d+)", text)) and int(found[1]) > 1:
            return cls(text, int(found[1]), 0, whole=True)
        raise InputError("pattern", text, f"must be {_FORMS}")

    @property
    def structured(self) -> bool:
        return self.group > 1

    @property
    def unit(self) -> int:
        """Weights that fall together."""
        return self.group if self.whole else 1

    @property
    def forced(self) -> float | None:
        """The sparsity that N:M leads to; other patterns leave it free."""
        return None if self.whole or not self.structured else 1 - self.keep / self.group

    def fits(self, layer: PrunableLayer) -> bool:
        return layer.shape[1] % self.group == 0

    def flat(self, tensor: Tensor, *, batched: bool = False) -> Tensor:
        """(d,) numbers in the order in which the pattern reads them; (k, d) for k tensors of the layer."""
        first = 1 if batched else 0
        if self.structured:
            tensor = tensor.movedim(first + 1, -1)
        return tensor.reshape(*tensor.shape[:first], -1)

    def shaped(self, flat: Tensor, shape: Sequence[int]) -> Tensor:
        """What :meth:`flat` made of a tensor of ``shape``, undone."""
        if not self.structured:
            return flat.reshape(tuple(shape))
        return flat.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()

    def free(self, magnitudes: Tensor, alive: Tensor) -> Tensor:
        """Which weights the smallest-first rule of N:M lets fall: (d,) of ``magnitudes`` (d,).

        What is not alive counts towards its group's zeros.
        """
        if not self.structured or self.whole:
            return alive.new_ones(alive.shape)
        groups = magnitudes.masked_fill(~alive, -1.0).reshape(-1, self.group)
        rank = groups.argsort(dim=1, stable=True).argsort(dim=1)
        return (rank < self.group - self.keep).reshape(-1) | ~alive

    def room(self, alive: Tensor) -> Tensor:
        """How many more weights each group may lose: (…, d / group) from (…, d)."""
        dead = (~alive).reshape(*alive.shape[:-1], -1, self.group).sum(-1)
        return (self.group - self.keep - dead).clamp_min(0)

    def check_zeros(self, name: str, alive: Tensor) -> None:
        """Raises:
        InputError: blocks of which a part is zero already, naming the layer.
        """
        if not self.whole:
            return
        left = alive.reshape(-1, self.group).sum(1)
        broken = int(((left > 0) & (left < self.group)).sum())
        if broken:
            expected = f"{broken} of its blocks are zero in part; {self.name} needs whole ones"
            raise InputError("pattern", name, expected)


UNSTRUCTURED = Pattern()


def fitting(
    layers: Sequence[PrunableLayer], pattern: Pattern, *, unfit: str = "refuse"
) -> list[PrunableLayer]:
    """The layers that ``pattern`` can hold for; the others are refused, or (``unfit='dense'``) left out.

    Raises:
        InputError: a layer that the pattern cannot fit, or none that it can.
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
