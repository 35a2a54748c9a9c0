"""The block-diagonal empirical Fisher (oViT §3; METHODS: F = λI + (1/m) Σ g gᵀ over B×B diagonal blocks).

F itself is accumulated, as matrix products over chunks of gradients: m rank-one updates of its inverse
would read and write d·B numbers m times. It is inverted once, in float64, where λ = 1e-8 still counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pruners.errors import InputError
from pruners.layers import PrunableLayer


def to_blocks(flat: Tensor, size: int) -> Tensor:
    """Cut (…, d) into (…, n, size); the last block is padded with zeros."""
    blocks = -(-flat.shape[-1] // size)
    padded = torch.nn.functional.pad(flat, (0, blocks * size - flat.shape[-1]))
    return padded.reshape(*flat.shape[:-1], blocks, size)


class BlockFisher:
    """Sums of g gᵀ over gradients g, for the B×B diagonal blocks of each flattened layer.

    ``sums[name]`` is (n, B, B) in float32, memory d·B numbers in all. B is cut to the layer's size.
    """

    def __init__(
        self, layers: Sequence[PrunableLayer], *, block_size: int, damp: float, chunk: int = 32
    ) -> None:
        if block_size < 1:
            raise InputError("block_size", block_size, "must be at least 1")
        if damp <= 0:
            raise InputError("damp", damp, "must be positive")
        self.damp = damp
        self.count = 0
        self._chunk = chunk
        self._sizes = {layer.name: min(block_size, layer.numel) for layer in layers}
        self._waiting: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
        self.sums: dict[str, Tensor] = {}

    def block_size(self, name: str) -> int:
        return self._sizes[name]

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        """Take one gradient of the loss (a tensor for each layer, of the layer's shape).

        Raises:
            InputError: a gradient with NaN or Inf, naming its layer and its number.
        """
        rows = {name: gradients[name].detach().reshape(-1).float() for name in self._waiting}
        for name, row in rows.items():  # all of them before the first is taken
            if not torch.isfinite(row).all():
                raise InputError("gradient", name, f"has NaN or Inf in batch {self.count}")
        for name, row in rows.items():
            self._waiting[name].append(row)
        self.count += 1
        if self.count % self._chunk == 0:
            self.flush()

    def flush(self) -> None:
        """Fold the gradients that wait into the sums."""
        for name, waiting in self._waiting.items():
            if not waiting:
                continue
            rows = to_blocks(torch.stack(waiting), self._sizes[name]).transpose(0, 1)  # (n, k, B)
            if name in self.sums:
                self.sums[name].baddbmm_(rows.transpose(1, 2), rows)
            else:
                self.sums[name] = torch.bmm(rows.transpose(1, 2), rows)
            waiting.clear()

    def inverse(self, name: str, blocks: slice, alive: Tensor) -> Tensor:
        """F⁻¹ (k, B, B) of some blocks of a layer, in float64; pruned weights stand alone in it.

        Args:
            alive: (k, B), ``False`` for weights that are zero already, and for padding.

        Raises:
            InputError: a block that is not positive definite even with λ and the rounding of its sums.
        """
        if self.count == 0:
            raise InputError("gradients", 0, "at least one gradient is needed for the Fisher")
        fisher = self.sums[name][blocks].double() / self.count
        fisher *= (alive.unsqueeze(1) & alive.unsqueeze(2)).to(fisher.dtype)
        fisher.diagonal(dim1=1, dim2=2).add_(self.damp)
        factor, info = torch.linalg.cholesky_ex(fisher)
        failed = info > 0
        if bool(failed.any()):
            # The sums carry float32 rounding: what is less than that in a direction is not known to be
            # positive, so the blocks concerned are damped at the level of their own rounding.
            rounding = torch.finfo(torch.float32).eps * fisher[failed].abs().sum(2).amax(1)
            fisher[failed] += torch.diag_embed(rounding.unsqueeze(1).expand(-1, fisher.shape[1]))
            factor, info = torch.linalg.cholesky_ex(fisher)
        # an infinite sum (gradients beyond 1e19 squared in float32) has a factor too, and an inverse of 0
        if bool((info > 0).any()) or not bool(torch.isfinite(factor).all()):
            raise InputError(
                "damp", self.damp, f"too small: a Fisher block of {name} is not positive definite"
            )
        return torch.cholesky_inverse(factor)
