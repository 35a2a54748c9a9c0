"""Accumulate what a worker measures while it trains, without synchronising with the device at each step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pruners.errors import InputError
from trainers import distributed


@dataclass
class MetricsAccumulator:
    """Losses and learning rates of the epoch so far, and counts of what went wrong in the whole run.

    The values of a step stay on the device until :meth:`check_gradients` and :meth:`reduce`; all workers call
    the latter together. The public attributes are stored in checkpoints by their names.

    Attributes:
        losses: mean loss over the workers of each step of the epoch.
        rates: learning rate of each step of the epoch.
        skipped: images of the run that could not be read.
        left_out: steps of the run that were left out because their loss or gradients were not finite.
        overflows: steps whose loss was finite but whose gradients overflowed in float16.
        idle: the number of latest steps in a row that were left out.
        facts: other figures of the epoch, which are reported by their names.
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
    _finite: list[bool] = field(default_factory=list)

    def record(self, loss: Tensor, rate: float, skipped: Tensor, norm: Tensor) -> None:
        """Record a step.

        Args:
            loss: this worker's part of the loss, a scalar.
            rate: the learning rate.
            skipped: images that were skipped for each image of this worker, (N,).
            norm: the norm of all gradients, a scalar, the same on every worker.
        """
        self._pending.append(loss)
        self._norms.append(norm)
        self._skipped.append(skipped.sum())
        self.rates.append(rate)

    def check_gradients(self) -> list[bool]:
        """Return whether the gradients of each step since the last call were finite; waits for the device."""
        new: list[bool] = torch.isfinite(torch.stack(self._norms)).tolist() if self._norms else []
        for finite in new:
            self.idle = 0 if finite else self.idle + 1
        self._finite += new
        self._norms = []
        return new

    def reduce(self) -> list[tuple[float, bool]]:
        """Average the losses over the workers, and sum the counts.

        Returns:
            For each step since the last call, the loss and whether the gradients were finite.
        """
        self.check_gradients()
        if not self._pending:
            return []
        losses = distributed.mean_over_workers(torch.stack(self._pending).double()).tolist()
        new = list(zip(losses, self._finite, strict=True))
        self.losses += losses
        skipped = distributed.mean_over_workers(torch.stack(self._skipped).sum().double())
        self.skipped += round(float(skipped) * distributed.world_size())
        self._pending, self._skipped, self._finite = [], [], []
        return new

    def check(self, limit: int) -> None:
        """Add the counts to :attr:`facts`, and check how many images were skipped.

        Args:
            limit: how many the recipe allows.

        Raises:
            InputError: more images were skipped.
        """
        self.facts["skipped_images"] = self.skipped
        self.facts["skipped_steps"] = self.left_out + self.overflows
        if self.skipped > limit:
            expected = f"{self.skipped} images of training could not be read; see 'espalier data check'"
            raise InputError("data.bad_limit", limit, expected)

    def next_epoch(self) -> None:
        """Forget what belongs to the epoch that has ended."""
        self.losses, self.rates, self.facts = [], [], {}

    def state(self) -> dict[str, Any]:
        """The public attributes, as JSON can hold them; steps that are not reduced yet are not in it."""
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}

    @classmethod
    def restored(cls, state: dict[str, Any]) -> MetricsAccumulator:
        """The inverse of :meth:`state`."""
        return cls(**state)
