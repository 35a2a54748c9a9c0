"""Exact budgets: the projection against a brute force, thresholds against a sort, gradual scaling."""

from __future__ import annotations

import itertools
from typing import get_args

import numpy as np
import pytest
import torch
from helpers import lone_layer, quick
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from pruners import Allocation, InputError, PrunableLayer, Scope, allocate
from pruners.allocation.projection import budget, project
from pruners.allocation.sharing import GROUP_OF, by_threshold, scale


@st.composite
def problems(
    draw: st.DrawFn, largest: int = 2000, groups: int = 6, far: float = 1e6
) -> tuple[list[float], list[int], int, list[int], list[int]]:
    """desired (some far outside 0…1), sizes, a feasible total, lower, upper."""
    sizes = draw(st.lists(st.integers(1, largest), min_size=1, max_size=groups))
    bounds = [sorted([draw(st.integers(0, size)), draw(st.integers(0, size))]) for size in sizes]
    lower, upper = [low for low, _ in bounds], [high for _, high in bounds]
    wish = st.one_of(st.floats(0, 1), st.floats(-3, 4), st.sampled_from([0.0, 1.0, -far, far]))
    desired = [draw(wish) for _ in sizes]
    return desired, sizes, draw(st.integers(sum(lower), sum(upper))), lower, upper


@given(problem=problems())
@quick(300)
def test_sharing__projection_is_exact_and_within_bounds(
    problem: tuple[list[float], list[int], int, list[int], list[int]],
) -> None:
    desired, sizes, total, lower, upper = problem
    counts = project(desired, sizes, total, lower, upper)
    assert sum(counts) == total
    assert all(low <= count <= high for low, count, high in zip(lower, counts, upper, strict=True))
    assert all(isinstance(count, int) for count in counts)


