"""``damp: auto``: the λ of least held-out loss, found without leaving a trace."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import batches, quick, state, tiny_vit, uneven
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pruners import InputError, create_pruner, find_layers, prune
from pruners.elimination.damping import LADDER, choose_damp
from pruners.elimination.gradients import summed_loss
from pruners.elimination.memory import fisher_bytes
from pruners.methods.registry import SECOND_ORDER

METHODS = sorted(SECOND_ORDER)
OPTIONS = {"block_size": 32, "damp": "auto", "gradients": 4}
LOSS = nn.functional.cross_entropy

every_method = pytest.mark.parametrize("method", METHODS)


@given(losses=st.lists(st.sampled_from([0.5, 1.0, 2.0, math.inf, math.nan]), min_size=6, max_size=6))
@quick(60)
def test_damping__the_least_loss_wins_and_of_equal_ones_the_larger_damp(losses: list[float]) -> None:
    by_damp = dict(zip(LADDER, losses, strict=True))
    finite = {damp: loss for damp, loss in by_damp.items() if math.isfinite(loss)}
    if not finite:
        with pytest.raises(InputError, match=r"damp = 'auto': none of 0\.0001, 1e-05, .* gives a finite"):
            choose_damp(by_damp.__getitem__)
        return
    choice = choose_damp(by_damp.__getitem__)
    assert choice.damp == max(damp for damp, loss in finite.items() if loss == min(finite.values()))
    assert choice.losses == {d: loss if math.isfinite(loss) else math.inf for d, loss in by_damp.items()}


def test_damping__the_order_of_the_ladder_does_not_matter() -> None:
    assert choose_damp(lambda damp: 1.0, LADDER[::-1]).damp == LADDER[0]
    assert choose_damp(lambda damp: damp).damp == LADDER[-1]


def test_damping__a_damp_that_fails_is_passed_over() -> None:
    def loss_at(damp: float) -> float:
        if damp < 1e-6:
            raise InputError("damp", damp, "too small")
        return 1 + damp

    choice = choose_damp(loss_at)
    assert choice.damp == 1e-6
    assert [damp for damp, loss in choice.losses.items() if math.isinf(loss)] == [1e-7, 1e-8, 1e-9]
    assert "damp 1e-06 has the lowest held-out loss" in choice.why
    assert "1e-09: inf" in choice.why


def test_damping__if_all_fail_or_anything_else_does_it_is_an_error() -> None:
    def failing(key: str) -> float:
        raise InputError(key, 1, "boom")

    with pytest.raises(InputError, match="damp = 'auto': none of"):
        choose_damp(lambda damp: failing("damp"))
    with pytest.raises(InputError, match="gradient = 1: boom"):
        choose_damp(lambda damp: failing("gradient"))


@every_method
def test_damping__the_curve_is_that_of_pruning_with_each_and_the_best_is_taken(method: str) -> None:
    model = tiny_vit()
    report = prune(model, method, 0.7, batches=batches(7), **OPTIONS)
    assert report.damp is not None
    assert list(report.damp.losses) == list(LADDER)
    states = {}
    for damp, loss in report.damp.losses.items():
        other = tiny_vit()
        pruner = create_pruner(method, block_size=32, damp=damp, relative=False)
        prune(other, pruner, 0.7, batches=batches(4))
        total, images = summed_loss(other, batches(7)[4:], LOSS)
        assert loss == pytest.approx(total / images, rel=1e-6)
        states[damp] = state(other)
    assert report.damp.damp == min(LADDER, key=lambda damp: (report.damp.losses[damp], -damp))
    assert len(set(report.damp.losses.values())) > 2
    assert state(model) == states[report.damp.damp]


def test_damping__several_passes_choose_the_same() -> None:
    single, many = tiny_vit(), tiny_vit()
    report = prune(single, "ovit", 0.7, batches=batches(7), **OPTIONS)
    memory = max(fisher_bytes(layer, 32) for layer in find_layers(single))
    again = prune(many, "ovit", 0.7, batches=batches(7), memory=memory, **OPTIONS)
    assert again.damp == report.damp
    assert state(single) == state(many)


class Recorder:
    """Cross entropy that remembers which labels were asked for gradients, and which only for a loss."""

    def __init__(self) -> None:
        self.gradients: list[tuple[int, ...]] = []
        self.held_out: list[tuple[int, ...]] = []

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        (self.gradients if torch.is_grad_enabled() else self.held_out).append(tuple(labels.tolist()))
        return LOSS(outputs, labels)


def told_apart(count: int) -> list[tuple[Tensor, Tensor]]:
    """Batches whose labels say which they are."""
    return [
        (images, torch.tensor([number // 25, number // 5 % 5, number % 5, 0]))
        for number, (images, _) in enumerate(batches(count))
    ]


@pytest.mark.parametrize("once", [False, True])
def test_damping__held_out_batches_are_those_that_follow_the_gradients(once: bool) -> None:
    given = told_apart(30)
    labels = [tuple(labels.tolist()) for _, labels in given]
    assert len(set(labels)) == 30
    loss = Recorder()
    prune(tiny_vit(), "ovit", 0.5, batches=iter(given) if once else given, loss=loss, **OPTIONS)
    assert loss.gradients == labels[:4]  # read once, for all of the ladder
    assert loss.held_out == labels[4:20] * len(LADDER)  # sixteen of them


def test_damping__held_out_batches_may_be_given() -> None:
    loss = Recorder()
    first, last = told_apart(9)[:6], told_apart(9)[6:]
    report = prune(tiny_vit(), "ovit", 0.5, batches=first, held_out=iter(last), loss=loss, **OPTIONS)
    assert loss.gradients == [tuple(labels.tolist()) for _, labels in first[:4]]
    assert loss.held_out == [tuple(labels.tolist()) for _, labels in last] * len(LADDER)
    assert report.damp is not None


def test_damping__of_single_images_the_batches_that_hold_them_are_not_held_out() -> None:
    loss = Recorder()
    labels = [tuple(labels.tolist()) for _, labels in told_apart(6)]
    options = {**OPTIONS, "gradients": 6, "per_sample": True}  # of batches of four
    prune(tiny_vit(), "ovit", 0.5, batches=told_apart(6), loss=loss_of_one(loss), **options)
    assert loss.held_out == labels[2:] * len(LADDER)


def loss_of_one(record: Recorder) -> Recorder:
    """A recorder that does not look at labels inside of ``vmap``, where they have no values."""

    class Outside(Recorder):
        def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                return LOSS(outputs, labels)
            return record(outputs, labels)

    return Outside()


def test_damping__without_batches_to_hold_out_it_is_refused_and_the_model_untouched() -> None:
    model = uneven()
    before = state(model)
    for arguments in ({"batches": batches(4)}, {"batches": batches(6), "held_out": []}):
        with pytest.raises(InputError, match="held_out: damp = auto needs batches beyond those of"):
            prune(model, "ovit", 0.5, **arguments, **OPTIONS)
        assert state(model) == before


@pytest.mark.parametrize("error", [RuntimeError, InputError, KeyboardInterrupt, None])
def test_damping__the_model_is_untouched_where_a_try_fails(error: type[BaseException] | None) -> None:
    model = uneven()
    before = state(model)
    scored = []

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return LOSS(outputs, labels)
        scored.append(outputs)
        if error is None:
            return outputs.sum() * torch.nan  # all of them
        if len(scored) > 5:
            raise error("data", 1, "boom") if error is InputError else error("boom")
        return LOSS(outputs, labels)

    with pytest.raises(error or InputError, match="boom" if error else "none of"):
        prune(model, "ovit", 0.5, batches=batches(7), loss=loss, **OPTIONS)
    assert len(scored) > 5
    assert state(model) == before


def test_damping__a_method_without_a_fisher_or_a_pruner_of_ones_own() -> None:
    with pytest.raises(InputError, match="damp = 'auto': lamp has no Fisher to damp"):
        prune(tiny_vit(), "lamp", 0.5, batches=batches(7), damp="auto")
    report = prune(
        tiny_vit(), create_pruner("ovit", block_size=32), 0.7, batches=batches(7), damp="auto", gradients=4
    )
    by_name = prune(tiny_vit(), "ovit", 0.7, batches=batches(7), **OPTIONS)
    assert report.damp == by_name.damp
