"""``prepared()`` of docs/guides/export.md: the very pixels of timm's evaluation transform."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform

GUIDE = Path(__file__).parents[2] / "docs/guides/export.md"


@pytest.fixture(scope="module")
def prepared() -> Any:
    block = next(
        code
        for code in re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
        if "def prepared(" in code
    )
    names: dict[str, Any] = {}
    exec(block, names)
    return names["prepared"]


@pytest.mark.parametrize("side", [(224, 224), (160, 96)], ids=["square", "oblong"])
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop", [0.875, 0.9, 0.95, 1.0])
def test_guide_pictures__a_picture_is_prepared_as_timm_prepares_it(
    crop: float, mode: str, side: tuple[int, int], prepared: Any, tmp_path: Path
) -> None:
    """Wide and high pictures, larger and smaller than the input, with odd numbers of pixels."""
    about = {
        "input_size": (3, *side),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "interpolation": "bicubic",
        "crop_pct": crop,
        "crop_mode": mode,
    }
    transform = create_transform(**about, is_training=False)
    random = np.random.default_rng(0)
    for width, height in ((437, 300), (211, 533), (301, 57), (640, 427)):
        pixels = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
        picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(tmp_path / "picture.png")
        expected = transform(picture)[None].numpy()
        assert np.allclose(prepared(tmp_path / "picture.png", about), expected, atol=1e-5), (width, height)
