"""Which registered version is the dense model of a sweep."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestration.sweep import dense as dense_phase
from orchestration.tracking import registry


def test_dense__an_alias_that_moves_on_changes_later_sweeps_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = {"models:/m@champion": "models:/m/1"}
    monkeypatch.setattr(registry, "version_of", lambda reference, uri: named[reference])

    def version(sweep: str, given: str | None = "models:/m@champion") -> str | None:
        context: Any = SimpleNamespace(root=f"{tmp_path}/{sweep}", tracker=SimpleNamespace(uri=""))
        return dense_phase._version(context, given)

    assert version("first") == "models:/m/1"
    named["models:/m@champion"] = "models:/m/2"
    assert version("first") == "models:/m/1"
    assert version("second") == "models:/m/2"


def test_dense__other_models_are_no_versions() -> None:
    sweep: Any = SimpleNamespace(root="/none")
    assert dense_phase._version(sweep, None) is None
    assert dense_phase._version(sweep, "hf-hub:timm/vit") is None


def test_dense__mlflow_has_all_before_the_model_says_that_the_phase_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in between, a sweep ends the phase's run when it is resumed; else nobody would."""
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / "pruning.json").write_text("{}")
    existed: list[bool] = []
    runs = SimpleNamespace(close=lambda best: existed.append((tmp_path / "dense" / "model").exists()))
    sweep: Any = SimpleNamespace(
        recipe=None, data=None, lineage={}, begin=lambda *_: None, runs=lambda *_: runs
    )
    job = SimpleNamespace(model_dump=lambda mode, include: {key: {} for key in include})
    monkeypatch.setattr(dense_phase, "dense_job", lambda *_: job)
    best = SimpleNamespace(seconds=1.0)
    monkeypatch.setattr(dense_phase, "run_training", lambda *_, **__: (best, str(trained)))
    dense_phase._train(sweep, "key", f"{tmp_path}/dense")
    assert existed == [False]
    assert (tmp_path / "dense" / "model" / "pruning.json").is_file()
