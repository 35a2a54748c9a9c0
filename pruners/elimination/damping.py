"""``damp: auto``: the λ of a ladder that leaves the least one-shot loss on held-out training data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pruners.errors import InputError

LADDER = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)


@dataclass(frozen=True)
class DampChoice:
    """The λ that was taken, and the held-out loss at each one that was tried (``inf``: it failed)."""

    damp: float
    losses: dict[float, float]

    @property
    def why(self) -> str:
        """One line for a log."""
        tried = ", ".join(f"{damp:g}: {loss:.4f}" for damp, loss in self.losses.items())
        return f"damp {self.damp:g} has the lowest held-out loss after one shot ({tried})"


def choose_damp(loss_at: Callable[[float], float], ladder: Sequence[float] = LADDER) -> DampChoice:
    """Try every λ of ``ladder``; of equal losses the larger λ, which is the safer one.

    Args:
        loss_at: the held-out loss of the model pruned with a λ; an :class:`InputError` counts as infinite.

    Raises:
        InputError: none of them gives a finite loss.
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
