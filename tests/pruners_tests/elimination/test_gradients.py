"""Gradients for the Fisher: eval mode, one batch's mean loss each or one image's, masked."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import CONVOLUTIONS, batches, state, tiny_conv, tiny_swin, tiny_vit, uneven
from torch import Tensor, nn

from pruners import MaskSet, PrunableLayer, find_layers
from pruners.elimination.gradients import Batch, gradients, summed_loss

LOSS = nn.functional.cross_entropy
MODELS: dict[str, Callable[[], nn.Module]] = {"vit": tiny_vit, "swin": tiny_swin, "conv": tiny_conv}
every_model = pytest.mark.parametrize("kind", MODELS)
either = pytest.mark.parametrize("per_sample", [False, True])


def prepared(kind: str) -> tuple[nn.Module, list[PrunableLayer], MaskSet]:
    """A model in training mode that drops much there, and random masks, one of them dense."""
    model = MODELS[kind]()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.9
    layers = find_layers(model, CONVOLUTIONS if kind == "conv" else None)
    random = torch.Generator().manual_seed(0)
    masks = {layer.name: torch.rand(layer.shape, generator=random) < 0.5 for layer in layers}
    masks[layers[0].name].fill_(True)
    return model.train(), layers, MaskSet(masks)


def by_autograd(
    model: nn.Module, layers: list[PrunableLayer], masks: MaskSet, images: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    model.eval()
    weights = [model.get_parameter(layer.name) for layer in layers]
    unmasked = torch.autograd.grad(LOSS(model(images), labels), weights)
    return {
        layer.name: torch.where(masks[layer.name], gradient, 0.0)
        for layer, gradient in zip(layers, unmasked, strict=True)
    }


def together(parts: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    """(k, *shape) of each layer over all that was yielded."""
    every = list(parts)
    return {name: torch.cat([some[name] for some in every]) for name in every[0]}


@every_model
def test_gradients__each_is_the_masked_gradient_of_one_batch_in_eval_mode(kind: str) -> None:
    model, layers, masks = prepared(kind)
    stacked = together(gradients(model, layers, masks, batches(4), LOSS, limit=3))
    for number, (images, labels) in enumerate(batches(3)):
        expected = by_autograd(model, layers, masks, images, labels)
        assert set(stacked) == set(expected)
        for name, gradient in expected.items():
            assert gradient.any()
            torch.testing.assert_close(stacked[name][number], gradient)
    assert all(len(one) == 3 for one in stacked.values())


@every_model
def test_gradients__each_is_the_masked_gradient_of_one_image_if_so_asked(kind: str) -> None:
    model, layers, masks = prepared(kind)
    images = torch.randn(19, 3, 32, 32, generator=torch.Generator().manual_seed(1))  # 16 go at a time
    labels = torch.arange(19) % 5
    given: list[Batch] = [(images, labels), *batches(1)]
    stacked = together(gradients(model, layers, masks, given, LOSS, per_sample=True))
    assert all(len(one) == 23 for one in stacked.values())
    for number in (0, 7, 15, 16, 18, 22):
        batch, index = (given[0], number) if number < 19 else (given[1], number - 19)
        expected = by_autograd(model, layers, masks, *(part[index : index + 1] for part in batch))
        for name, gradient in expected.items():
            torch.testing.assert_close(stacked[name][number], gradient, rtol=1e-4, atol=1e-6)


def test_gradients__those_of_the_images_average_to_that_of_the_batch() -> None:
    model, layers, masks = prepared("vit")
    images = together(gradients(model, layers, masks, batches(1), LOSS, per_sample=True))
    batch = together(gradients(model, layers, masks, batches(1), LOSS))
    for name, gradient in batch.items():
        torch.testing.assert_close(images[name].mean(0), gradient[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("limit", "left"), [(0, 6), (1, 5), (4, 2), (6, 0), (9, 0), (None, 0)])
def test_gradients__no_more_batches_are_drawn_than_the_limit(limit: int | None, left: int) -> None:
    model, layers, masks = prepared("vit")
    source = iter(batches(6))
    yielded = list(gradients(model, layers, masks, source, LOSS, limit=limit))
    assert len(yielded) == 6 - left
    assert len(list(source)) == left


@pytest.mark.parametrize(("limit", "count", "left"), [(3, 3, 5), (4, 4, 5), (5, 5, 4), (None, 24, 0)])
def test_gradients__the_limit_counts_images_where_each_has_its_gradient(
    limit: int | None, count: int, left: int
) -> None:
    model, layers, masks = prepared("vit")
    source = iter(batches(6))
    stacked = together(gradients(model, layers, masks, source, LOSS, limit=limit, per_sample=True))
    assert all(len(one) == count for one in stacked.values())
    assert len(list(source)) == left
    every = together(gradients(model, layers, masks, batches(6), LOSS, per_sample=True))
    assert all(torch.equal(one, every[name][:count]) for name, one in stacked.items())


@either
def test_gradients__modes_and_gradients_are_restored_in_the_end_or_when_it_is_left(per_sample: bool) -> None:
    model = uneven()
    layers = find_layers(model)
    masks = MaskSet.dense(model, layers)
    before = state(model)
    for _ in gradients(model, layers, masks, batches(2), LOSS, per_sample=per_sample):
        assert not any(module.training for module in model.modules())
    assert state(model) == before
    source = gradients(model, layers, masks, batches(2), LOSS, per_sample=per_sample)
    next(source)
    source.close()
    assert state(model) == before


@either
def test_gradients__modes_are_restored_after_an_error(per_sample: bool) -> None:
    model = uneven()
    layers = find_layers(model)
    before = state(model)

    def broken(outputs: Tensor, labels: Tensor) -> Tensor:
        raise RuntimeError("boom")

    masks = MaskSet.dense(model, layers)
    with pytest.raises(RuntimeError, match="boom"):
        next(gradients(model, layers, masks, batches(1), broken, per_sample=per_sample))
    assert state(model) == before


def test_gradients__the_mean_loss_weighs_batches_by_their_images() -> None:
    model = tiny_vit().train()
    given = [*batches(2), (batches(1)[0][0][:1], batches(1)[0][1][:1])]
    total, images = summed_loss(model, given, LOSS)
    assert images == 9
    assert model.training
    whole = LOSS(model.eval()(torch.cat([x for x, _ in given])), torch.cat([y for _, y in given]))
    assert total / images == pytest.approx(float(whole.detach()), rel=1e-5)
    assert summed_loss(model, [], LOSS) == (0.0, 0)
