"""Proposals of sparsities become exact allocations; proposals of recipe values stay in their space."""

from __future__ import annotations

import re
from typing import Any

import optuna
import pytest
import torch
from helpers import quick, tiny_swin, tiny_vit
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orchestration.recipe.distribution import Distribution
from orchestration.recipe.search import AllocationSearch, ScheduleSearch
from orchestration.search.space import (
    AllocationSpace,
    contains,
    from_optuna,
    inside,
    recipe_space,
    summarise,
    to_optuna,
)
from pruners import MaskSet, create_pruner, find_layers
from pruners.allocation.projection import budget
from pruners.allocation.sharing import Allocation, allocate
from pruners.model.layers import PrunableLayer
from trainers.config.pruning import PruningSettings

SWIN, VIT = find_layers(tiny_swin()), find_layers(tiny_vit())


def losses_of(layers: list[PrunableLayer], seed: int = 0) -> dict[str, Tensor]:
    """Ascending losses; the layers differ in scale by orders of magnitude."""
    random = torch.Generator().manual_seed(seed)
    return {
        layer.name: torch.rand(layer.numel, generator=random).sort().values * 10.0 ** (i % 3)
        for i, layer in enumerate(layers)
    }


def space(
    layers: list[PrunableLayer],
    own: Allocation,
    *,
    by: tuple[str, ...] = ("stage", "module"),
    **limits: float,
) -> AllocationSpace:
    search = AllocationSearch.model_validate({"by": by, "range": limits.pop("range", 0.15)})
    return AllocationSpace.of(
        search, PruningSettings.model_validate({"sparsity": 0.6, **limits}), layers, own
    )


@pytest.mark.parametrize(
    "by", [("stage", "module"), ("stage",), ("module",), ("group",), ("layer",), ("stage", "layer")]
)
@pytest.mark.parametrize("scope", ["global", "module", "stage", "layer"])
@pytest.mark.parametrize("layers", [SWIN, VIT], ids=["swin", "vit"])
@pytest.mark.parametrize("limits", [{}, {"floor": 0.2, "ceiling": 0.9}])
def test_space__own_values_give_the_own_allocation(
    by: tuple[str, ...], scope: Any, layers: list[PrunableLayer], limits: dict[str, float]
) -> None:
    losses = losses_of(layers)
    own = allocate(losses, layers, budget(layers, 0.6), scope, **limits)
    chosen = space(layers, own, by=by, **limits)
    allocation = chosen.allocation(chosen.own_values(), losses)
    assert sum(allocation.values()) == sum(own.values())
    if scope in {"global", "module", "stage"}:  # one threshold in each group, as the space has
        assert allocation == own


@pytest.mark.parametrize(
    "method",
    ["dimap", "ovit", "magnitude"],
)
def test_space__the_methods_own_allocation_to_the_weight(method: str) -> None:
    model = tiny_swin()
    pruner = create_pruner(method, **({"block_size": 16, "damp": 1e-4} if method == "ovit" else {}))
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    fisher = pruner.fisher(SWIN)
    if fisher is not None:
        random = torch.Generator().manual_seed(1)
        for _ in range(4):
            fisher.add({layer.name: torch.randn(layer.shape, generator=random) for layer in SWIN})
    order = pruner.order(weights, SWIN, MaskSet.dense(model, SWIN), fisher)
    own = allocate(order.losses, SWIN, budget(SWIN, 0.6), pruner.scope)
    chosen = space(SWIN, own)
    assert chosen.allocation(chosen.own_values(), order.losses) == own


