"""A real-valued allocation rounded to whole weights: within bounds, exact in its total."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pruners.errors import InputError
from pruners.model.layers import PrunableLayer


def budget(layers: Sequence[PrunableLayer], sparsity: float) -> int:
    """The number of weights that ``sparsity`` (0 to 1) of the prunable ones is.

    Raises:
        InputError: ``sparsity`` outside 0…1.
    """
    if not 0.0 <= sparsity <= 1.0:
        raise InputError("sparsity", sparsity, "must lie between 0 and 1")
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
    """Integer counts that add up to ``total``, nearest to the ``desired`` sparsities of groups of ``sizes``.

    The same shift is added to every sparsity and the result clipped to its bounds: the projection in the
    norm weighted by group size. Rounding goes to the largest remainders. Sparsities that already meet the
    budget come back unchanged.

    Args:
        desired: sparsity of each group, any real number (clipped).
        sizes: weights of each group.
        total: weights to prune over all groups.
        lower: least count of each group (default 0).
        upper: largest count of each group (default its size).
        unit: all counts are multiples of it, as ``total`` and the bounds are.

    Raises:
        InputError: bounds that cannot meet ``total``, with the nearest total that can be met.
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

    # wide enough for every group to reach either bound, however far its wish lies outside 0…1
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
    """Round so that the sum is ``total``; each result stays within one of its real value and its bounds."""
    whole = np.floor(real + 1e-9)
    missing = int(total - whole.sum())
    step = 1 if missing >= 0 else -1
    room = (whole < high) if step > 0 else (whole > low)
    ranked = np.argsort(-step * (real - whole), kind="stable")
    for index in [i for i in ranked if room[i]][: abs(missing)]:
        whole[index] += step
    assert int(whole.sum()) == total, "the rounding missed the budget"
    return [int(count) for count in whole]


def check_feasible(total: int, low: np.ndarray, high: np.ndarray) -> None:
    """Raise :class:`InputError`, with the nearest feasible budget, unless Σ low ≤ total ≤ Σ high."""
    if (low > high).any():
        raise InputError("floor", int(low[low > high][0]), "must not lie above the layer's ceiling")
    if not low.sum() <= total <= high.sum():
        nearest = int(low.sum() if total < low.sum() else high.sum())
        raise InputError(
            "budget",
            total,
            f"cannot be met within the floors and ceilings; nearest feasible: {nearest} weights",
        )
