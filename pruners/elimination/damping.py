"""``damp: auto``: choose the λ that gives the lowest loss on held-out training data after one shot."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pruners.errors import InputError

LADDER = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
"""The λ that are tried, largest first."""


@dataclass(frozen=True)
class DampChoice:
    """A choice among several λ.

    Attributes:
        damp: the λ that was chosen.
        losses: the held-out loss at each λ that was tried; ``inf`` where it failed.
    """

    damp: float
    losses: dict[float, float]

    @property
    def why(self) -> str:
        """The reason for the choice, as one line for a log."""
        tried = ", ".join(f"{damp:g}: {loss:.4f}" for damp, loss in self.losses.items())
        return f"damp {self.damp:g} has the lowest held-out loss after one shot ({tried})"


def choose_damp(loss_at: Callable[[float], float], ladder: Sequence[float] = LADDER) -> DampChoice:
    """Try several λ and choose the one with the lowest loss; of equal losses the larger, safer λ.

    Args:
        loss_at: returns the held-out loss of the model pruned with a λ. An :class:`InputError` with the key
            ``damp`` counts as an infinite loss.
        ladder: the λ to try.

    Returns:
        The choice, with all losses.

    Raises:
        InputError: no λ gives a finite loss.
    """
    losses = {}
    for damp in ladder:
        try:
            loss = loss_at(damp)
        except InputError as error:
            if error.key != "damp":
                raise
            loss = math.inf
        losses[damp] = loss if math.isfinite(loss) else math.inf
    best = min(losses, key=lambda damp: (losses[damp], -damp))
    if math.isinf(losses[best]):
        raise InputError("damp", "auto", f"none of {', '.join(f'{d:g}' for d in ladder)} gives a finite loss")
    return DampChoice(best, losses)
