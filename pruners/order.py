"""In which order the weights fall, and what falls with them: computed once, read for every allocation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pruners.allocation import Allocation
from pruners.masks import MaskSet


@dataclass(frozen=True)
class BlockUpdates:
    """What an elimination knows about the surviving weights of a layer of ``n`` blocks of ``B`` weights.

    ``w(c) = w(0) − Σ_{i<c} y_i·v_i`` for a block of which ``c`` weights have fallen: ``columns`` are the
    normalised columns v (n, steps, B), ``coefficients`` the y (n, steps).
    """

    columns: Tensor
    coefficients: Tensor


@dataclass(frozen=True)
class LayerOrder:
    """One layer's weights in the order in which they fall.

    ``indices`` (d,) are flat positions, ``losses`` (d,) ascend; the first ``zeros`` of them were zero
    before. ``updates`` is what correlation-aware methods change in the weights that stay.
    """

    indices: Tensor
    losses: Tensor
    zeros: int = 0
    updates: BlockUpdates | None = None

    def mask(self, shape: Sequence[int], count: int) -> Tensor:
        """Kept weights when ``count`` have fallen."""
        keep = torch.ones(self.indices.numel(), dtype=torch.bool, device=self.indices.device)
        keep[self.indices[:count].long()] = False
        return keep.reshape(tuple(shape))

    def weight(self, weight: Tensor, count: int) -> Tensor:
        """The layer's weights when ``count`` have fallen: exact zeros there, the others updated."""
        keep = self.mask(weight.shape, count)
        result = weight.detach().clone()
        if self.updates is not None and count > self.zeros:
            result += self._change(keep).to(result.dtype).reshape(result.shape)
        return result.masked_fill_(~keep, 0.0)

    def _change(self, keep: Tensor) -> Tensor:
        assert self.updates is not None
        columns, y = self.updates.columns, self.updates.coefficients
        blocks, steps, size = columns.shape
        fallen = torch.zeros(blocks * size, dtype=torch.bool, device=keep.device)
        fallen[: keep.numel()] = ~keep.reshape(-1)
        # those that were zero before the elimination fell without a step of it
        fallen[self.indices[: self.zeros].long()] = False
        done = fallen.reshape(blocks, size).sum(1, keepdim=True)
        taken = torch.arange(steps, device=keep.device) < done
        change = -torch.bmm((y * taken).unsqueeze(1), columns).reshape(-1)
        return change[: keep.numel()]


class EliminationOrder(dict[str, LayerOrder]):
    """The orders of some layers, by parameter name ('prune once, allocate many times')."""

    @property
    def losses(self) -> dict[str, Tensor]:
        return {name: order.losses for name, order in self.items()}

    def weights_at(
        self, weights: Mapping[str, Tensor], allocation: Allocation
    ) -> tuple[dict[str, Tensor], MaskSet]:
        """New weights and masks of the layers of this order, at any allocation.

        Args:
            weights: the weights that the order was computed from.
            allocation: pruned weights of each layer.
        """
        new = {name: order.weight(weights[name], allocation[name]) for name, order in self.items()}
        masks = {name: order.mask(weights[name].shape, allocation[name]) for name, order in self.items()}
        return new, MaskSet(masks)

    def arrays(self) -> dict[str, Tensor]:
        """Flat tensors, to be stored or shared; :meth:`from_arrays` reads them back."""
        flat: dict[str, Tensor] = {}
        for name, order in self.items():
            flat[f"{name}/indices"] = order.indices
            flat[f"{name}/losses"] = order.losses
            flat[f"{name}/zeros"] = torch.tensor(order.zeros)
            if order.updates is not None:
                flat[f"{name}/columns"] = order.updates.columns
                flat[f"{name}/coefficients"] = order.updates.coefficients
        return flat

    @classmethod
    def from_arrays(cls, flat: Mapping[str, Tensor]) -> EliminationOrder:
        orders = cls()
        for name in (key.removesuffix("/indices") for key in flat if key.endswith("/indices")):
            columns = flat.get(f"{name}/columns")
            orders[name] = LayerOrder(
                flat[f"{name}/indices"],
                flat[f"{name}/losses"],
                int(flat[f"{name}/zeros"]),
                None if columns is None else BlockUpdates(columns, flat[f"{name}/coefficients"]),
            )
        return orders
