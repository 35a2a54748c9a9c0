"""Sparsity patterns: how they are written, which layers they fit, and in which order they read a weight."""

from __future__ import annotations

import pytest
import torch
from helpers import lone_layer, quick
from hypothesis import given
from hypothesis import strategies as st

from pruners import InputError, Pattern
from pruners.model.sparsity_pattern import fitting_layers


@pytest.mark.parametrize(
    ("expected", "forced", "unit"),
    [
        (Pattern("unstructured", 1, 0), None, 1),
        (Pattern("2:4", 4, 2), 0.5, 1),
        (Pattern("4:8", 8, 4), 0.5, 1),
        (Pattern("1:4", 4, 1), 0.75, 1),
        (Pattern("3:4", 4, 3), 0.25, 1),
        (Pattern("1x4", 4, 0, whole=True), None, 4),
        (Pattern("1x16", 16, 0, whole=True), None, 16),
    ],
)
def test_sparsity_pattern__what_is_written_is_meant(
    expected: Pattern, forced: float | None, unit: int
) -> None:
    pattern = Pattern.parse(expected.name)
    assert pattern == expected
    assert (pattern.forced, pattern.unit) == (forced, unit)
    assert pattern.structured == (expected.name != "unstructured")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2;4",
        "4:2",
        "4:4",
        "0:4",
        "2:",
        ":4",
        "2:4 ",
        "-2:4",
        "1x1",
        "1x0",
        "1x",
        "4x1",
        "2x4",
        "1X4",
        "nm",
    ],
)
def test_sparsity_pattern__a_typo_is_refused(text: str) -> None:
    with pytest.raises(
        InputError, match=r"pattern = .*must be unstructured, N:M as 2:4 or 4:8, or 1xB as 1x4"
    ):
        Pattern.parse(text)


LINEAR, CONV, ODD = (
    lone_layer(3, 8, name="linear.weight"),
    lone_layer(3, 12, 3, 3, name="conv.weight"),
    lone_layer(8, 6, name="odd.weight"),  # its outputs would fit
)


def test_sparsity_pattern__the_inputs_must_be_a_multiple_of_the_group() -> None:
    fits = {
        text: [layer.name for layer in (LINEAR, CONV, ODD) if Pattern.parse(text).fits(layer)]
        for text in ("unstructured", "2:4", "1x4", "4:8")
    }
    both = ["linear.weight", "conv.weight"]
    assert fits == {"unstructured": [*both, "odd.weight"], "2:4": both, "1x4": both, "4:8": ["linear.weight"]}


def test_sparsity_pattern__layers_that_do_not_fit_are_refused_by_name_or_left_out() -> None:
    layers, pattern = [LINEAR, CONV, ODD], Pattern.parse("2:4")
    with pytest.raises(
        InputError, match=r"2:4.*cannot fit odd\.weight, which has 6 inputs \(no multiple of 4\)"
    ):
        fitting_layers(layers, pattern)
    assert fitting_layers(layers, pattern, unfit="dense") == [LINEAR, CONV]
    assert fitting_layers(layers[:2], pattern) == [LINEAR, CONV]
    assert fitting_layers(layers, Pattern()) == layers
    with pytest.raises(InputError, match=r"cannot fit odd\.weight"):  # none would be left
        fitting_layers([ODD], pattern, unfit="dense")
    with pytest.raises(InputError, match="unfit = 'leave'"):
        fitting_layers(layers, pattern, unfit="leave")


@pytest.mark.parametrize("text", ["unstructured", "2:4", "1x4"])
@pytest.mark.parametrize("shape", [(3, 8), (2, 4, 3), (2, 8, 3, 2)])
def test_sparsity_pattern__flat_is_undone_by_shaped_one_at_a_time_or_batched(
    text: str, shape: tuple[int, ...]
) -> None:
    pattern = Pattern.parse(text)
    several = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    flat = pattern.flat(several, batched=True)
    assert flat.shape == (5, several[0].numel())
    for number, tensor in enumerate(several):
        assert torch.equal(flat[number], pattern.flat(tensor))
        back = pattern.shaped(pattern.flat(tensor), shape)
        assert torch.equal(back, tensor)
        assert back.is_contiguous()


def test_sparsity_pattern__groups_are_neighbouring_inputs_of_one_output_and_one_kernel_position() -> None:
    out, inputs, rows, columns = 2, 8, 3, 2
    weight = torch.arange(out * inputs * rows * columns).reshape(out, inputs, rows, columns)
    groups = {frozenset(group.tolist()) for group in Pattern.parse("2:4").flat(weight).reshape(-1, 4)}
    expected = {
        frozenset(weight[o, i : i + 4, r, c].tolist())
        for o in range(out)
        for i in (0, 4)
        for r in range(rows)
        for c in range(columns)
    }
    assert groups == expected


@given(
    seed=st.integers(0, 999),
    text=st.sampled_from(["2:4", "4:8", "1:4", "3:4"]),
    dead=st.sampled_from([0, 0.4]),
)
@quick(60)
def test_sparsity_pattern__in_each_group_the_smallest_may_fall_and_the_dead_count(
    seed: int, text: str, dead: float
) -> None:
    pattern = Pattern.parse(text)
    random = torch.Generator().manual_seed(seed)
    magnitudes = torch.rand(6 * pattern.group, generator=random)
    alive = torch.rand(magnitudes.shape, generator=random) >= dead
    free = pattern.free(magnitudes, alive)
    room = pattern.room(alive)
    for number in range(6):
        slots = range(number * pattern.group, (number + 1) * pattern.group)
        gone = [slot for slot in slots if not alive[slot]]
        living = sorted((slot for slot in slots if alive[slot]), key=lambda slot: float(magnitudes[slot]))
        left = max(pattern.group - pattern.keep - len(gone), 0)
        assert int(room[number]) == left
        assert {slot for slot in slots if free[slot]} == {*gone, *living[:left]}


def test_sparsity_pattern__blocks_that_are_zero_in_part_are_refused_where_whole_ones_are_needed() -> None:
    alive = torch.ones(16, dtype=torch.bool)
    alive[4:8] = False
    Pattern.parse("1x4").check_zeros("a.weight", alive)
    alive[[0, 13]] = False
    with pytest.raises(
        InputError, match=r"a\.weight.*: 2 of its blocks are zero in part; 1x4 needs whole ones"
    ):
        Pattern.parse("1x4").check_zeros("a.weight", alive)
    Pattern.parse("2:4").check_zeros("a.weight", alive)
