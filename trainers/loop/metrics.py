"""What a worker measures while it trains, without waiting for the device: losses, rates, skipped images."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pruners.errors import InputError
from trainers import distributed

Metrics = dict[str, Any]


def numbers(metrics: Metrics) -> Metrics:
    """Those of some metrics that are numbers, as JSON can hold them: it knows no NaN and nothing infinite."""
    return {
        key: value
        for key, value in metrics.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


@dataclass
class MetricsAccumulator:
    """Losses and rates of the epoch so far, and of the whole run what went wrong.

    What a step gives stays on the device until :meth:`look` and :meth:`settle`; all workers call the latter
    together.

    Attributes:
        skipped: images that could not be read.
        left_out: steps that were left out as their losses or gradients were not finite.
        overflows: steps whose loss was finite, and whose gradients float16 could not hold at its scale.
        idle: steps up to now that were left out one after the other.
    """

    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    skipped: int = 0
    left_out: int = 0
    overflows: int = 0
    idle: int = 0
    facts: dict[str, float] = field(default_factory=dict)
    _pending: list[Tensor] = field(default_factory=list)
    _skipped: list[Tensor] = field(default_factory=list)
    _norms: list[Tensor] = field(default_factory=list)
    _sound: list[bool] = field(default_factory=list)

    def record(self, loss: Tensor, rate: float, skipped: Tensor, norm: Tensor) -> None:
        """A step: this worker's part of the loss, how many images were skipped for each of its own, and the
        norm of all gradients, which is the same on every worker."""
        self._pending.append(loss)
        self._norms.append(norm)
        self._skipped.append(skipped.sum())
        self.rates.append(rate)

    def look(self) -> list[bool]:
        """Whether the gradients of each step since the last look were finite; waits for the device."""
        new: list[bool] = torch.isfinite(torch.stack(self._norms)).tolist() if self._norms else []
        for sound in new:
            self.idle = 0 if sound else self.idle + 1
        self._sound += new
        self._norms = []
        return new

    def settle(self) -> list[tuple[float, bool]]:
        """Bring losses and counts of all workers together.

        Returns:
            Of each step since it was done last, the loss and whether the gradients were finite.
        """
        self.look()
        if not self._pending:
            return []
        losses = distributed.mean_over_workers(torch.stack(self._pending).double()).tolist()
        new = list(zip(losses, self._sound, strict=True))
        self.losses += losses
        skipped = distributed.mean_over_workers(torch.stack(self._skipped).sum().double())
        self.skipped += round(float(skipped) * distributed.world_size())
        self._pending, self._skipped, self._sound = [], [], []
        return new

    def check(self, limit: int) -> None:
        """Raises:
        InputError: more images were skipped than the recipe allows.
        """
        self.facts["skipped_images"] = self.skipped
        self.facts["skipped_steps"] = self.left_out + self.overflows
        if self.skipped > limit:
            expected = f"{self.skipped} images of training could not be read; see 'espalier data check'"
            raise InputError("data.bad_limit", limit, expected)

    def next_epoch(self) -> None:
        self.losses, self.rates, self.facts = [], [], {}

    def state(self) -> dict[str, Any]:
        """As JSON can hold it; what is not settled is not in it."""
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}

    @classmethod
    def restored(cls, state: dict[str, Any]) -> MetricsAccumulator:
        return cls(**state)
