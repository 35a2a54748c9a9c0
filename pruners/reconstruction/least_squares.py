"""Least squares over the kept weights of a layer, all outputs at once.

For an output with kept inputs S the weights w minimise E (w·x - y)² + λ |w - w₀|², that is, they solve
(H + λ I)_SS w_S = (c + λ w₀)_S with H = E xxᵀ and c = E yx, of centred x and y where a bias makes the
means right. Every output has another S, so a factorisation would be needed for each; conjugate gradients need
one product with the common H a step for all of them. (Hastie, Tibshirani, Friedman: The Elements of
Statistical Learning, 3.4.1; Shewchuk: An Introduction to the Conjugate Gradient Method, B3.)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Summed = Callable[[Tensor], object]
"""Sums a tensor over all workers, in place, on each of them."""

STEPS = 40
"""Conjugate gradient steps at most."""
_ENOUGH = 1e-12  # squared residual, as a share of the first one; further steps change nothing measurable


class Moments:
    """First and second moments of a layer's inputs x and of the outputs y that it should have.

    Args:
        inputs, outputs: of the layer.
        like: a tensor of the type and on the device that the sums are to have.
        bias: whether the layer has a bias, which then fits the means, so that x and y are centred.
    """

    def __init__(self, inputs: int, outputs: int, like: Tensor, *, bias: bool) -> None:
        self._bias = bias
        self._count = 0
        self._x, self._y, self._y2 = (like.new_zeros(size) for size in (inputs, outputs, outputs))
        self._xx, self._yx = like.new_zeros(inputs, inputs), like.new_zeros(outputs, inputs)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add some tokens.

        Args:
            x: inputs, (tokens, inputs).
            y: the outputs that they should have, (tokens, outputs).
        """
        self._count += len(x)
        self._x += x.sum(0)
        self._y += y.sum(0)
        self._y2 += y.square().sum(0)
        self._xx.addmm_(x.T, x)
        self._yx.addmm_(y.T, x)

    def sum_over(self, summed: Summed) -> None:
        """Sum the moments over all workers, in place: all have the same moments afterwards."""
        count = torch.tensor(self._count, device=self._x.device)
        for sums in (count, self._x, self._y, self._y2, self._xx, self._yx):
            summed(sums)
        self._count = int(count)

    @property
    def finite(self) -> bool:
        """Return whether no input or output was NaN or infinite."""
        return all(bool(torch.isfinite(sums).all()) for sums in (self._xx, self._y2))

    def covariances(self) -> tuple[Tensor, Tensor]:
        """(inputs, inputs) of x, and (outputs, inputs) of y and x; about zero where there is no bias."""
        x, y = self._means()
        return self._xx / self._count - torch.outer(x, x), self._yx / self._count - torch.outer(y, x)

    def offset(self, weight: Tensor) -> Tensor:
        """The bias that makes the outputs' means right, (outputs,)."""
        x, y = self._means()
        return y - weight @ x

    def error(self, weight: Tensor) -> float:
        """Mean squared error of the outputs, with the best bias, as a share of their variance."""
        covariance, cross = self.covariances()
        variance = (self._y2 / self._count - self._means()[1].square()).sum()
        error = variance + ((weight @ covariance - 2 * cross) * weight).sum()
        return float(error.clamp_min(0) / variance.clamp_min(torch.finfo(variance.dtype).tiny))

    def _means(self) -> tuple[Tensor, Tensor]:
        count = self._count if self._bias else math.inf
        return self._x / count, self._y / count


def solve(moments: Moments, weight: Tensor, mask: Tensor, ridge: float) -> Tensor:
    """Solve for the kept weights of a layer that fit its outputs best, on average over the images.

    Args:
        moments: of the layer's inputs and of the outputs that it should have.
        weight: the present weights, (outputs, inputs), zero where pruned; λ keeps the new ones near them.
        mask: ``True`` for kept weights, of the same shape.
        ridge: λ, as a share of the mean variance of the inputs.

    Returns:
        New weights, zero where pruned.
    """
    covariance, target = moments.covariances()
    shift = ridge * covariance.diagonal().mean()
    kept = mask.to(covariance.dtype)
    scale = 1 / (covariance.diagonal() + shift).clamp_min(torch.finfo(covariance.dtype).tiny)

    def product(vectors: Tensor) -> Tensor:
        return torch.addmm(shift * vectors, vectors, covariance) * kept

    solution = weight.to(covariance.dtype) * kept
    residual = (target + shift * solution) * kept - product(solution)
    scaled = residual * scale
    direction = scaled
    square = (residual * scaled).sum(1, keepdim=True)
    first = square.sum()
    for _ in range(STEPS):
        if square.sum() <= _ENOUGH * first:
            break
        image = product(direction)
        length = _quotient(square, (direction * image).sum(1, keepdim=True))
        solution = solution + length * direction
        residual = residual - length * image
        scaled = residual * scale
        square, before = (residual * scaled).sum(1, keepdim=True), square
        direction = scaled + _quotient(square, before) * direction
    return solution.to(weight.dtype)


def _quotient(above: Tensor, below: Tensor) -> Tensor:
    """``above / below``, 0 where ``below`` is not positive: an output that is solved, or has no weight."""
    return torch.where(below > 0, above / below, torch.zeros_like(above))
