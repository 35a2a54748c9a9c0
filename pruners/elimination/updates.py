"""Updates of the weights that stay when others are eliminated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pruners.elimination import kernels


@dataclass(frozen=True)
class UpdateSegment:
    """Consecutive steps of the elimination of n Fisher blocks, with their updates of the weights that stay.

    Over the steps that are taken, ``w −= Σ y_i·v_i``.

    Attributes:
        block: number of the first of the n blocks in the layer.
        begin: how many weights the blocks had lost before the first step: one number, or (n,).
        columns: (n, numbers), v of one step after the other, in float32, or as :meth:`rounded`.
        coefficients: y (n, steps).
        slots: (n, r), the positions in the block that the r numbers of the first step belong to.
        end: (n,), how many weights of each block were eliminated when a later elimination took over; steps
            from there on do not count. ``None``: all count.
        panel: if not 0, the positions that are eliminated last come first, and after this many steps the
            columns are as much shorter.
    """

    block: int
    begin: int | Tensor
    columns: Tensor
    coefficients: Tensor
    slots: Tensor
    end: Tensor | None = None
    panel: int = 0

    def apply_(self, weights: Tensor, eliminated: Tensor, part: slice) -> None:
        """Update weights in place.

        Args:
            weights: (blocks, B), all Fisher blocks of a layer.
            eliminated: (blocks,), how many weights of each block are eliminated; steps beyond do nothing.
            part: which blocks to update.
        """
        first = max(self.block, part.start)
        last = min(self.block + len(self.columns), part.stop)
        if first >= last:
            return
        own = slice(first - self.block, last - self.block)
        columns, coefficients, slots = self.columns[own], self.coefficients[own], self.slots[own]
        weights, done = weights[first:last], eliminated[first:last]
        steps, size = coefficients.shape[1], slots.shape[1]
        device = eliminated.device  # the segment itself may be in other memory
        if self.end is not None:
            done = torch.minimum(done, self.end[own].to(device))
        done = done - (self.begin[own].to(device) if isinstance(self.begin, Tensor) else self.begin)
        stay = (size - done).clamp_(0, size) if self.panel else torch.full_like(done, size)
        done = done.clamp_(0, steps)
        most = int(done.max())
        if not most:
            return
        if kernels.threads.supports(eliminated, columns):
            kernels.steps.apply_steps(
                weights.numpy(),
                done.numpy(),
                stay.numpy(),
                coefficients.numpy(),
                columns.numpy(),
                slots.numpy(),
                self.panel or steps,
            )
            return
        taken = torch.arange(steps, device=device) < done.unsqueeze(1)
        y = (coefficients.to(device) * taken).unsqueeze(1)
        for now, begin, width in _panels(most, size, self.panel or steps):
            count = now.stop - now.start
            v = columns[:, begin : begin + count * width].to(device).float().reshape(-1, count, width)
            change = torch.bmm(y[:, :, now], v).squeeze(1)
            weights.scatter_add_(1, slots[:, :width].to(device).long(), change.neg_())

    def beyond(self, eliminated: Tensor) -> UpdateSegment | None:
        """The segment without the steps that have been taken when some weights are eliminated.

        Args:
            eliminated: (blocks,), how many weights of each of the layer's blocks.

        Returns:
            The later steps of all blocks; steps that only some blocks have taken do nothing there. ``None``:
            there is none.
        """
        taken = eliminated[self.block : self.block + len(self.columns)].to(self.columns.device)
        if self.end is not None:
            taken = torch.minimum(taken, self.end)
        steps, size = self.coefficients.shape[1], self.slots.shape[1]
        taken = (taken - self.begin).clamp_(0, steps)
        whole = int(taken.min())
        if self.panel:
            whole = whole // self.panel * self.panel
        if whole >= steps:
            return None
        begin = sum(_width(step, size, self.panel) for step in range(whole))
        number = torch.arange(steps, device=taken.device)
        return replace(
            self,
            begin=self.begin + whole,
            columns=self.columns[:, begin:].contiguous(),
            coefficients=self.coefficients.masked_fill(number < taken.unsqueeze(1), 0.0)[
                :, whole:
            ].contiguous(),
            slots=self.slots[:, : _width(whole, size, self.panel)].contiguous(),
        )

    def rounded(self) -> UpdateSegment:
        """The same updates with 16 bits for each number, as they are stored.

        The numbers v of a step become integers that count shares of the largest of them, so that each is off
        by at most 1/65534 of that. The coefficients hold the share.
        """
        steps, size = self.coefficients.shape[1], self.slots.shape[1]
        if self.columns.dtype == torch.int16 or not steps:
            return self
        columns, coefficients = _rounded_steps(self.columns, self.coefficients, size, self.panel or steps)
        return replace(self, columns=columns, coefficients=coefficients)


def _width(step: int, size: int, panel: int) -> int:
    """Length of a column."""
    return size - step // panel * panel if panel else size


def _panels(steps: int, size: int, panel: int) -> Iterator[tuple[slice, int, int]]:
    """Steps of each panel, where their numbers begin, and the width of a column."""
    begin = 0
    for first in range(0, steps, panel):
        yield slice(first, min(first + panel, steps)), begin, size - first
        begin += panel * (size - first)


def _rounded_steps(numbers: Tensor, y: Tensor, size: int, panel: int) -> tuple[Tensor, Tensor]:
    """Numbers of :class:`UpdateSegment` as int16, and coefficients (n, steps) for them."""
    steps = y.shape[1]
    rounded = torch.empty(numbers.shape, dtype=torch.int16, device=numbers.device)
    scaled = torch.empty(y.shape, dtype=torch.float32, device=y.device)
    if kernels.threads.supports(numbers):

        def work(part: slice) -> None:
            inputs, outputs = (numbers[part].numpy(), y[part].numpy()), (rounded[part], scaled[part])
            kernels.steps.round_steps(*inputs, panel, size, *(one.numpy() for one in outputs))

        kernels.threads.on_threads(work, len(numbers))
        return rounded, scaled
    for now, begin, width in _panels(steps, size, panel):
        part = slice(begin, begin + (now.stop - now.start) * width)
        v = numbers[:, part].reshape(len(numbers), -1, width)
        scale = v.abs().amax(2) / kernels.steps.STEPS_OF_16_BITS
        shares = v / scale.masked_fill(scale == 0, 1.0).unsqueeze(2)
        rounded[:, part] = shares.round_().short().flatten(1)
        scaled[:, now] = y[:, now] * scale
    return rounded, scaled
