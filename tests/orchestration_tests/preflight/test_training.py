"""What a machine does not do as one would expect is said before it is begun."""

from __future__ import annotations

import pytest

from orchestration.preflight import training
from orchestration.recipe.loading import load_recipe


@pytest.mark.parametrize("fast", [True, False])
def test_training__bfloat16_on_a_processor_without_it_is_remarked(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_fast_in_bfloat16", lambda: fast)
    recipe = load_recipe("demo", ["recovery.precision=bfloat16"])
    assert [line.split(":")[0] for line in training.remarks(recipe)] == (
        [] if fast else ["recovery.precision = bfloat16"]
    )
    gpus = load_recipe("demo", ["recovery.precision=bfloat16", "resources.gpus_per_worker=1"])
    assert training.remarks(gpus) == []
    assert training.remarks(load_recipe("demo", [])) == []