@quick(150)
@given(st.data())
def test_space__every_proposal_meets_the_budget_and_the_bounds(data: st.DataObject) -> None:
    layers = data.draw(st.sampled_from([SWIN, VIT]))
    floor, ceiling = data.draw(st.sampled_from([(0.0, 1.0), (0.3, 0.85), (0.55, 0.65)]))
    by = data.draw(st.sampled_from([("stage", "module"), ("stage",), ("module",)]))
    losses = losses_of(layers)
    total = budget(layers, 0.6)
    own = allocate(losses, layers, total, "global", floor=floor, ceiling=ceiling)
    chosen = space(layers, own, by=by, floor=floor, ceiling=ceiling, range=data.draw(st.floats(0.01, 1.0)))
    values = {}
    for key, distribution in chosen.distributions().items():
        assert isinstance(distribution, optuna.distributions.FloatDistribution)
        assert floor <= distribution.low <= chosen.own_values()[key] <= distribution.high <= ceiling
        values[key] = data.draw(st.floats(distribution.low, distribution.high))
    allocation = chosen.allocation(values, losses)
    assert list(allocation) == [layer.name for layer in layers]
    assert sum(allocation.values()) == total
    for layer in layers:
        assert floor * layer.numel - 1e-6 <= allocation[layer.name] <= ceiling * layer.numel + 1e-6
    assert allocation == chosen.allocation(values, losses)


@quick(100)
@given(st.data())
def test_space__no_proposal_gives_a_layer_fewer_zeros_than_it_has(data: st.DataObject) -> None:
    """On a model that is sparse already, whatever is proposed, also where the whole is (``between``)."""
    layers = data.draw(st.sampled_from([SWIN, VIT]))
    pruned = {layer.name: int(data.draw(st.floats(0.0, 0.59)) * layer.numel) for layer in layers}
    losses = losses_of(layers)
    for name, count in pruned.items():
        losses[name][:count] = 0.0
    total = budget(layers, 0.6)
    own = allocate(losses, layers, total, "global", pruned=pruned)
    by = data.draw(st.sampled_from([("stage", "module"), ("layer",)]))
    between = data.draw(st.sampled_from([None, [0.1, 0.9]]))
    rule = {} if between is None else {"objective": "latency", "between": between}
    search = AllocationSearch.model_validate({"by": by, "range": 1.0, **rule})
    settings = PruningSettings.model_validate({"sparsity": 0.6})
    chosen = AllocationSpace.of(search, settings, layers, own, pruned)
    values = {
        key: data.draw(st.floats(distribution.low, distribution.high))
        for key, distribution in chosen.distributions().items()
    }
    allocation = chosen.allocation(values, losses)
    assert all(allocation[name] >= count for name, count in pruned.items())
    wanted = budget(layers, values["sparsity"]) if between else total
    assert sum(allocation.values()) == wanted
    assert chosen.allocation(chosen.own_values(), losses).keys() == own.keys()


def test_space__the_ends_of_a_range_are_met_where_floors_round_up() -> None:
    """Between whole weights a floor rounds up for each layer, and the budget for all together."""
    layers = [PrunableLayer(f"{i}.weight", "MLP", 0, (3, 7)) for i in range(5)]
    losses = losses_of(layers)
    own = allocate(losses, layers, budget(layers, 0.6), "global", floor=0.5)
    search = AllocationSearch.model_validate({"objective": "latency", "between": [0.5, 0.7], "by": ["layer"]})
    settings = PruningSettings.model_validate({"sparsity": 0.6, "floor": 0.5})
    chosen = AllocationSpace.of(search, settings, layers, own)
    allocation = chosen.allocation(chosen.own_values() | {"sparsity": 0.5}, losses)
    assert allocation == {layer.name: 11 for layer in layers}


def test_space__a_proposal_moves_its_groups() -> None:
    losses = losses_of(SWIN)
    own = allocate(losses, SWIN, budget(SWIN, 0.6), "module")
    chosen = space(SWIN, own)
    before = chosen.own_values()
    after = summarise(chosen.allocation(before | {"stage.0": before["stage.0"] + 0.1}, losses), SWIN)
    assert after["stage.0"] > before["stage.0"] + 0.05
    assert after["stage.1"] < before["stage.1"]
    moved = summarise(chosen.allocation(before | {"module.QKV": before["module.QKV"] - 0.1}, losses), SWIN)
    assert moved["module.QKV"] < before["module.QKV"] - 0.05


def test_space__sparsity_of_stages_and_modules_by_hand() -> None:
    layers = [
        PrunableLayer("a.weight", "QKV", 0, (10, 10)),
        PrunableLayer("b.weight", "MLP", 0, (10, 30)),
        PrunableLayer("c.weight", "MLP", 1, (10, 10)),
    ]
    shares = summarise({"a.weight": 50, "b.weight": 90, "c.weight": 30}, layers)
    assert shares == {"stage.0": 0.35, "stage.1": 0.3, "module.QKV": 0.5, "module.MLP": 0.3}


