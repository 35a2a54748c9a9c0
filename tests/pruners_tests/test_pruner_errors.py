"""What every pruning method keeps after an error: it names what was wrong, and the model is as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import PRUNERS, batches, state, uneven
from torch import Tensor, nn

from pruners import InputError, PruneReport, Scope, prune
from pruners.elimination.gradients import Batch
from pruners.errors import first_line
from pruners.methods.ovit import OViT

every_method = pytest.mark.parametrize("method", PRUNERS)
with_gradients = pytest.mark.parametrize(
    "method", [name for name, make in PRUNERS.items() if make().gradients]
)


def pruned(model: nn.Module, method: str, sparsity: float, scope: Scope | None = None) -> PruneReport:
    return prune(model, PRUNERS[method](), sparsity, batches=batches(), scope=scope)


@every_method
@pytest.mark.parametrize("sparsity", [1.5, -0.1, float("nan")])
def test_pruner_errors__a_sparsity_out_of_range_is_named_and_the_model_untouched(
    method: str, sparsity: float
) -> None:
    model = uneven()
    before = state(model)
    with pytest.raises(InputError, match="sparsity = "):
        pruned(model, method, sparsity)
    assert state(model) == before


@every_method
def test_pruner_errors__an_unknown_scope_is_named_and_the_model_untouched(method: str) -> None:
    model = uneven()
    before = state(model)
    with pytest.raises(InputError, match=r"scope = 'stages'.*did you mean 'stage'"):
        pruned(model, method, 0.5, "stages")  # type: ignore[arg-type]
    assert state(model) == before


@every_method
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pruner_errors__a_weight_that_is_no_number_is_named_and_the_model_untouched(
    method: str, value: float
) -> None:
    model = uneven()
    with torch.no_grad():
        model.get_parameter("blocks.2.mlp.fc1.weight")[1, 1] = value
    before = state(model)
    with pytest.raises(InputError, match=r"blocks\.2\.mlp\.fc1\.weight.*NaN or Inf"):
        pruned(model, method, 0.5)
    assert state(model) == before


@with_gradients
@pytest.mark.parametrize(
    ("given_batches", "message"),
    [
        (None, "needs batches of"),
        ([], "at least one gradient"),
        (batches(nan_in=2), r"gradient = 'blocks\.0\.attn\.qkv\.weight': has NaN or Inf in batch 2"),
    ],
    ids=["missing", "empty", "NaN"],
)
def test_pruner_errors__batches_that_cannot_be_used_are_named_and_the_model_untouched(
    method: str, given_batches: list[Batch] | None, message: str
) -> None:
    model = uneven()
    before = state(model)
    with pytest.raises(InputError, match=message):
        prune(model, PRUNERS[method](), 0.5, batches=given_batches)
    assert state(model) == before


@with_gradients
def test_pruner_errors__an_error_in_the_loss_leaves_the_model_untouched(method: str) -> None:
    model = uneven()
    before = state(model)

    def broken(outputs: Tensor, labels: Tensor) -> Tensor:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        prune(model, PRUNERS[method](), 0.5, batches=batches(), loss=broken)
    assert state(model) == before


def test_pruner_errors__an_unknown_method_is_named_and_the_model_untouched() -> None:
    model = uneven()
    before = state(model)
    with pytest.raises(InputError, match=r"method = 'dimp'.*did you mean 'dimap'"):
        prune(model, "dimp", 0.5)
    assert state(model) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "dimap", "block_size": 8}, r"method = 'dimap': has no such option.*block_size"),
        ({"method": "ovit", "blocksize": 8}, r"method = 'ovit': has no such option.*blocksize"),
        ({"method": OViT(), "block_size": 8}, r"block_size = 8: is for methods by name"),
        ({"method": "dimap", "damp": "auto"}, r"damp = 'auto': dimap has no Fisher"),
        ({"method": "ovit", "damp": -1.0}, r"damp = -1\.0: must be positive"),
        ({"method": "ovit", "block_size": {"QKV": 8}}, r"block_size = .*needs a size for MLP"),
        ({"method": "dimap", "pattern": "2:2"}, r"pattern = '2:2': must be"),
        ({"method": "dimap", "unfit": "drop"}, r"unfit = 'drop': must be refuse or dense"),
        ({"method": "dimap", "sparsity": None}, r"sparsity: must be given"),
        ({"method": "lamp", "pattern": "2:4", "sparsity": 0.6}, r"sparsity = 0\.6: 2:4 leads to 0\.5"),
        ({"method": "dimap", "floor": 0.6}, r"budget = 1536: .*nearest feasible: 1852 weights"),
        (
            {"method": "dimap", "ceiling": {r"mlp\.fc1": 0.1}, "sparsity": 0.9},
            "nearest feasible: 2148 weights",
        ),
        ({"method": "dimap", "floor": {"mlp.fc3": 0.6}}, r"floor = 'mlp\.fc3': matches none"),
        ({"method": "dimap", "table": {"mlp": 0.6}}, r"table = 'mlp': matches none"),
    ],
)
def test_pruner_errors__other_bad_input_is_named_and_the_model_untouched(
    arguments: dict[str, Any], message: str
) -> None:
    model = uneven()
    before = state(model)
    with pytest.raises(InputError, match=message):
        prune(model, **{"sparsity": 0.5, "batches": batches(2), **arguments})
    assert state(model) == before


@every_method
def test_pruner_errors__a_model_that_is_sparser_already_is_refused_and_untouched(method: str) -> None:
    model = uneven()
    prune(model, "magnitude", 0.6)
    before = state(model)
    with pytest.raises(InputError, match=r"sparsity = 0\.5: the model is sparser already \(0\.5999\)"):
        pruned(model, method, 0.5)
    assert state(model) == before


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("no space", "no space"),
        ("first\nsecond", "first"),
        ("", "OSError"),
        (
            "Traceback (most recent call last):\n  File x\nOSError: [Errno 28] full: /a\n",
            "OSError: [Errno 28] full: /a",
        ),
        ("\x1b[36mray::measure()\x1b[39m (pid=7)\n  File x\nValueError: bad\n", "ValueError: bad"),
    ],
)
def test_pruner_errors__an_error_in_one_line(message: str, line: str) -> None:
    assert first_line(OSError(message)) == line
