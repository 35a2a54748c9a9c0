"""Top-1, loss and score against numbers by hand."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import quick
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from trainers.loop.evaluation import Evaluation, evaluate


class Given(nn.Module):
    """Gives its input back as logits; notes the mode it was called in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.modes: list[bool] = []

    def forward(self, logits: Tensor) -> Tensor:
        self.modes.append(self.training)
        return logits * self.weight


LOGITS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0], [0.0, 0.5]])
LABELS = torch.tensor([0, 1, 0, 0, 1])


def test_evaluation__by_hand() -> None:
    losses = [math.log(1 + math.exp(-x)) for x in (2.0, 1.0, -3.0, 1.0, 0.5)]
    result = evaluate(Given(), [(LOGITS[:2], LABELS[:2]), (LOGITS[2:], LABELS[2:])])
    assert result.top1 == pytest.approx(4 / 5)
    assert result.loss == pytest.approx(sum(losses) / 5)
    assert result.images == 5


def test_evaluation__uneven_batches_count_by_image() -> None:
    first = evaluate(Given(), [(LOGITS, LABELS)])
    many = evaluate(Given(), [(LOGITS[i : i + 1], LABELS[i : i + 1]) for i in range(5)])
    assert first.top1 == many.top1
    assert first.loss == pytest.approx(many.loss)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation__eval_mode_and_no_gradients(training: bool) -> None:
    model = Given().train(training)
    evaluate(model, [(LOGITS, LABELS)])
    assert model.modes == [False]
    assert model.training is training
    assert model.weight.grad is None


def test_evaluation__nothing_to_evaluate() -> None:
    with pytest.raises(ValueError, match="no images"):
        evaluate(Given(), [])


@quick(200)
@given(
    st.integers(1, 5000).flatmap(
        lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n), min_size=2, max_size=2))
    ),
    st.lists(st.floats(0.0, 1e6), min_size=2, max_size=2),
)
def test_evaluation__one_more_right_image_beats_any_loss(
    counts: tuple[int, list[int]], losses: list[float]
) -> None:
    images, right = counts
    first, second = (Evaluation(r / images, loss, images) for r, loss in zip(right, losses, strict=True))
    if right[0] > right[1]:
        assert first.score > second.score
    elif right[0] == right[1] and losses[0] <= losses[1]:
        assert first.score >= second.score
