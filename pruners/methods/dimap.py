"""DIMAP: data-independent, module-aware pruning (He & Zhou, ICLR 2024, arXiv 2404.13648), and LAMP.

======================  ==========================================
paper                   here
======================  ==========================================
W_p1 ≥ W_p2 ≥ …         ``magnitudes``, in the other direction
Imp(W_pj)               :func:`importance`
QKV-M, PRJ-M, MLP-M     ``PrunableLayer.module``
======================  ==========================================
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pruners.allocation.sharing import Scope
from pruners.methods.magnitude import RankedByMagnitude


def importance(magnitudes: Tensor) -> Tensor:
    """Compute DIMAP's score: a weight's share of the energy of all weights at least as large.

    ``Imp(W_pj) = W_pj² / Σ_{i ≤ j} W_pi²``, with weights sorted largest first.

    >>> importance(torch.tensor([1.0, 2.0, 2.0])).tolist()
    [0.1111111111111111, 0.5, 1.0]

    Args:
        magnitudes: |w| of one layer (d,), ascending.

    Returns:
        The scores (d,) in the same order, ascending; 1 for the largest weight, 0 for zeros.
    """
    energy = magnitudes.double().square()
    at_least_as_large = energy.flip(0).cumsum(0).flip(0)
    scores = energy.div_(at_least_as_large.clamp_min_(torch.finfo(torch.float64).tiny))
    # Float rounding can swap neighbouring scores; cummax keeps them monotone.
    return scores.cummax(0).values if len(scores) else scores


@dataclass(frozen=True)
class Dimap(RankedByMagnitude):
    """Prunes by DIMAP's score, with one threshold for each module (QKV, PRJ, MLP).

    All modules are pruned to the same sparsity.
    """

    scope: Scope = "module"
    name: str = "dimap"

    def score(self, magnitudes: Tensor) -> Tensor:
        """DIMAP's score (:func:`importance`)."""
        return importance(magnitudes)


@dataclass(frozen=True)
class Lamp(Dimap):
    """LAMP (Lee et al., ICLR 2021): the same score, with one threshold for the whole model."""

    scope: Scope = "global"
    name: str = "lamp"
