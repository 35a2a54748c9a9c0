"""The formulation for GPUs, run on a CPU: every method and pattern as with the compiled loops."""

from __future__ import annotations

import pytest
import torch
from helpers import batches, tiny_conv, tiny_vit
from layer_problems import DAMP, problem
from patterns import layers_of
from torch import nn

from pruners import METHODS, PruneReport, create_pruner, prune
from pruners.elimination import kernels
from pruners.methods.ovit import OViT

CASES = [(method, "unstructured") for method in METHODS if create_pruner(method).gradients]
CASES += [(method, pattern) for method in ("ovit", "woodfisher") for pattern in ("2:4", "1x4")]


@pytest.fixture
def batched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Compiled loops fit nothing from here on, and fail if they are asked."""
    monkeypatch.setattr(kernels.threads, "supports", lambda *tensors: False)
    for module, names in (
        (kernels.threads, ("on_threads",)),
        (kernels.inverse, ("invert",)),
        (kernels.eliminate, ("eliminate", "invert_and_eliminate")),
        (kernels.steps, ("round_steps", "apply_steps")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, None)
    return monkeypatch


def pruned(model: nn.Module, method: str, pattern: str) -> PruneReport:
    """After an earlier step, so that blocks have dead weights, each another number of them."""
    layers = layers_of(model)
    unit = "1x4" if pattern == "1x4" else "unstructured"
    prune(model, "magnitude_global", 0.2, layers=layers, pattern=unit)
    options = {"block_size": 48, "damp": 1e-2 if method == "ovit_fast" else 1e-4, "pattern": pattern}
    return prune(
        model, method, 0.6 if pattern != "2:4" else None, batches=batches(6), layers=layers, **options
    )


@pytest.mark.parametrize(("method", "pattern"), CASES)
@pytest.mark.parametrize("kind", ["vit", "conv"])
def test_batched__masks_are_the_same_and_weights_nearly(
    method: str, pattern: str, kind: str, request: pytest.FixtureRequest
) -> None:
    made = tiny_vit if kind == "vit" else tiny_conv
    compiled, other = made(), made()
    expected = pruned(compiled, method, pattern)
    request.getfixturevalue("batched")
    report = pruned(other, method, pattern)
    assert report.masks.fingerprint() == expected.masks.fingerprint()
    for name in report.masks:
        compiled_weight, batched_weight = (model.get_parameter(name).detach() for model in (compiled, other))
        torch.testing.assert_close(batched_weight, compiled_weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1x4"])
@pytest.mark.usefixtures("batched")
def test_batched__blocks_that_run_out_before_others_keep_finite_weights(pattern: str) -> None:
    """The last block is short, and one has a single weight to lose."""
    given = problem(0, 52, 1.0)
    given.mask[0, 12:20] = False
    order = given.ordered(OViT(block_size=12, damp=DAMP, pattern=pattern))
    for count in range(order.zeros, len(order.indices) + 1, order.pattern.unit):
        weight, mask = order.at(given.weight, count)
        assert torch.isfinite(weight).all()
        assert torch.equal(weight != 0, mask)