SPACE = recipe_space(
    {
        "u": Distribution(uniform=(0.0, 1.0)),
        "l": Distribution(log=(1e-4, 1e-2)),
        "i": Distribution(integer=(1, 3)),
        "c": Distribution(choice=("a", "b")),
    }
)
INSIDE: dict[str, Any] = {"u": 0.5, "l": 1e-3, "i": 2, "c": "b"}


def test_space__distributions_of_recipe_values() -> None:
    kinds = optuna.distributions
    assert dict(SPACE) == {
        "u": kinds.FloatDistribution(0.0, 1.0),
        "l": kinds.FloatDistribution(1e-4, 1e-2, log=True),
        "i": kinds.IntDistribution(1, 3),
        "c": kinds.CategoricalDistribution(("a", "b")),
    }


@pytest.mark.parametrize(
    ("changes", "inside"),
    [
        ({}, True),
        ({"u": 0.0}, True),
        ({"u": 1.0}, True),
        ({"more": 3}, True),
        ({"u": 1.1}, False),
        ({"l": 1e-5}, False),
        ({"i": 4}, False),
        ({"i": 3}, True),
        ({"c": "z"}, False),
        ({"c": None}, False),
    ],
)
def test_space__what_lies_in_a_space(changes: dict[str, Any], inside: bool) -> None:
    assert contains(SPACE, INSIDE | changes) is inside


def test_space__a_value_that_is_missing_does_not() -> None:
    assert not contains(SPACE, {"u": 0.5})


def test_space__layers_move_one_by_one() -> None:
    losses = losses_of(SWIN)
    own = allocate(losses, SWIN, budget(SWIN, 0.6), "global")
    chosen = space(SWIN, own, by=("layer",))
    values = chosen.own_values()
    assert set(values) == {f"layer.{layer.name}" for layer in SWIN}
    first = SWIN[0]
    values[f"layer.{first.name}"] -= 0.1
    allocation = chosen.allocation(values, losses)
    assert sum(allocation.values()) == sum(own.values())
    assert allocation[first.name] < own[first.name]
    assert all(allocation[layer.name] >= own[layer.name] for layer in SWIN[1:])


def test_space__a_study_begins_with_what_was_best_at_its_neighbour() -> None:
    losses = losses_of(VIT)
    own = allocate(losses, VIT, budget(VIT, 0.6), "global")
    chosen = space(VIT, own)
    here, limits = chosen.own_values(), chosen.distributions()
    moves = {key: 0.05 if number % 2 else -5.0 for number, key in enumerate(here)}
    for number, (key, value) in enumerate(chosen.moved(moves).items()):
        assert value == pytest.approx(here[key] + 0.05 if number % 2 else limits[key].low)


@pytest.mark.parametrize(
    ("settings", "images", "ends"),
    [
        ({"images": 1000}, 5000, [1000]),
        ({"images": 1000}, 300, [300]),
        ({"images": 1000, "first_images": 250}, 5000, [250, 500, 1000]),
        ({"images": 1000, "first_images": 300}, 5000, [300, 600, 1000]),
        ({"images": 1000, "first_images": 100, "reduction": 3}, 5000, [100, 300, 900, 1000]),
        ({"images": 1000, "first_images": 250}, 200, [200]),
    ],
)
def test_space__subsets_grow_to_all_images(settings: dict[str, int], images: int, ends: list[int]) -> None:
    assert AllocationSearch.model_validate(settings).rungs(images) == ends


def test_space__a_grid_is_every_combination() -> None:
    search = ScheduleSearch.model_validate(
        {
            "sampler": "grid",
            "trials": 9,
            "space": {
                "pruning.schedule.steps": {"integer": [1, 3]},
                "recovery.preset": {"choice": ["deit", "light1"]},
            },
        }
    )
    assert search.runs == 6
    assert len({tuple(values.items()) for values in search.grid()}) == 6
    assert search.model_copy(update={"trials": 4}).runs == 4


