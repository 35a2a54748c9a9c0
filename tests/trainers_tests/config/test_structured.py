"""What a recipe may say of structured pruning, and that shares and numbers stay what they are."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from trainers.config.structured import StructuredSettings, is_reduced


@pytest.mark.parametrize(
    ("content", "key", "value"),
    [
        ({"mlp": 0.75}, "mlp", 0.75),
        ({"mlp": 576}, "mlp", 576),
        ({"mlp": [0.5, 1, 96]}, "mlp", (0.5, 1.0, 96)),
        ({"heads": 1}, "heads", 1),
        ({"heads": [1, 2]}, "heads", (1, 2)),
        ({"embed": 96, "mlp": 1}, "mlp", 1.0),
    ],
)
def test_structured__shares_and_numbers(content: dict[str, Any], key: str, value: object) -> None:
    settings = StructuredSettings.model_validate(content)
    for version in (settings, StructuredSettings.model_validate(json.loads(settings.model_dump_json()))):
        value_read = getattr(version, key)
        assert value_read == value
        kinds = [type(part) for part in (value_read if isinstance(value_read, tuple) else [value_read])]
        assert kinds == [type(part) for part in (value if isinstance(value, tuple) else [value])]


def test_structured__one_head_is_less_than_all_of_them() -> None:
    assert is_reduced(1)
    assert not is_reduced(1.0)
    assert is_reduced((1.0, 0.5))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({}, "nothing would be cut"),
        ({"mlp": 1, "embed": 1.0}, "nothing would be cut"),
        ({"mlp": 1.5}, "a share that stays"),
        ({"mlp": 0}, "a share that stays"),
        ({"mlp": -0.5}, "a share that stays"),
        ({"mlp": True}, "a share that stays"),
        ({"mlp": []}, "must not be empty"),
        ({"mlp": {"blocks.0": 0.5}}, "a share that stays"),
        ({"embed": [0.5, 0.5]}, "must be one number"),
        ({"mlp": float("nan")}, "a share that stays"),
    ],
)
def test_structured__what_is_neither_is_refused(content: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        StructuredSettings.model_validate(content)
