"""oViT over a layer: blocks, padding, zeros and the cumulative losses against a brute force in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import batches, quick, tiny_swin
from hypothesis import given
from hypothesis import strategies as st
from layer_problems import DAMP, Problem, problem
from surgery import Allowed, few_of_each, surgeon, whole_groups
from torch import Tensor

from pruners import InputError, find_layers, prune
from pruners.methods import second_order
from pruners.methods.ovit import DimapOViT, OViT, OViTFast
from pruners.model.sparsity_pattern import Pattern


def by_brute_force(given: Problem, size: int, pattern: str) -> tuple[list[float], list[Tensor]]:
    """Losses and weights at every count: a surgeon for each block, their steps merged by cumulative loss."""
    flat, f, form = given.flat, given.fisher(), Pattern.parse(pattern)
    falls = []
    for start in range(0, len(flat), size):
        block = slice(start, start + size)
        alive = given.mask.reshape(-1)[block]
        rules: dict[str, Allowed | None] = {
            "unstructured": None,
            "2:4": few_of_each(4, 2, alive),
            "1x4": whole_groups(4, alive),
        }
        done = surgeon(flat[block], f[block, block], alive, rules[pattern])
        ends = range(form.unit, len(done.losses) + 1, form.unit)  # what falls together counts when all has
        falls += [(done.losses[end - 1], block, done.weights[end]) for end in ends]
    zeros = int((~given.mask).sum())
    losses, states = [0.0] * zeros, [flat.clone() for _ in range(zeros + 1)]
    for loss, block, after in sorted(falls, key=lambda fall: fall[0]):
        losses += [loss] * form.unit
        states += [states[-1].clone() for _ in range(form.unit)]
        states[-1][block] = after
    return losses, states


@pytest.mark.parametrize(
    ("numel", "size"), [(24, 8), (28, 8), (28, 192), (40, 12)], ids=str
)  # dividing, last block padded, block larger than the layer
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1x4"])
@pytest.mark.parametrize("alive_share", [1.0, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_ovit__losses_and_weights_at_every_count(
    numel: int, size: int, pattern: str, alive_share: float, seed: int
) -> None:
    given = problem(seed, numel, alive_share, unit=4 if pattern == "1x4" else 1)
    order = given.ordered(OViT(block_size=size, damp=DAMP, pattern=pattern))
    losses, states = by_brute_force(given, min(size, numel), pattern)
    assert order.losses.tolist() == pytest.approx(losses, rel=1e-4, abs=1e-9)
    assert order.zeros == int((~given.mask).sum())
    assert len(set(order.indices.tolist())) == len(order.indices) == len(losses)
    for count in range(order.zeros, len(losses) + 1, order.pattern.unit):
        weight = order.weight(given.weight, count).reshape(-1).double()
        torch.testing.assert_close(weight, states[count], rtol=1e-4, atol=1e-5)
        assert int((weight == 0).sum()) == count


@pytest.mark.parametrize(("numel", "size"), [(9, 1), (1, 4), (22, 7)], ids=str)
def test_ovit__odd_sizes_too(numel: int, size: int) -> None:
    given = problem(0, numel, 1.0)
    order = given.ordered(OViT(block_size=size, damp=DAMP))
    losses, states = by_brute_force(given, min(size, numel), "unstructured")
    assert order.losses.tolist() == pytest.approx(losses, rel=1e-4, abs=1e-9)
    weight = order.weight(given.weight, numel // 2).reshape(-1).double()
    torch.testing.assert_close(weight, states[numel // 2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1x4"])
def test_ovit__how_many_blocks_are_worked_on_at_a_time_changes_nothing(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = problem(0, 60, 1.0)
    pruner = OViT(block_size=8, damp=DAMP, pattern=pattern)
    together = given.ordered(pruner)
    monkeypatch.setitem(second_order._WORKING, "cpu", 3 * 8 * 8)  # three blocks, then three, then two
    apart = given.ordered(pruner)
    firsts = [sorted({stretch.block for stretch in order.updates}) for order in (together, apart)]
    assert firsts == [[0], [0, 3, 6]]
    assert torch.equal(together.indices, apart.indices)
    torch.testing.assert_close(together.losses, apart.losses)
    torch.testing.assert_close(together.weight(given.weight, 28), apart.weight(given.weight, 28))


def test_ovit__dead_weights_fall_first_the_pruned_before_other_zeros() -> None:
    given = problem(0, 12, 1.0)
    given.mask[0, [3, 7]] = False  # pruned, though their weights have drifted from zero
    given.weight[0, [1, 9]] = 0.0  # zero, though not pruned
    order = given.ordered(OViT(block_size=5, damp=DAMP))
    assert order.indices[:4].tolist() == [3, 7, 1, 9]
    assert order.losses[:4].tolist() == [0, 0, 0, 0]
    assert (order.losses[4:] > 0).all()
    assert order.zeros == 4


@given(scale=st.sampled_from([0.0, 1e-6, 1e-3]), count=st.integers(0, 30), seed=st.integers(0, 99))
@quick(40)
def test_ovit__a_singular_fisher_gives_finite_weights(scale: float, count: int, seed: int) -> None:
    """Dead inputs, or none of the gradients' directions known: λ = 1e-8 alone holds the block together."""
    given = problem(seed, 30, 0.8, scale=scale)
    few = replace(given, gradients=given.gradients[:2])
    order = few.ordered(OViT(block_size=8, damp=1e-8))
    assert torch.isfinite(order.losses).all()
    assert (order.losses.diff() >= 0).all()
    assert torch.isfinite(order.weight(few.weight, count)).all()


