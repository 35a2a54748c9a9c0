"""What a worker measures while it trains, without waiting for the device: losses, rates, skipped images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pruners.errors import InputError
from trainers import distributed

Metrics = dict[str, Any]


@dataclass
class Meter:
    """Losses and rates of the epoch so far; ``skipped`` images and steps ``left_out`` of the whole run.

    What a step gives stays on the device until :meth:`settle`, which all workers call together.
    """

    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    skipped: int = 0
    left_out: int = 0
    facts: dict[str, float] = field(default_factory=dict)
    _pending: list[Tensor] = field(default_factory=list)
    _skipped: list[Tensor] = field(default_factory=list)

    def record(self, loss: Tensor, rate: float, skipped: Tensor) -> None:
        """A step: this worker's part of the loss, and how many images were skipped for each of its own."""
        self._pending.append(loss)
        self._skipped.append(skipped.sum())
        self.rates.append(rate)

    def settle(self) -> None:
        """Bring losses and counts of all workers together."""
        if not self._pending:
            return
        self.losses += distributed.mean_over_workers(torch.stack(self._pending).double()).tolist()
        found = distributed.mean_over_workers(torch.stack(self._skipped).sum().double())
        self.skipped += round(float(found) * distributed.world_size())
        self._pending, self._skipped = [], []

    def check(self, limit: int) -> None:
        """Raises:
        InputError: more images were skipped than the recipe allows.
        """
        self.facts["skipped_images"] = self.skipped
        self.facts["skipped_steps"] = self.left_out
        if self.skipped > limit:
            expected = f"{self.skipped} images of training could not be read; see 'espalier data check'"
            raise InputError("data.bad_limit", limit, expected)

    def next_epoch(self) -> None:
        self.losses, self.rates, self.facts = [], [], {}

    def state(self) -> dict[str, Any]:
        """As JSON can hold it; what is not settled is not in it."""
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}

    @classmethod
    def restored(cls, state: dict[str, Any]) -> Meter:
        return cls(**state)
