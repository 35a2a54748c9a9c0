"""N:M and whole blocks inside the elimination, against a surgeon under the same constraint."""

from __future__ import annotations

import pytest
import torch
from helpers import quick
from hypothesis import given
from hypothesis import strategies as st
from surgery import (
    Allowed,
    assert_follows,
    assert_idle_steps_do_nothing,
    blocks_of,
    eliminated,
    few_of_each,
    surgeon,
    weights_after,
    whole_groups,
)
from torch import Tensor

from pruners.elimination.constraints import GroupLimits, WholeGroups
from pruners.elimination.obs import Elimination
from pruners.model.sparsity_pattern import Pattern


def assert_constrained_surgery(
    done: Elimination, weights: Tensor, fisher: Tensor, alive: Tensor, allowed: list[Allowed]
) -> None:
    assert_idle_steps_do_nothing(done)
    for block, rule in enumerate(allowed):
        expected = surgeon(weights[block], fisher[block], alive[block], rule)
        assert_follows(done, block, expected, (weights, alive), done.order.shape[1])


@given(
    seed=st.integers(0, 10**6),
    groups=st.sampled_from([1, 3, 12, 20]),  # more than a panel of 32 steps, too
    pattern=st.sampled_from(["2:4", "1:4", "3:4", "4:8"]),
    alive_share=st.sampled_from([1.0, 0.6, 0.2]),
)
@quick(40)
def test_constraints__a_few_of_each_group(seed: int, groups: int, pattern: str, alive_share: float) -> None:
    form = Pattern.parse(pattern)
    weights, fisher, alive = blocks_of(
        seed, 2, groups * 4 // form.group * form.group or form.group, alive_share=alive_share
    )
    room = form.room(alive)
    rule = GroupLimits((torch.arange(alive.shape[1]) // form.group).expand_as(alive), room)
    done = eliminated(weights, fisher, alive, constraint=rule, steps=int(room.sum(1).max()))
    allowed = [few_of_each(form.group, form.group - form.keep, one) for one in alive]
    assert_constrained_surgery(done, weights, fisher, alive, allowed)
    for block in range(2):  # and it ends where the pattern is reached
        fallen = done.order[block][done.losses[block].isfinite()]
        zero = ~alive[block]
        zero[fallen] = True
        before = (~alive[block]).reshape(-1, form.group).sum(1)
        at_end = zero.reshape(-1, form.group).sum(1)
        assert torch.equal(at_end, before.clamp_min(form.group - form.keep))


def test_constraints__a_full_group_still_follows_the_others() -> None:
    weights, fisher, alive = blocks_of(5, 1, 8, alive_share=1.0)
    weights[0, :4] *= 1e-3  # the first group fills up first
    groups = (torch.arange(8) // 4).unsqueeze(0)
    done = eliminated(weights, fisher, alive, constraint=GroupLimits(groups, torch.tensor([[2, 2]])), steps=4)
    assert sorted((done.order[0] // 4).tolist()) == [0, 0, 1, 1]
    assert (done.order[0, :2] // 4).tolist() == [0, 0]
    stay = [place for place in range(4) if place not in done.order[0]]
    two, four = (weights_after(done, weights, alive, 0, count) for count in (2, 4))
    assert (two[stay] != four[stay]).all()


@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([2, 4, 5]),
    groups=st.sampled_from([1, 3, 11]),
    alive_share=st.sampled_from([1.0, 0.5]),
)
@quick(40)
def test_constraints__groups_fall_whole(seed: int, size: int, groups: int, alive_share: float) -> None:
    problem = blocks_of(seed, 3, size * groups, alive_share=alive_share, unit=size)
    done = eliminated(*problem, constraint=WholeGroups(size))
    assert_constrained_surgery(done, *problem, [whole_groups(size, one) for one in problem[2]])


def test_constraints__groups_fall_whole_in_some_steps_too() -> None:
    problem = blocks_of(7, 2, 40, alive_share=0.8, unit=4)
    done = eliminated(*problem, constraint=WholeGroups(4), steps=12)
    assert done.order.shape == (2, 12)
    assert_constrained_surgery(done, *problem, [whole_groups(4, one) for one in problem[2]])


def test_constraints__the_joint_loss_is_that_of_the_group_not_the_sum_of_its_weights() -> None:
    """Two pairs; in the first each weight alone seems cheap, as the other can take over: but not both."""
    fisher = torch.eye(4, dtype=torch.float64).unsqueeze(0).clone()
    fisher[0, 0, 1] = fisher[0, 1, 0] = 0.99
    weights = torch.tensor([[1.0, 1.0, 0.9, 0.9]], dtype=torch.float64)
    inverse = torch.linalg.inv(fisher[0])
    alone = weights[0].square() / (2 * inverse.diagonal())
    assert alone[:2].sum() < alone[2:].sum()
    done = eliminated(weights, fisher, torch.ones(1, 4, dtype=torch.bool), constraint=WholeGroups(2))
    assert done.order[0].tolist() == [2, 3, 0, 1]
    assert done.losses[0, 1] == pytest.approx(0.81)
    assert done.losses[0, 3] == pytest.approx(0.81 + 1.99)
