"""Pruning in several rounds, with and without a reconstruction after each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import batches, state, tiny_vit
from hypothesis import given
from hypothesis import strategies as st

from pruners import InputError, create_pruner, find_layers, prune
from pruners.rounds import Shares, round_sparsities

BATCHES = batches(6)


def ovit(**options: Any) -> Any:
    return create_pruner("ovit", **{"block_size": 16, "damp": 1e-4, "gradients": 6} | options)


@given(rounds=st.integers(1, 6), start=st.floats(0, 0.9), more=st.floats(0, 1))
def test_round_sparsities__each_round_leaves_the_same_share(rounds: int, start: float, more: float) -> None:
    end = start + (1 - start) * more
    given_out = round_sparsities(rounds, start, end)
    assert given_out[-1] == end
    assert given_out == sorted(given_out)
    if end < 1 and start < end and len(given_out) > 1:
        left = [1 - sparsity for sparsity in [start, *given_out]]
        shares = [later / earlier for earlier, later in itertools.pairwise(left)]
        assert max(shares) - min(shares) < 1e-6


@pytest.mark.parametrize("rounds", [0, -1, [], [0.5], [0.6, 0.5], [0.5, 0.5, 0.8], [0.9, 0.8], [0.1, 0.8]])
def test_round_sparsities__what_does_not_lead_there_is_refused(rounds: int | Sequence[float]) -> None:
    with pytest.raises(InputError, match="rounds"):
        round_sparsities(rounds, 0.2, 0.8)


def test_prune__rounds_lead_to_their_sparsities_and_old_zeros_stay() -> None:
    model = tiny_vit().eval()
    first = tiny_vit().eval()
    prune(first, ovit(), 0.5, batches=BATCHES[:3], gradients=3)
    report = prune(model, ovit(), 0.8, batches=BATCHES, rounds=[0.5, 0.8])
    assert report.rounds == (0.5, 0.8)
    assert report.sparsity == pytest.approx(0.8, abs=1e-3)
    for layer in find_layers(model):
        zero = first.get_parameter(layer.name) == 0
        assert not model.get_parameter(layer.name)[zero].any()


def test_prune__rounds_are_prunings_one_after_the_other() -> None:
    at_once, by_hand = tiny_vit().eval(), tiny_vit().eval()
    prune(at_once, ovit(), 0.8, batches=iter(BATCHES), rounds=2)
    (half, end) = round_sparsities(2, 0.0, 0.8)
    prune(by_hand, ovit(), half, batches=BATCHES[:3], gradients=3)
    prune(by_hand, ovit(), end, batches=BATCHES[3:], gradients=3)
    assert state(at_once) == state(by_hand)


def test_prune__a_fisher_in_parts_reads_its_own_share_again() -> None:
    whole, parts = tiny_vit().eval(), tiny_vit().eval()
    prune(whole, ovit(), 0.8, batches=BATCHES, rounds=2)
    prune(parts, ovit(), 0.8, batches=BATCHES, rounds=2, memory=60_000)
    assert state(whole) == state(parts)


@pytest.mark.parametrize("method", ["magnitude", "ovit"])
def test_prune__a_reconstruction_reads_no_batch_twice_that_can_be_read_once(method: str) -> None:
    """The first images are for both."""
    listed, once = tiny_vit().eval(), tiny_vit().eval()
    options: dict[str, Any] = {"gradients": 6} if method == "ovit" else {}
    pruner = ovit() if method == "ovit" else method
    report = prune(listed, pruner, 0.8, batches=BATCHES, rounds=2, reconstruct=10, **options)
    prune(once, pruner, 0.8, batches=iter(BATCHES), rounds=2, reconstruct=10, **options)
    assert report.reconstruction is not None
    assert report.reconstruction.images == 10
    assert state(listed) == state(once)
    assert all(
        torch.equal(listed.get_parameter(name) != 0, mask.to(torch.bool))
        for name, mask in report.masks.items()
    )


def test_prune__an_error_in_a_later_round_undoes_the_earlier_ones() -> None:
    model = tiny_vit().eval()
    before = state(model)
    with pytest.raises(InputError, match=r"finite|NaN"):
        prune(model, ovit(), 0.8, batches=batches(6, nan_in=4), rounds=2)
    assert state(model) == before


def test_prune__a_reconstruction_needs_images() -> None:
    with pytest.raises(InputError, match="reconstruct needs batches"):
        prune(tiny_vit(), "magnitude", 0.5, reconstruct=8)
    with pytest.raises(InputError, match="reconstruct needs batches"):
        prune(tiny_vit(), "magnitude", 0.5, batches=[], reconstruct=8)


def test_shares__batches_of_images_are_divided_by_gradients() -> None:
    shares = Shares(BATCHES, 12, 3, per_sample=True)
    assert shares.gradients == 4
    assert [id(batch) for batch in shares.again(1)] == [id(BATCHES[1])]


def test_prune__an_early_round_goes_as_far_as_the_floors() -> None:
    """A floor of 70 % lies above what the first of three rounds to 80 % would prune."""
    model = tiny_vit().eval()
    report = prune(model, ovit(), 0.8, batches=BATCHES, rounds=3, floor=0.7)
    assert report.sparsity == pytest.approx(0.8, abs=1e-3)
    assert min(share_of_zeros(model)) >= 0.7


@pytest.mark.parametrize("pattern", ["2:4", "1x4"])
def test_prune__rounds_and_reconstruction_keep_a_pattern(pattern: str) -> None:
    model = tiny_vit().eval()
    report = prune(model, "magnitude", 0.5, batches=BATCHES, pattern=pattern, rounds=2, reconstruct=8)
    for layer in find_layers(model):
        kept = (model.get_parameter(layer.name) != 0).reshape(-1, 4).sum(1)
        assert set(kept.tolist()) <= ({2} if pattern == "2:4" else {0, 4})
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)


def test_prune__half_precision_is_reconstructed_in_float32() -> None:
    model = tiny_vit().eval().half()
    halves = [(images.half(), labels) for images, labels in BATCHES]
    report = prune(model, "magnitude", 0.5, batches=halves, reconstruct=8)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert min(share_of_zeros(model)) > 0
    assert report.reconstruction is not None
    assert all(after <= before for before, after in report.reconstruction.errors.values())


def share_of_zeros(model: torch.nn.Module) -> list[float]:
    weights = [model.get_parameter(layer.name) for layer in find_layers(model)]
    return [float((weight == 0).float().mean()) for weight in weights]