def test_ovit__the_fast_variant_is_ovit_with_few_gradients_and_relative_damp() -> None:
    fast = OViTFast()
    assert (fast.gradients, fast.damp, fast.relative) == (256, 1e-2, True)
    assert (OViT().gradients, OViT().damp, OViT().relative) == (4096, 1e-8, False)
    given = problem(1, 40, 1.0)
    fast_order = given.ordered(OViTFast(block_size=8))
    other = given.ordered(OViT(block_size=8, damp=1e-2, relative=True))
    absolute = given.ordered(OViT(block_size=8, damp=1e-2))
    assert torch.equal(fast_order.losses, other.losses)
    assert not torch.equal(fast_order.losses, absolute.losses)


@pytest.mark.parametrize("scope", [None, "module", "global", "layer", "stage"])
@pytest.mark.parametrize("earlier", [0.0, 0.3])
def test_ovit__dimap_shares_out_and_ovit_prunes(scope: str | None, earlier: float) -> None:
    """dimap+ovit: exactly DIMAP's counts; inside each layer oViT's order, masks and weights."""
    models = [tiny_swin() for _ in range(3)]
    for model in models:
        prune(model, "magnitude", earlier, scope="global")
    dimap = prune(models[0], "dimap", 0.6, scope=scope)  # type: ignore[arg-type]
    options = {"block_size": 16, "damp": 1e-4}
    weights = {layer.name: layer for layer in find_layers(models[1])}
    old = {name: models[1].get_parameter(name).detach().clone() for name in weights}
    both = prune(models[1], "dimap+ovit", 0.6, batches=batches(4), scope=scope, **options)  # type: ignore[arg-type]
    ovit = prune(models[2], "ovit", 0.6, batches=batches(4), scope=scope, **options)  # type: ignore[arg-type]
    assert both.allocation == dimap.allocation
    assert both.masks.fingerprint() != dimap.masks.fingerprint()
    expected, masks = ovit.order.weights_at(old, dimap.allocation)
    assert both.masks.fingerprint() == masks.fingerprint()
    for name, weight in expected.items():
        assert torch.equal(both.order[name].indices, ovit.order[name].indices)
        assert torch.equal(both.order[name].losses, ovit.order[name].losses)
        assert torch.equal(models[1].get_parameter(name), weight)
    if scope is None:
        assert DimapOViT().scope == "module"
        assert both.allocation != ovit.allocation


def test_ovit__what_is_missing_is_named() -> None:
    given = problem(0, 12, 1.0)
    layer = given.layer
    with pytest.raises(InputError, match="fisher: ovit needs a Fisher with gradients"):
        OViT().order({layer.name: given.weight}, [layer], {layer.name: given.mask}, None)
    with pytest.raises(InputError, match="at least one gradient"):
        replace(given, gradients=given.gradients[:0]).ordered(OViT())
    with pytest.raises(InputError, match="block_size = 0"):
        OViT(block_size=0).fisher([layer])
    with pytest.raises(InputError, match="damp = -1"):
        OViT(damp=-1).fisher([layer])