def nearest(wish: np.ndarray, size: np.ndarray, total: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """argmin Σ size·(c/size − desired)² over real c with Σ c = total and bounds, by trying every set of
    bounds that may be tight."""
    best, best_cost = low.astype(float), np.inf
    for state in itertools.product(("low", "high", "free"), repeat=len(size)):
        free = np.array([s == "free" for s in state])
        counts = np.where(np.array([s == "low" for s in state]), low, high).astype(float)
        left = total - counts[~free].sum()
        if free.any():
            counts[free] = wish[free] + size[free] * (left - wish[free].sum()) / size[free].sum()
        if abs(counts.sum() - total) > 1e-6 or (counts < low - 1e-9).any() or (counts > high + 1e-9).any():
            continue
        cost = float((size * ((counts - wish) / size) ** 2).sum())
        if cost < best_cost:
            best, best_cost = counts, cost
    assert best_cost < np.inf
    return best


@given(problem=problems(largest=40, groups=4, far=9.0))
@quick(200)
def test_sharing__projection_is_the_nearest_in_the_weighted_norm_up_to_rounding(
    problem: tuple[list[float], list[int], int, list[int], list[int]],
) -> None:
    desired, sizes, total, lower, upper = problem
    size, low, high = (np.array(part, dtype=float) for part in (sizes, lower, upper))
    expected = nearest(np.array(desired) * size, size, total, low, high)
    counts = np.array(project(desired, sizes, total, lower, upper))
    assert (np.abs(counts - expected) < 1 + 1e-6).all()


def test_sharing__every_group_gets_the_same_shift() -> None:
    assert project([0.2, 0.4], [100, 1000], 530) == [30, 500]
    # the first is stopped by its bound, the rest goes to the second
    assert project([0.2, 0.4], [100, 1000], 530, upper=[25, 1000]) == [25, 505]


def test_sharing__rounding_goes_to_the_largest_remainders() -> None:
    assert project([0.15, 0.18, 0.17], [10, 10, 10], 5) == [1, 2, 2]
    assert project([0.1, 0.1, 0.1], [7, 7, 7], 2) == [1, 1, 0]  # ties: the first


@given(sizes=st.lists(st.integers(1, 10**7), min_size=1, max_size=8), data=st.data())
@quick(150)
def test_sharing__on_budget_it_stays_unchanged(sizes: list[int], data: st.DataObject) -> None:
    counts = [data.draw(st.integers(0, size)) for size in sizes]
    desired = [count / size for count, size in zip(counts, sizes, strict=True)]
    assert project(desired, sizes, sum(counts)) == counts


def test_sharing__infeasible_budgets_name_the_nearest_feasible() -> None:
    with pytest.raises(InputError, match=r"budget = 31: .*nearest feasible: 30 weights"):
        project([0.5, 0.5], [10, 20], 31)
    with pytest.raises(InputError, match=r"budget = 6: .*nearest feasible: 7 weights"):
        project([0.5, 0.5], [10, 20], 6, lower=[3, 4])
    with pytest.raises(InputError, match=r"budget = 10: .*nearest feasible: 9 weights"):
        project([0.5, 0.5], [10, 20], 10, upper=[4, 5])
    with pytest.raises(InputError, match="floor = 5: must not lie above"):
        project([0.5, 0.5], [10, 20], 10, lower=[5, 0], upper=[4, 20])


@pytest.mark.parametrize("sparsity", [-0.01, 1.01, float("nan"), float("inf")])
def test_sharing__a_sparsity_outside_its_range_is_named(sparsity: float) -> None:
    with pytest.raises(InputError, match="sparsity"):
        budget([lone_layer(3, 3)], sparsity)


def test_sharing__the_budget_is_a_count_of_weights() -> None:
    layers = [lone_layer(10, 10, name="a"), lone_layer(1, 1, name="b")]
    assert [budget(layers, sparsity) for sparsity in (0, 0.5, 0.75, 1)] == [0, 50, 76, 101]


LAYERS = [
    lone_layer(6, 5, name="a", module="QKV", stage=0),
    lone_layer(5, 4, name="b", module="MLP", stage=0),
    lone_layer(7, 7, name="c", module="QKV", stage=1),
    lone_layer(1, 3, name="d", module="MLP", stage=1),
]
NUMEL = sum(layer.numel for layer in LAYERS)


def losses(seed: int = 0, *, ties: bool = False) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    drawn = {layer.name: torch.rand(layer.numel, generator=random) for layer in LAYERS}
    if ties:
        drawn = {name: (values * 4).floor() for name, values in drawn.items()}
    return {name: values.sort().values for name, values in drawn.items()}


def lowest(layer_losses: dict[str, Tensor], layers: list[PrunableLayer], total: int) -> Allocation:
    """The oracle: Python's sort over (loss, layer's number)."""
    ranked = sorted(
        (float(loss), number) for number, layer in enumerate(layers) for loss in layer_losses[layer.name]
    )
    chosen = [number for _, number in ranked[:total]]
    return {layer.name: chosen.count(number) for number, layer in enumerate(layers)}


@given(seed=st.integers(0, 999), ties=st.booleans(), total=st.integers(0, NUMEL))
@quick(100)
def test_sharing__a_threshold_takes_the_lowest_losses(seed: int, ties: bool, total: int) -> None:
    layer_losses = losses(seed, ties=ties)
    assert by_threshold(layer_losses, LAYERS, total) == lowest(layer_losses, LAYERS, total)
    assert allocate(layer_losses, LAYERS, total, "global") == lowest(layer_losses, LAYERS, total)


@pytest.mark.parametrize("scope", get_args(Scope))
@given(seed=st.integers(0, 999), total=st.integers(0, NUMEL))
@quick(60)
def test_sharing__groups_share_one_sparsity_and_each_has_its_threshold(
    scope: Scope, seed: int, total: int
) -> None:
    layer_losses = losses(seed)
    allocation = allocate(layer_losses, LAYERS, total, scope)
    assert list(allocation) == [layer.name for layer in LAYERS]
    assert sum(allocation.values()) == total
    groups: dict[object, list[PrunableLayer]] = {}
    for layer in LAYERS:
        groups.setdefault(GROUP_OF[scope](layer), []).append(layer)
    for group in groups.values():
        count = sum(allocation[layer.name] for layer in group)
        assert abs(count - total / NUMEL * sum(layer.numel for layer in group)) < 1
        expected = lowest(layer_losses, group, count)
        assert {layer.name: allocation[layer.name] for layer in group} == expected


@pytest.mark.parametrize(("scope", "groups"), [("layer", 4), ("module", 2), ("stage", 2), ("global", 1)])
def test_sharing__scopes_group_as_they_say(scope: Scope, groups: int) -> None:
    assert len({GROUP_OF[scope](layer) for layer in LAYERS}) == groups
    names = {frozenset(x.name for x in LAYERS if GROUP_OF[scope](x) == GROUP_OF[scope](y)) for y in LAYERS}
    expected = {
        "layer": {frozenset("a"), frozenset("b"), frozenset("c"), frozenset("d")},
        "module": {frozenset("ac"), frozenset("bd")},
        "stage": {frozenset("ab"), frozenset("cd")},
        "global": {frozenset("abcd")},
    }
    assert names == expected[scope]


@pytest.mark.parametrize("scope", get_args(Scope))
@given(seed=st.integers(0, 99), data=st.data())
@quick(60)
def test_sharing__floors_and_ceilings_hold_for_every_layer(
    scope: Scope, seed: int, data: st.DataObject
) -> None:
    low, high = sorted([data.draw(st.integers(0, 100)), data.draw(st.integers(0, 100))])
    least = {layer.name: -(-low * layer.numel // 100) for layer in LAYERS}
    most = {layer.name: high * layer.numel // 100 for layer in LAYERS}
    assume(all(least[name] <= most[name] for name in least))
    total = data.draw(st.integers(sum(least.values()), sum(most.values())))
    allocation = allocate(losses(seed), LAYERS, total, scope, floor=low / 100, ceiling=high / 100)
    assert sum(allocation.values()) == total
    assert all(least[name] <= count <= most[name] for name, count in allocation.items())


def test_sharing__within_the_floors_and_ceilings_the_lowest_losses_go() -> None:
    layer_losses = {"a": torch.arange(10.0), "b": torch.arange(10.0) + 100}
    layers = [lone_layer(10, name="a"), lone_layer(10, name="b")]
    assert allocate(layer_losses, layers, 10, "global") == {"a": 10, "b": 0}
    assert allocate(layer_losses, layers, 10, "global", floor=0.2) == {"a": 8, "b": 2}
    assert allocate(layer_losses, layers, 10, "global", ceiling=0.7) == {"a": 7, "b": 3}
    with pytest.raises(InputError, match="nearest feasible: 14 weights"):
        allocate(layer_losses, layers, 15, "global", ceiling=0.7)


def test_sharing__floor_and_ceiling_may_be_the_same_round_number() -> None:
    layers = [lone_layer(10, 10, name="a"), lone_layer(10, 10, name="b")]
    layer_losses = {"a": torch.arange(100.0), "b": torch.arange(100.0)}
    for percent in range(101):
        expected = {"a": percent, "b": percent}
        share = percent / 100
        assert allocate(layer_losses, layers, 2 * percent, "global", floor=share, ceiling=share) == expected


def test_sharing__an_unknown_scope_is_named() -> None:
    with pytest.raises(InputError, match=r"scope = 'modul'.*did you mean 'module'"):
        allocate(losses(), LAYERS, 5, "modul")  # type: ignore[arg-type]


@given(data=st.data())
@quick(150)
def test_sharing__a_gradual_run_only_adds_zeros_and_ends_at_the_allocation(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 500), min_size=1, max_size=6))
    layers = [lone_layer(size, name=str(i)) for i, size in enumerate(sizes)]
    final = {layer.name: data.draw(st.integers(0, layer.numel)) for layer in layers}
    goal = sum(final.values())
    totals = sorted(data.draw(st.lists(st.integers(0, goal), max_size=5)))
    reached: Allocation = {layer.name: 0 for layer in layers}
    for total in [*totals, goal]:
        step = scale(final, layers, total, at_least=reached)
        assert sum(step.values()) == total
        assert all(reached[name] <= step[name] <= final[name] for name in final)
        reached = step
    assert reached == final


def test_sharing__scaling_keeps_the_proportions() -> None:
    layers = [lone_layer(100, name="a"), lone_layer(1000, name="b")]
    assert scale({"a": 80, "b": 200}, layers, 140, {"a": 0, "b": 0}) == {"a": 40, "b": 100}
    # what one layer has already is not given back; the other waits for it
    assert scale({"a": 80, "b": 200}, layers, 140, {"a": 70, "b": 0}) == {"a": 70, "b": 70}
