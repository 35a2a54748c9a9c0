"""What every method keeps with every pattern: each group of each layer, of a ViT and of convolutions."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import batches, state, threads, tiny_conv, tiny_vit, zeros
from patterns import layers_of, zeros_in_groups
from torch import nn

from pruners import METHODS, InputError, PruneReport, create_pruner, find_layers, prune

KINDS: dict[str, Callable[[], nn.Module]] = {"vit": tiny_vit, "conv": tiny_conv}
SIZES = {"2:4": 4, "4:8": 8, "1x4": 4}

every_method = pytest.mark.parametrize("method", [*METHODS, "ovit-blocks-of-7"])
every_pattern = pytest.mark.parametrize("pattern", SIZES)


def named(method: str) -> tuple[str, dict[str, object]]:
    """A method by name, and its options."""
    return ("ovit", {"block_size": 7, "damp": 1e-4}) if method == "ovit-blocks-of-7" else (method, {})


def pruned(model: nn.Module, method: str, pattern: str, sparsity: float | None) -> PruneReport:
    name, options = named(method)
    chosen = layers_of(model)
    return prune(model, name, sparsity, batches=batches(4), layers=chosen, pattern=pattern, **options)


def assert_pattern(model: nn.Module, report: PruneReport, pattern: str, *, at_forced: bool) -> None:
    layers = layers_of(model)
    zero_masks = zeros(model, layers)
    assert {name: int(zero.sum()) for name, zero in zero_masks.items()} == report.allocation
    size = SIZES[pattern]
    for layer in layers:
        zero = zero_masks[layer.name]
        assert torch.equal(zero, ~report.masks[layer.name])
        assert torch.isfinite(model.get_parameter(layer.name)).all()
        counts = zeros_in_groups(zero, size)
        assert counts.numel() * size == layer.numel
        if pattern == "1x4":
            assert set(counts.unique().tolist()) <= {0, size}
        elif at_forced:
            assert (counts == size // 2).all()
        else:
            assert (counts <= size // 2).all()


@every_method
@every_pattern
@pytest.mark.parametrize("kind", KINDS)
def test_pattern_contract__every_group_of_every_layer_keeps_the_pattern(
    method: str, pattern: str, kind: str
) -> None:
    model = KINDS[kind]()
    before = copy.deepcopy(model.state_dict())
    report = pruned(model, method, pattern, 0.7 if pattern == "1x4" else None)
    assert_pattern(model, report, pattern, at_forced=True)
    numel = report.masks.numel
    wanted = round(0.7 * numel / 4) * 4 if pattern == "1x4" else numel // 2
    assert sum(report.allocation.values()) == wanted
    assert {name: tuple(mask.shape) for name, mask in report.masks.items()} == {
        layer.name: layer.shape for layer in layers_of(model)
    }
    for name, tensor in model.state_dict().items():
        assert name in report.masks or torch.equal(tensor, before[name])


@every_method
@every_pattern
def test_pattern_contract__a_gradual_run_keeps_the_pattern_and_the_old_zeros(
    method: str, pattern: str
) -> None:
    model = tiny_conv()
    steps = (0.4, 0.8) if pattern == "1x4" else (0.3, 0.5)
    first = pruned(model, method, pattern, steps[0])
    assert_pattern(model, first, pattern, at_forced=False)
    assert first.sparsity == pytest.approx(steps[0], abs=2 / first.masks.numel)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, mask in first.masks.items():
            model.get_parameter(name).add_(0.02 * torch.randn(mask.shape, generator=random) * mask)
    second = pruned(model, method, pattern, steps[1])
    assert_pattern(model, second, pattern, at_forced=True)
    assert second.sparsity == pytest.approx(steps[1], abs=2 / first.masks.numel)
    for name, mask in first.masks.items():
        assert not (second.masks[name] & ~mask).any()


@pytest.mark.parametrize("method", ["dimap", "ovit", "woodfisher"])
@every_pattern
def test_pattern_contract__one_thread_or_two_give_the_same(method: str, pattern: str) -> None:
    results = []
    for count in (1, 2):
        model = tiny_vit()  # torch's own gradients of a convolution depend on its threads
        with threads(count):
            report = pruned(model, method, pattern, 0.5)
        results.append((state(model), report.masks.fingerprint()))
    assert results[0] == results[1]


@every_method
@every_pattern
def test_pattern_contract__a_layer_that_does_not_fit_is_named_or_stays_dense(
    method: str, pattern: str
) -> None:
    model = tiny_conv()
    chosen = find_layers(model, {"CONV": ["0", "2", "4"]})  # the stem has three inputs
    before = state(model)
    name, own = named(method)
    options = {"batches": batches(2), "layers": chosen, "pattern": pattern, **own}
    with pytest.raises(InputError, match=r"pattern = .*cannot fit 0\.weight, which has 3 inputs"):
        prune(model, name, 0.5, **options)
    assert state(model) == before
    stem = model.get_parameter("0.weight").detach().clone()
    report = prune(model, name, 0.5, unfit="dense", **options)
    assert set(report.masks) == {"2.weight", "4.weight"}
    assert report.sparsity == 0.5  # of the layers that are pruned
    assert torch.equal(model.get_parameter("0.weight"), stem)
    assert_pattern(model, report, pattern, at_forced=True)


@every_method
@pytest.mark.parametrize("pattern", ["2;4", "4:2", "2:4:8", "1x1", "4x1"])
def test_pattern_contract__a_typo_in_a_pattern_is_refused(method: str, pattern: str) -> None:
    with pytest.raises(InputError, match=f"pattern = '{pattern}': must be unstructured"):
        create_pruner(named(method)[0], pattern=pattern)


@every_method
def test_pattern_contract__zeros_that_break_a_pattern_are_named_and_the_model_untouched(method: str) -> None:
    model = tiny_conv()
    with torch.no_grad():
        model.get_parameter("4.weight")[3, 5] = 0.0
    before = state(model)
    with pytest.raises(InputError, match=r"4\.weight.*1 of its blocks are zero in part; 1x4 needs whole"):
        pruned(model, method, "1x4", 0.5)
    assert state(model) == before


@every_method
def test_pattern_contract__groups_that_are_sparser_than_the_pattern_stay_so(method: str) -> None:
    """2:4 of a model that has groups of three and four zeros: those stay, the others get two."""
    model = tiny_conv()
    weight = model.get_parameter("2.weight")
    with torch.no_grad():
        weight[:, 0:4, 0, 0] = 0.0
        weight[:, 0:3, 1, 1] = 0.0
    report = pruned(model, method, "2:4", None)
    counts = zeros_in_groups(~report.masks["2.weight"], 4)
    expected = torch.full_like(counts, 2)
    expected[:, 0, 0, 0], expected[:, 0, 1, 1] = 4, 3
    assert torch.equal(counts, expected)
    assert (zeros_in_groups(~report.masks["4.weight"], 4) == 2).all()
