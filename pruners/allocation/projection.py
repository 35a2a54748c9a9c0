"""Projection of sparsities onto a budget: whole weights, within bounds, exact in total."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pruners.errors import InputError, check_share
from pruners.model.layers import PrunableLayer


def budget(layers: Sequence[PrunableLayer], sparsity: float) -> int:
    """The number of weights to prune for a sparsity of 0 to 1.

    Raises:
        InputError: ``sparsity`` lies outside 0…1.
    """
    check_share("sparsity", sparsity)
    return round(sparsity * sum(layer.numel for layer in layers))


def project(
    desired: Sequence[float],
    sizes: Sequence[int],
    total: int,
    lower: Sequence[int] | None = None,
    upper: Sequence[int] | None = None,
    *,
    unit: int = 1,
) -> list[int]:
    """Find the counts nearest to some desired sparsities that add up to a budget.

    The same shift is added to every sparsity, and each result is clipped to its bounds. That is the
    projection in the norm weighted by group size. Counts are then rounded by largest remainders.
    Sparsities that meet the budget already are not changed.

    >>> project([0.5, 0.5], sizes=[10, 30], total=24)
    [6, 18]

    Args:
        desired: sparsity of each group; any real number, it is clipped.
        sizes: number of weights in each group.
        total: number of weights to prune over all groups.
        lower: least count of each group; default 0.
        upper: largest count of each group; default its size.
        unit: all counts are multiples of it, as ``total`` and the bounds are.

    Returns:
        Number of weights to prune in each group; the sum is ``total``.

    Raises:
        InputError: the bounds do not allow ``total``; the error names the nearest total that they allow.
    """
    low = np.zeros(len(sizes)) if lower is None else np.asarray(lower, dtype=np.float64)
    high = np.asarray(sizes if upper is None else upper, dtype=np.float64)
    check_feasible(total, low, high)
    if unit > 1:
        whole = [[int(count) // unit for count in group] for group in (sizes, low, high)]
        return [unit * count for count in project(desired, whole[0], total // unit, whole[1], whole[2])]
    size = np.asarray(sizes, dtype=np.float64)
    wish = np.asarray(desired, dtype=np.float64) * size

    def counts(shift: float) -> np.ndarray:
        return np.asarray(np.clip(wish + shift * size, low, high))

    # wide enough for every group to reach either bound, however far its desired sparsity lies outside 0…1
    reach = 1.0 + float(np.max(np.abs(wish / np.maximum(size, 1.0)), initial=0.0))
    left, right = -reach, reach
    for _ in range(100):
        middle = (left + right) / 2
        if counts(middle).sum() < total:
            left = middle
        else:
            right = middle
    shift = 0.0 if abs(counts(0.0).sum() - total) < 1e-6 else right
    return _round_to(counts(shift), total, low, high)


def _round_to(real: np.ndarray, total: int, low: np.ndarray, high: np.ndarray) -> list[int]:
    """Round to a sum of ``total``; each result stays within one of its real value, and in its bounds."""
    whole = np.floor(real + 1e-9)
    missing = int(total - whole.sum())
    step = 1 if missing >= 0 else -1
    room = (whole < high) if step > 0 else (whole > low)
    ranked = np.argsort(-step * (real - whole), kind="stable")
    for index in [index for index in ranked if room[index]][: abs(missing)]:
        whole[index] += step
    assert int(whole.sum()) == total, "the rounding missed the budget"
    return [int(count) for count in whole]


def check_feasible(total: int, low: np.ndarray, high: np.ndarray) -> None:
    """Check that bounds allow a budget: Σ low ≤ total ≤ Σ high.

    Args:
        total: number of weights to prune.
        low: least count of each layer or group, (n,).
        high: largest count of each, (n,).

    Raises:
        InputError: they do not; the error names the nearest budget that they allow.
    """
    if (low > high).any():
        raise InputError("floor", int(low[low > high][0]), "must not lie above the layer's ceiling")
    if not low.sum() <= total <= high.sum():
        nearest = int(low.sum() if total < low.sum() else high.sum())
        raise InputError(
            "budget",
            total,
            f"cannot be met within the floors and ceilings; nearest feasible: {nearest} weights",
        )
