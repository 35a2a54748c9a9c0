"""The protocol that every pruning method keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from pruners.allocation.sharing import Scope
from pruners.elimination.fisher import BlockFisher
from pruners.elimination.order import EliminationOrder
from pruners.model.layers import PrunableLayer
from pruners.model.sparsity_pattern import Pattern


class Pruner(Protocol):
    """A pruning method: it orders the weights; an allocation then says how far each layer goes.

    ``scope`` is the method's own allocation: what shares one threshold. ``form`` is the pattern that its
    zeros keep, ``gradients`` how many gradients it takes unless it is said otherwise (0: it needs none).
    """

    @property
    def name(self) -> str: ...

    @property
    def scope(self) -> Scope: ...

    @property
    def form(self) -> Pattern: ...

    @property
    def gradients(self) -> int: ...

    def fisher(self, layers: Sequence[PrunableLayer]) -> BlockFisher | None:
        """What gradients are to be added to before :meth:`order`; ``None`` for a data-free method."""

    def order(
        self,
        weights: Mapping[str, Tensor],
        layers: Sequence[PrunableLayer],
        masks: Mapping[str, Tensor],
        fisher: BlockFisher | None,
    ) -> EliminationOrder:
        """The order in which the weights of ``layers`` fall; ``layers`` may be a share of the model.

        Args:
            weights: current weights, by parameter name.
            masks: weights already pruned are ``False``: they come first, at no loss.
            fisher: what :meth:`fisher` gave, with gradients.
        """
