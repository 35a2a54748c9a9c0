"""Floors, ceilings and tables by layer name, whole blocks, and what can be reached: kept to the weight."""

from __future__ import annotations

import pytest
import torch
from helpers import batches, lone_layer, quick, tiny_vit
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pruners import Allocation, InputError, PrunableLayer, Sharing, find_layers, prune
from pruners.allocation.bounds import bounds, per_layer
from pruners.allocation.sharing import by_table, by_threshold

LAYERS = [
    lone_layer(12, 10, name="blocks.0.attn.qkv.weight", module="QKV"),
    lone_layer(5, 8, name="blocks.0.mlp.fc1.weight"),
    lone_layer(12, 10, name="blocks.1.attn.qkv.weight", module="QKV", stage=1),
    lone_layer(5, 8, name="blocks.1.mlp.fc1.weight", stage=1),
    lone_layer(8, 4, name="blocks.1.attn.in_proj_weight", module="QKV", stage=1),
]
NAMES = [layer.name for layer in LAYERS]
NUMEL = {layer.name: layer.numel for layer in LAYERS}
TOTAL = sum(NUMEL.values())


def losses(seed: int = 0, unit: int = 1, levels: int | None = None) -> dict[str, Tensor]:
    """Ascending; with ``levels`` so many different ones at most; the same for what falls together."""
    random = torch.Generator().manual_seed(seed)
    drawn = {layer.name: torch.rand(layer.numel // unit, generator=random).double() for layer in LAYERS}
    if levels is not None:
        drawn = {name: (one * levels).floor() for name, one in drawn.items()}
    return {name: one.sort().values.repeat_interleave(unit) for name, one in drawn.items()}


def test_bounds__the_last_pattern_that_matches_counts() -> None:
    floors = per_layer("floor", {r"attn\.qkv": 0.2, r"blocks\.1\..*": 0.3, r"mlp\.fc\d": 0.4}, LAYERS, 0.0)
    assert [floors[name] for name in NAMES] == [0.2, 0.4, 0.3, 0.4, 0.3]
    floors = per_layer("floor", {r"attn\.in_proj": 0.1}, LAYERS, 0.5)
    assert [floors[name] for name in NAMES] == [0.5, 0.5, 0.5, 0.5, 0.1]
    assert per_layer("floor", 0.3, LAYERS, None) == dict.fromkeys(NAMES, 0.3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attn.qkvs": 0.1}, r"floor = 'attn\.qkvs': matches none of the prunable layers"),
        ({"ttn.qkv": 0.1}, "matches none"),  # patterns begin with a part of a name
        ({"attn.(qkv": 0.1}, "must be a regular expression"),
        ({"attn.qkv": 1.1}, r"floor\.attn\.qkv = 1\.1: must lie between 0 and 1"),
        (-0.1, "floor = -0.1: must lie between 0 and 1"),
        (float("nan"), "floor = nan: must lie"),
    ],
)
def test_bounds__what_cannot_be_is_named(values: float | dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        per_layer("floor", values, LAYERS, 0.0)
    with pytest.raises(InputError, match=message):
        Sharing("global", floor=values).allocate(losses(), LAYERS, 100)


def test_bounds__a_pattern_that_is_nearly_a_name_is_told_which() -> None:
    with pytest.raises(InputError, match=r"did you mean 'blocks\.0\.mlp\.fc1'"):
        per_layer("table", {"blocks.0.mlp.fcl": 0.1}, LAYERS, 0.0)


@given(data=st.data(), unit=st.sampled_from([1, 4]))
@quick(60)
def test_bounds__bounds_are_whole_units_inside_of_what_is_asked(data: st.DataObject, unit: int) -> None:
    low, high = sorted([data.draw(st.floats(0, 1)), data.draw(st.floats(0, 1))])
    pruned = {name: data.draw(st.integers(0, numel // unit)) * unit for name, numel in NUMEL.items()}
    reach = {name: data.draw(st.integers(0, numel // unit)) * unit for name, numel in NUMEL.items()}
    limits = bounds(LAYERS, low, high, pruned, reach=reach, unit=unit)
    for name, (least, most) in limits.items():
        gone, numel = pruned[name], NUMEL[name]
        assert least % unit == most % unit == 0
        assert least == gone or least < low * numel + unit
        assert most == gone or most <= high * numel + 1e-4
        assert most == max(reach[name], gone) or most > high * numel - unit - 1e-4
        # where no whole number lies between the two the ceiling counts
        assert least >= low * numel - 1e-4 or least > high * numel - unit - 1e-4
        assert gone <= least
        assert gone <= most <= max(reach[name], gone)


@pytest.mark.parametrize("scope", ["global", "module", "stage", "layer"])
@given(seed=st.integers(0, 99), data=st.data())
@quick(30)
def test_bounds__floors_and_ceilings_by_pattern_hold_and_the_budget_is_met(
    scope: str, seed: int, data: st.DataObject
) -> None:
    low, high = {r"attn\..*": 0.25, r"blocks\.1\.mlp\.fc1": 0.5}, {r"mlp\.fc1": 0.75}
    least, most = {}, {}
    for name, numel in NUMEL.items():
        share = 0.25 if "attn" in name else 0.5 if "blocks.1" in name else 0.0
        least[name], most[name] = share * numel, (0.75 if "mlp" in name else 1) * numel
    total = data.draw(st.integers(int(sum(least.values())), int(sum(most.values()))))
    allocation = Sharing(scope, low, high).allocate(losses(seed), LAYERS, total)  # type: ignore[arg-type]
    assert sum(allocation.values()) == total
    assert all(least[name] <= count <= most[name] for name, count in allocation.items())


def sorted_out(
    layer_losses: dict[str, Tensor], limits: dict[str, tuple[int, int]], total: int, unit: int
) -> Allocation:
    """The oracle: what the floors want, then Python's sort over (loss of the last of a unit, layer)."""
    counts = {name: low for name, (low, _) in limits.items()}
    free = sorted(
        (float(layer_losses[name][first + unit - 1]), number)
        for number, name in enumerate(NAMES)
        for first in range(limits[name][0], limits[name][1], unit)
    )
    for _, number in free[: (total - sum(counts.values())) // unit]:
        counts[NAMES[number]] += unit
    return counts


@given(data=st.data(), unit=st.sampled_from([1, 4]), levels=st.sampled_from([1, 2, 5, None]))
@quick(120)
def test_bounds__a_threshold_is_a_plain_sort_with_many_ties_too(
    data: st.DataObject, unit: int, levels: int | None
) -> None:
    layer_losses = losses(data.draw(st.integers(0, 99)), unit, levels)
    limits = {}
    for name, numel in NUMEL.items():
        pair = sorted(data.draw(st.integers(0, numel // unit)) for _ in range(2))
        limits[name] = pair[0] * unit, pair[1] * unit
    least, most = (sum(pair[side] for pair in limits.values()) // unit for side in (0, 1))
    total = data.draw(st.integers(least, most)) * unit
    assert by_threshold(layer_losses, LAYERS, total, limits, unit) == sorted_out(
        layer_losses, limits, total, unit
    )


def test_bounds__losses_one_bit_apart_are_told_apart() -> None:
    base = torch.tensor([1e-300, 1.0, 1.0, 1e300], dtype=torch.float64)
    next_to_it = torch.nextafter(base, torch.tensor(torch.inf, dtype=torch.float64))
    layers = [lone_layer(4, 1, name="a"), lone_layer(4, 1, name="b")]
    for first, second, expected in (
        (base, next_to_it, (3, 1)),
        (next_to_it, base, (1, 3)),
        (base, base, (3, 1)),
    ):
        allocation = by_threshold({"a": first, "b": second}, layers, 4)
        assert (allocation["a"], allocation["b"]) == expected
    infinite = torch.full((4,), torch.inf, dtype=torch.float64)
    assert by_threshold({"a": infinite, "b": base}, layers, 6) == {"a": 2, "b": 4}


def test_bounds__no_layer_goes_beyond_its_reach_or_gets_anything_back() -> None:
    layer_losses = losses()
    reach = {name: numel // 2 for name, numel in NUMEL.items()}
    short = {name: one[: reach[name]] for name, one in layer_losses.items()}
    pruned = {name: numel // 4 for name, numel in NUMEL.items()}
    for scope in ("global", "layer", "module"):
        allocation = Sharing(scope).allocate(short, LAYERS, 150, pruned=pruned)  # type: ignore[arg-type]
        assert sum(allocation.values()) == 150
        assert all(pruned[name] <= count <= reach[name] for name, count in allocation.items())
    with pytest.raises(InputError, match=r"budget = 177: .*nearest feasible: 176 weights"):
        Sharing("global").allocate(short, LAYERS, 177)
    with pytest.raises(InputError, match=r"budget = 87: .*nearest feasible: 88 weights"):
        Sharing("global").allocate(layer_losses, LAYERS, 87, pruned=pruned)


def test_bounds__infeasible_budgets_of_whole_blocks_are_told_in_weights() -> None:
    layer_losses = losses(unit=4)
    with pytest.raises(InputError, match=r"budget = 100: .*nearest feasible: 176 weights"):
        Sharing("global", floor=0.5).allocate(layer_losses, LAYERS, 100, unit=4)
    with pytest.raises(InputError, match=r"budget = 200: .*nearest feasible: 156 weights"):
        Sharing("module", ceiling=0.49).allocate(layer_losses, LAYERS, 200, unit=4)
    limits = bounds(LAYERS, ceiling=0.49, unit=4)
    with pytest.raises(InputError, match=r"budget = 200: .*nearest feasible: 156 weights"):
        by_threshold(layer_losses, LAYERS, 200, limits, 4)
    with pytest.raises(InputError, match=r"floor = 0\.5: must not lie above the ceiling of .*, 0\.25"):
        Sharing("global", floor=0.5, ceiling=0.25).allocate(losses(), LAYERS, 100)


TABLE = {r"attn\.(qkv|in_proj)": 0.5, r"mlp\.fc1": 0.25}
BY_TABLE = [60, 10, 60, 10, 16]


def test_bounds__a_table_that_meets_the_budget_is_taken_as_it_is() -> None:
    allocation = Sharing(table=TABLE).allocate(losses(), LAYERS, sum(BY_TABLE))
    assert list(allocation.values()) == BY_TABLE
    assert list(allocation) == NAMES


@pytest.mark.parametrize("total", [0, 100, 155, 157, 300, TOTAL])
@pytest.mark.parametrize("unit", [1, 4])
def test_bounds__another_table_is_projected_onto_the_budget(total: int, unit: int) -> None:
    total = total // unit * unit
    allocation = Sharing(table=TABLE).allocate(losses(unit=unit), LAYERS, total, unit=unit)
    assert sum(allocation.values()) == total
    assert all(count % unit == 0 for count in allocation.values())
    shifts = [
        count / numel - wish / numel
        for count, numel, wish in zip(allocation.values(), NUMEL.values(), BY_TABLE, strict=True)
        if 0 < count < numel
    ]
    assert max(shifts, default=0) - min(shifts, default=0) < 2 * unit / 32  # up to the rounding


def test_bounds__a_table_stays_within_floors_and_ceilings() -> None:
    sharing = Sharing(floor={r"mlp\.fc1": 0.5}, ceiling={r"attn\.qkv": 0.4}, table=TABLE)
    allocation = sharing.allocate(losses(), LAYERS, 160)
    assert sum(allocation.values()) == 160
    assert list(allocation.values())[:4] == [48, 20, 48, 20]


def test_bounds__what_a_table_leaves_out_is_named() -> None:
    limits = bounds(LAYERS)
    with pytest.raises(InputError, match=r"table = .*says nothing about blocks\.1\.attn\.in_proj_weight"):
        by_table({r"attn\.qkv": 0.5, r"mlp\.fc1": 0.5}, LAYERS, 100, limits)
    with pytest.raises(InputError, match=r"table = 'head': matches none"):
        by_table({**TABLE, "head": 0.5}, LAYERS, 100, limits)
    with pytest.raises(InputError, match=r"table\.mlp\\.fc1 = 2: must lie between"):
        by_table({**TABLE, r"mlp\.fc1": 2}, LAYERS, 100, limits)


def test_bounds__a_model_is_pruned_by_a_table() -> None:
    model = tiny_vit()
    layers: list[PrunableLayer] = find_layers(model)
    table = {r".*": 0.5, r"blocks\.0\..*": 0.25, r"blocks\.3\..*": 0.75}
    report = prune(model, "ovit", 0.5, batches=batches(2), table=table)
    for layer in layers:
        share = 0.25 if "blocks.0." in layer.name else 0.75 if "blocks.3." in layer.name else 0.5
        assert int((model.get_parameter(layer.name) == 0).sum()) == share * layer.numel
    assert report.sparsity == 0.5