def test_space__a_grid_of_a_continuum_is_refused() -> None:
    with pytest.raises(ValueError, match="sampler grid takes choice and integer only"):
        ScheduleSearch.model_validate(
            {"sampler": "grid", "space": {"recovery.lr.peak": {"log": [1e-5, 1e-3]}}}
        )


CONDITIONAL = {
    "recovery.distill.kind": {"choice": ["soft", "hard"]},
    "recovery.distill.temperature": {"uniform": [1, 4], "when": {"recovery.distill.kind": "soft"}},
}


def test_space__a_key_is_meant_only_under_its_condition() -> None:
    search = ScheduleSearch.model_validate({"space": CONDITIONAL})
    values = {"recovery.distill.kind": "hard", "recovery.distill.temperature": 2.0}
    assert search.active(values) == {"recovery.distill.kind": "hard"}
    values["recovery.distill.kind"] = "soft"
    assert search.active(values) == values


def test_space__a_condition_on_what_is_not_searched_is_refused() -> None:
    broken = {"recovery.lr.peak": {"log": [1e-5, 1e-3], "when": {"recovery.preset": "deit"}}}
    with pytest.raises(ValueError, match=r"when names recovery\.preset, which must be another searched key"):
        ScheduleSearch.model_validate({"space": broken})


SWITCHES = {
    "recovery.distill": {"choice": [None, {"kind": "soft", "weight": 0.5}]},
    "b": {"choice": [True, 2]},
}


def test_space__booleans_null_and_mappings_are_choices() -> None:
    """As they are, and not as the number or text that they could be taken for; Optuna has them back alike."""
    made = {key: Distribution.model_validate(one) for key, one in SWITCHES.items()}
    assert made["b"].choice == (True, 2)
    assert type((made["b"].choice or ())[0]) is bool
    space = recipe_space(made)
    for values in (
        {"recovery.distill": None, "b": True},
        {"recovery.distill": {"weight": 0.5, "kind": "soft"}, "b": 2},
    ):
        assert contains(space, values)
        plain = to_optuna(space, values)
        study = optuna.create_study()
        study.enqueue_trial(plain)
        assert from_optuna(space, study.ask(fixed_distributions=space).params) == values
    assert not contains(space, {"recovery.distill": {"kind": "soft"}, "b": 2})
    assert inside(space, {"recovery.distill": {"kind": "soft"}, "b": 2}) == {"b": 2}
    assert inside(SPACE, {"u": None, "l": "x", "i": 2, "c": None}) == {"i": 2}


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ([0.5, 0.5], "choice: 0.5 stands there twice"),
        ([0, False], "choice: false stands there twice"),
        ([{"a": 1}, None, {"a": 1}], 'choice: {"a": 1} stands there twice'),
    ],
)
def test_space__a_choice_that_stands_there_twice_is_refused(choice: list[Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        Distribution.model_validate({"choice": choice})


def test_space__cmaes_over_a_choice_is_refused() -> None:
    """Optuna would draw it at random, whatever the trials say."""
    space = {"recovery.lr.peak": {"log": [1e-5, 1e-3]}, "recovery.preset": {"choice": ["deit", "light1"]}}
    with pytest.raises(ValueError, match=r"space\.recovery\.preset: sampler cmaes searches numbers"):
        ScheduleSearch.model_validate({"sampler": "cmaes", "space": space})
    ScheduleSearch.model_validate({"sampler": "nsga2", "space": space})


@pytest.mark.parametrize(("sparsity", "reach"), [(0.6, 0.15), (0.8, 0.15), (0.95, 0.0375)])
def test_space__proposals_lie_within_three_quarters_of_what_is_left(sparsity: float, reach: float) -> None:
    """At 95 % a range of 0.15 would be three times all that is left."""
    own = {layer.name: round(sparsity * layer.numel) for layer in SWIN}
    chosen = space(SWIN, own)
    for key, domain in chosen.distributions().items():
        value = chosen.own_values()[key]
        assert domain.low == pytest.approx(value - reach, rel=1e-2)
        assert domain.high == pytest.approx(value + reach, rel=1e-2)
