"""One order, many allocations: each the same as pruning anew."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from helpers import PRUNERS, quick
from hypothesis import given
from hypothesis import strategies as st
from orders import ordered
from torch import Tensor

from pruners import InputError, Scope, allocate
from pruners.allocation.projection import budget
from pruners.elimination.order import EliminationOrder, LayerOrder, merge
from pruners.elimination.updates import UpdateSegment

every_method = pytest.mark.parametrize("method", PRUNERS)
CORRELATED = [name for name in PRUNERS if "ovit" in name]


@every_method
@pytest.mark.parametrize("scope", get_args(Scope))
def test_order__weights_at_any_allocation_are_those_of_pruning_anew(method: str, scope: Scope) -> None:
    known = ordered(method)
    for sparsity in (0.25, 0.6, 0.95):
        anew, fresh, counts = known.pruned(sparsity, scope=scope)
        allocation = allocate(known.order.losses, known.layers, budget(known.layers, sparsity), scope)
        new, masks = known.order.weights_at(known.weights, allocation)
        assert allocation == counts
        assert masks.fingerprint() == fresh.fingerprint()
        for name, weight in new.items():
            assert torch.equal(weight, anew.get_parameter(name).detach())


@every_method
@given(data=st.data())
@quick(30)
def test_order__any_allocation_gives_exact_nested_masks_and_leaves_the_old_weights(
    method: str, data: st.DataObject
) -> None:
    known = ordered(method)
    layers, weights, order = known.layers, known.weights, known.order
    counts = {layer.name: data.draw(st.integers(0, layer.numel)) for layer in layers}
    before = {name: weight.clone() for name, weight in weights.items()}
    new, masks = order.weights_at(weights, counts)
    more, _ = order.weights_at(weights, {layer.name: layer.numel for layer in layers})
    deeper = {layer.name: data.draw(st.integers(counts[layer.name], layer.numel)) for layer in layers}
    _, smaller = order.weights_at(weights, deeper)
    assert masks.pruned() == counts
    for name, weight in new.items():
        assert torch.isfinite(weight).all()
        assert (weight[~masks[name]] == 0).all()
        assert not (smaller[name] & ~masks[name]).any()  # what has fallen stays fallen
        assert not more[name].any()
        assert torch.equal(weights[name], before[name])
        assert weight.data_ptr() != weights[name].data_ptr()


@pytest.mark.parametrize("method", CORRELATED)
@given(data=st.data())
@quick(25)
def test_order__survivors_are_the_closed_form_at_any_allocation(method: str, data: st.DataObject) -> None:
    """w_K + F_KK⁻¹·F_KS·w_S of each block, in float64, S without what was zero before."""
    known = ordered(method)
    fisher = known.fisher
    assert fisher is not None
    layer = data.draw(st.sampled_from(known.layers))
    size, order = fisher.block_size(layer.name), known.order[layer.name]
    count = data.draw(st.integers(order.zeros, layer.numel))
    old = known.weights[layer.name].reshape(-1).double()
    survivors = order.weight(known.weights[layer.name], count).reshape(-1).double()
    keep = order.mask((layer.numel,), count)
    for number, sums in enumerate(fisher.total(layer.name)):
        block = slice(number * size, min((number + 1) * size, layer.numel))
        w, kept = old[block], keep[block]
        damp = fisher.damping(layer.name) * torch.eye(size)
        f = (sums.double() / fisher.count + damp)[: len(w), : len(w)]
        fallen = ~kept & (w != 0)
        expected = torch.zeros_like(w)
        expected[kept] = w[kept] + torch.linalg.solve(f[kept][:, kept], f[kept][:, fallen] @ w[fallen])
        torch.testing.assert_close(survivors[block], expected, rtol=1e-4, atol=1e-6)


@every_method
def test_order__what_a_share_of_the_layers_gives_is_merged(method: str) -> None:
    known = ordered(method)
    half = [layer.name for layer in known.layers[::2]]
    parts = [
        EliminationOrder({name: one for name, one in known.order.items() if (name in half) == first})
        for first in (True, False)
    ]
    whole = merge(parts)
    assert set(whole) == set(known.order)
    assert all(whole[name] is known.order[name] for name in whole)
    assert whole.nbytes == known.order.nbytes == sum(part.nbytes for part in parts) > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", CORRELATED)
def test_order__survivors_of_short_weights_never_become_zero(method: str, dtype: torch.dtype) -> None:
    """Weights so small that their updates round to nothing in a short type are still kept."""
    known = ordered(method)
    for layer in known.layers[:4]:
        short = (known.weights[layer.name] * 1e-6).to(dtype)
        alive = int((short != 0).sum())
        order = known.order[layer.name]
        for count in (order.zeros + 1, layer.numel // 2, layer.numel - 3):
            weight, mask = order.at(short, count)
            assert weight.dtype == dtype
            assert torch.isfinite(weight).all()
            assert not weight[~mask].any()
            assert (weight[mask & (short != 0)] != 0).all()
            assert int((weight != 0).sum()) >= alive - count


def test_order__a_layer_without_updates_keeps_what_stays() -> None:
    order = LayerOrder(torch.tensor([2, 0, 1, 3]), torch.tensor([0.0, 1.0, 2.0, 3.0]))
    weight = torch.tensor([[1.0, 2.0], [0.5, 4.0]])
    assert order.weight(weight, 2).tolist() == [[0.0, 2.0], [0.0, 4.0]]
    assert order.mask((2, 2), 1).tolist() == [[True, True], [False, True]]
    assert order.weight(weight.half(), 2).dtype == torch.float16


def test_order__an_order_that_does_not_reach_so_far_says_so() -> None:
    order = LayerOrder(torch.tensor([2, 0]), torch.tensor([0.0, 1.0]))
    assert order.mask((2, 2), 2).tolist() == [[False, True], [False, True]]
    with pytest.raises(InputError, match="count = 3: the order of this layer reaches 2 of 4 weights"):
        order.mask((2, 2), 3)


def stretches_by_hand() -> tuple[LayerOrder, Tensor, list[Tensor]]:
    """Five blocks of three weights; stretches over other blocks each time, the later ones go on."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(15, generator=random)
    indices = torch.cat([torch.arange(0, 15, 3), torch.arange(1, 15, 3)])  # the first of each, the second

    def stretch(block: int, blocks: int, begin: int | Tensor, end: Tensor | None) -> UpdateSegment:
        slots = torch.tensor([[0, 1, 2]]).repeat(blocks, 1).short()
        columns, y = (torch.randn(blocks, count, generator=random) for count in (3, 1))
        return UpdateSegment(block, begin, columns, y, slots, end)

    ones = torch.ones(5, dtype=torch.long)
    updates = (
        stretch(0, 2, 0, ones[:2]),
        stretch(2, 3, 0, ones[2:]),
        stretch(0, 3, ones[:3], None),
        stretch(3, 2, ones[3:], None),
    )
    order = LayerOrder(indices, torch.arange(10.0), 0, updates, 3)
    states = []
    for count in range(11):
        result = weight.reshape(5, 3).clone()
        for segment in updates:
            for row in range(len(segment.columns)):
                block = segment.block + row
                fell = int((indices[:count] // 3 == block).sum())
                if fell > (0 if isinstance(segment.begin, int) else 1):
                    result[block] -= segment.coefficients[row, 0] * segment.columns[row]
        result = result.reshape(-1)
        result[indices[:count]] = 0.0
        states.append(result)
    return order, weight, states


def test_order__stretches_over_other_blocks_each_time_add_up() -> None:
    order, weight, states = stretches_by_hand()
    for count, expected in enumerate(states):
        torch.testing.assert_close(order.weight(weight, count), expected)


def test_order__no_two_threads_write_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    order, weight, states = stretches_by_hand()
    written: list[set[int]] = []
    real = UpdateSegment.apply_

    def take(self: UpdateSegment, weights: Tensor, *rest: object) -> None:
        before = weights.clone()
        real(self, weights, *rest)  # type: ignore[arg-type]
        written[-1] |= set((weights != before).reshape(-1).nonzero().reshape(-1).tolist())

    def one_by_one(work: object, count: int) -> None:
        for part in range(count):
            written.append(set())
            work(slice(part, part + 1))  # type: ignore[operator]

    monkeypatch.setattr(UpdateSegment, "apply_", take)
    monkeypatch.setattr("pruners.elimination.kernels.threads.on_threads", one_by_one)
    torch.testing.assert_close(order.weight(weight, 10), states[10])
    assert len(written) > 1
    assert sum(map(len, written)) == len(set().union(*written)) == 15


@every_method
@given(data=st.data())
@quick(25)
def test_order__without_its_beginning_it_gives_the_same_later_on(method: str, data: st.DataObject) -> None:
    known = ordered(method)
    layer = data.draw(st.sampled_from(known.layers))
    whole, weight = known.order[layer.name], known.weights[layer.name]
    least = data.draw(st.integers(0, layer.numel))
    later = whole.beyond(weight, least)
    again = later.beyond(weight, data.draw(st.integers(least, layer.numel)))
    for order in (later, again):
        count = data.draw(st.integers(max(order.least, least), layer.numel))
        pruned, mask = order.at(weight, count)
        expected, same = whole.at(weight, count)
        assert torch.equal(mask, same)
        torch.testing.assert_close(pruned, expected, rtol=1e-5, atol=1e-7)
        if order.start is not None and order.least:
            with pytest.raises(InputError, match=f"the order of this layer begins at {order.least} of"):
                order.at(weight, order.least - 1)
    assert EliminationOrder({"a": later}).nbytes <= EliminationOrder({"a": whole}).nbytes + 4 * layer.numel
