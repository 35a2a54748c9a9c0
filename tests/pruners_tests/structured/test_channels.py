"""What channels are worth against loops over single weights, which stay, and what is left of the tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import quick
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from pruners.elimination.gradients import gradients
from pruners.errors import InputError
from pruners.model.layers import PrunableLayer
from pruners.structured.channels import KINDS, Channels, Cut, Member, most_important, saliencies
from pruners.structured.dependency import ChannelDependencies

HIDDEN = 6


def tiny_mlp() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(4, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 3))


def mlp_batches() -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(5)
    return [(torch.randn(8, 4, generator=random), torch.randint(3, (8,), generator=random)) for _ in range(3)]


def by_loops(model: nn.Module, kind: str) -> list[float]:
    """The worth of each hidden unit, weight by weight: its row, its bias, its column."""
    worths = []
    for unit in range(HIDDEN):
        weights = [("0.weight", (unit, i)) for i in range(4)]
        weights += [("0.bias", (unit,)), *(("2.weight", (i, unit)) for i in range(3))]
        total = 0.0
        for name, index in weights:
            parameter = model.get_parameter(name)
            w = float(parameter.detach()[index])
            if kind == "magnitude":
                total += w * w
                continue
            for images, labels in mlp_batches():
                model.zero_grad()
                functional.cross_entropy(model(images), labels).backward()
                assert parameter.grad is not None
                g = float(parameter.grad[index])
                total += (abs(w * g) if kind == "taylor" else w * w * g * g / 2) / 3
        worths.append(total)
    return worths


def worth(model: nn.Module, kind: str) -> tuple[Channels, Tensor]:
    hidden = ChannelDependencies(model, mlp_batches()[0][0][:2]).of("0")
    weights = {member.name: model.get_parameter(member.name) for member in hidden.members}
    layers = [PrunableLayer(name, "", 0, tuple(weight.shape)) for name, weight in weights.items()]
    source = gradients(model, layers, {}, mlp_batches(), functional.cross_entropy)
    return hidden, hidden.importance(saliencies(kind, weights, source))


@pytest.mark.parametrize("kind", KINDS)
def test_channels__worth_is_the_sum_over_single_weights(kind: str) -> None:
    model = tiny_mlp()
    _, worths = worth(model, kind)
    assert worths.tolist() == pytest.approx(by_loops(model, kind), rel=1e-5)


@pytest.mark.parametrize("kind", ["taylor", "fisher"])
def test_channels__a_unit_that_nobody_hears_is_worth_nothing_and_cut_first(kind: str) -> None:
    model = tiny_mlp()
    with torch.no_grad():
        model.get_parameter("2.weight")[:, 2] = 0.0
        model.get_parameter("0.weight")[2] *= 10  # large, and of no use
    hidden, worths = worth(model, kind)
    assert float(worths[2]) == 0
    stays = most_important(worths, HIDDEN - 1)
    assert stays.tolist() == [True, True, False, True, True, True]
    cut = Cut({name: tensor.shape for name, tensor in model.state_dict().items()})
    cut.drop(hidden, stays)
    smaller = nn.Sequential(nn.Linear(4, HIDDEN - 1), nn.GELU(), nn.Linear(HIDDEN - 1, 3))
    smaller.load_state_dict(cut.sliced(model.state_dict()))
    images = mlp_batches()[0][0]
    assert torch.allclose(smaller(images), model(images), atol=1e-6)


def test_channels__magnitude_takes_no_gradients() -> None:
    def never() -> None:
        raise AssertionError("gradients were asked for")

    source = (never() for _ in range(1))
    squares = saliencies("magnitude", {"a": torch.tensor([2.0, -3.0])}, source)  # type: ignore[arg-type]
    assert squares["a"].tolist() == [4.0, 9.0]


@pytest.mark.parametrize(
    ("kind", "gradient", "says"),
    [
        ("hessian", None, "did you mean"),
        ("fisher", None, "at least one gradient"),
        ("fisher", [[1.0, torch.nan]], "NaN or Inf"),
        ("taylor", [[1.0, torch.inf]], "NaN or Inf"),
    ],
)
def test_channels__bad_saliencies_are_refused(
    kind: str, gradient: list[list[float]] | None, says: str
) -> None:
    source = [] if gradient is None else [{"a": torch.tensor(gradient)}]
    if kind == "hessian":
        says = "must be one of magnitude, taylor, fisher"
    with pytest.raises(InputError, match=says):
        saliencies(kind, {"a": torch.ones(2)}, source)


def test_channels__of_equals_the_first_stay() -> None:
    assert most_important(torch.tensor([1.0, 1.0, 1.0, 2.0]), 2).tolist() == [True, False, False, True]


@quick(40)
@given(st.integers(1, 4), st.integers(1, 6), st.data())
def test_channels__the_best_of_each_group_stay(groups: int, size: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, size))
    values = data.draw(st.lists(st.integers(0, 9), min_size=groups * size, max_size=groups * size))
    stays = most_important(torch.tensor(values, dtype=torch.float64), keep, groups)
    for group in range(groups):
        part = range(group * size, (group + 1) * size)
        kept = sorted((values[i] for i in part if stays[i]), reverse=True)
        assert kept == sorted((values[i] for i in part), reverse=True)[:keep]


@quick(40)
@given(st.lists(st.booleans(), min_size=4, max_size=4), st.lists(st.booleans(), min_size=3, max_size=3))
def test_channels__slices_keep_their_order_and_zeros_their_places(
    rows: list[bool], columns: list[bool]
) -> None:
    """Channels with two places each, as queries and keys have, and others along the second dimension."""
    weight = torch.arange(24.0).reshape(8, 3) + 1
    positions = torch.tensor([[i, i + 4] for i in range(4)])
    cut = Cut({"w": weight.shape})
    cut.drop(Channels("a", (Member("w", 0, positions),)), torch.tensor(rows))
    cut.drop(Channels("b", (Member("w", 1, torch.arange(3).unsqueeze(1)),)), torch.tensor(columns))
    mesh = np.ix_(np.flatnonzero(rows + rows), np.flatnonzero(columns))
    assert np.array_equal(cut.sliced({"w": weight})["w"].numpy(), weight.numpy()[mesh])
    zeroed = cut.zeroed({"w": weight})["w"].numpy()
    assert np.array_equal(zeroed[mesh], weight.numpy()[mesh])
    assert np.count_nonzero(zeroed) == weight.numpy()[mesh].size


def test_channels__two_groups_may_cut_the_same_dimension() -> None:
    cut = Cut({"w": torch.Size([4, 1])})
    for first, dropped in ((0, 0), (2, 1)):
        member = Member("w", 0, torch.tensor([[first], [first + 1]]))
        cut.drop(Channels("part", (member,)), torch.tensor([dropped != 0, dropped != 1]))
    assert cut.sliced({"w": torch.arange(4).reshape(4, 1)})["w"].flatten().tolist() == [1, 2]
