"""Latency tables: what they foretell between and at their points, and that JSON keeps them."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from helpers import quick
from hypothesis import assume, given
from hypothesis import strategies as st

from trainers.engines.latency_table import Curve, LatencyTable, LinearShape

SHAPES = st.builds(LinearShape, st.integers(1, 64), st.integers(1, 64), st.integers(1, 400))
SECONDS = st.floats(1e-6, 10.0)


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    """Times that need neither fall nor rise."""
    between = draw(st.lists(st.floats(0.001, 1.0), unique=True, max_size=8))
    sparsities = (0.0, *sorted(between))
    return Curve(sparsities, tuple(draw(SECONDS) for _ in sparsities))


@st.composite
def tables(draw: st.DrawFn) -> LatencyTable:
    curves_by_shape = draw(st.dictionaries(SHAPES, curves(), min_size=1, max_size=4))
    names = draw(st.lists(st.text(min_size=1, max_size=5), unique=True, min_size=1, max_size=6))
    layers = {name: draw(st.sampled_from(sorted(curves_by_shape))) for name in names}
    return LatencyTable({"threads": 1}, draw(curves()), layers, curves_by_shape)


@quick(100)
@given(curves(), st.floats(0.0, 1.0))
def test_latency_table__a_curve_is_exact_where_it_was_measured_and_between_its_neighbours_elsewhere(
    curve: Curve, part: float
) -> None:
    known = list(zip(curve.sparsities, curve.seconds, strict=True))
    assert [curve.at(sparsity) for sparsity, _ in known] == [took for _, took in known]
    for (low, before), (high, after) in pairwise(known):
        seconds = curve.at(low + part * (high - low))
        assert min(before, after) * (1 - 1e-9) <= seconds <= max(before, after) * (1 + 1e-9)
    assert curve.at(1.0) == curve.seconds[-1]


def test_latency_table__a_curve_that_rises_stays_as_it_was_measured() -> None:
    """An engine that is slower with a few zeros than with none is told so."""
    curve = Curve((0.0, 0.5, 0.9), (1.0, 3.0, 0.5))
    assert curve.at(0.25) == 2.0
    assert curve.at(0.7) == pytest.approx(1.75)


@pytest.mark.parametrize(
    ("sparsities", "seconds"),
    [((), ()), ((0.0, 0.5), (1.0,)), ((0.5, 0.0), (1.0, 1.0)), ((0.5, 0.5), (1, 1))],
)
def test_latency_table__no_curve(sparsities: tuple[float, ...], seconds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"curve|ascend"):
        Curve(sparsities, seconds)


@quick(100)
@given(tables())
def test_latency_table__json_keeps_every_bit(table: LatencyTable) -> None:
    assert LatencyTable.from_json(json.loads(json.dumps(table.as_json()))) == table


@quick(100)
@given(tables(), st.data())
def test_latency_table__a_model_is_its_layers_and_a_rest_that_is_never_negative(
    table: LatencyTable, data: st.DataObject
) -> None:
    assert min(table.rest.seconds) >= 0
    for sparsity, took in zip(table.whole.sparsities, table.whole.seconds, strict=True):
        alone = sum(table.curves[shape].at(sparsity) for shape in table.layers.values())
        assert table.uniform(sparsity) == pytest.approx(max(took, alone))
    assert table.at({}) == pytest.approx(table.uniform(0.0))
    numel = sum(shape.numel for shape in table.layers.values())
    name = data.draw(st.sampled_from(sorted(table.layers)))
    shape = table.layers[name]
    count = data.draw(st.integers(0, shape.numel))
    changed = table.curves[shape].at(count / shape.numel) - table.curves[shape].at(0.0)
    changed += table.rest.at(count / numel) - table.rest.at(0.0)
    assert table.at({name: count}) == pytest.approx(table.at({}) + changed, abs=1e-9)
    everything = {name: its.numel for name, its in table.layers.items()}
    assert table.at(everything) == pytest.approx(table.uniform(1.0))
    assert table.at({**everything, "another.weight": 7}) == table.at(everything)


@given(tables())
@quick(20)
def test_latency_table__what_is_no_table_is_refused(table: LatencyTable) -> None:
    content = table.as_json()
    assume(content["curves"])
    for broken in (
        {**content, "format": "espalier-latency-0"},
        {**content, "curves": []},
        {key: value for key, value in content.items() if key != "whole"},
        {**content, "layers": {"a": [1, 2]}},
    ):
        with pytest.raises((ValueError, KeyError, TypeError)):
            LatencyTable.from_json(broken)
