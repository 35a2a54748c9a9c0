"""Which registered version is the dense model of a sweep."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestration.sweep import dense as dense_phase
from orchestration.tracking import registry


def test_an_alias_that_moves_on_changes_later_sweeps_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = {"models:/m@champion": "models:/m/1"}
    monkeypatch.setattr(registry, "version_of", lambda reference, uri: named[reference])

    def version(sweep: str, given: str | None = "models:/m@champion") -> str | None:
        one: Any = SimpleNamespace(root=f"{tmp_path}/{sweep}", tracker=SimpleNamespace(uri=""))
        return dense_phase._version(one, given)

    assert version("first") == "models:/m/1"
    named["models:/m@champion"] = "models:/m/2"
    assert version("first") == "models:/m/1"
    assert version("second") == "models:/m/2"


def test_other_models_are_no_versions() -> None:
    sweep: Any = SimpleNamespace(root="/none")
    assert dense_phase._version(sweep, None) is None
    assert dense_phase._version(sweep, "hf-hub:timm/vit") is None
