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
    """A pruning method: it puts the weights of each layer in the order in which they are to be pruned.

    How many weights each layer loses is decided later, by an allocation.
    """

    @property
    def name(self) -> str:
        """Its name in reports, and in :data:`pruners.METHODS` if it is registered there."""

    @property
    def scope(self) -> Scope:
        """Which layers share one threshold, unless the caller asks for another scope."""

    @property
    def sparsity_pattern(self) -> Pattern:
        """The sparsity pattern of its zeros."""

    @property
    def gradients(self) -> int:
        """Default number of gradients; 0 if the method needs none."""

    def fisher(self, layers: Sequence[PrunableLayer]) -> BlockFisher | None:
        """An empty Fisher, to which the caller adds gradients before :meth:`order`; ``None``: none needed."""

    def order(
        self,
        weights: Mapping[str, Tensor],
        layers: Sequence[PrunableLayer],
        masks: Mapping[str, Tensor],
        fisher: BlockFisher | None,
    ) -> EliminationOrder:
        """Put the weights of each layer in the order in which they are to be pruned.

        Args:
            weights: current weights, by parameter name.
            layers: the layers to order, all of the model or some of them.
            masks: by parameter name; pruned weights (``False``) come first, at no loss.
            fisher: what :meth:`fisher` returned, with gradients.

        Returns:
            The order of each layer.

        Raises:
            InputError: the weights, the masks or the gradients cannot be used.
        """
