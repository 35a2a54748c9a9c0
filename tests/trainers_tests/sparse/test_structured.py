"""Models cut in width, then sparse, on the sparse engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from image_tables import SWIN, VIT, images, tiny
from torch import nn

from trainers.config.structured import StructuredSettings
from trainers.sparse.packing import packed
from trainers.sparse.runtime import SparseModel
from trainers.structured.cut import cut_model, plan_cut


@pytest.mark.parametrize(
    ("architecture", "widths"),
    [
        (VIT, {"embed": 6, "heads": 2, "mlp": 0.3}),
        (SWIN, {"embed": 0.5, "heads": 0.5, "head_dim": 3, "mlp": 0.6}),
        (SWIN, {"head_dim": [3, 7], "mlp": [0.5, 1.0]}),
    ],
    ids=str,
)
def test_structured__a_model_that_was_cut_is_torchs(architecture: str, widths: dict[str, Any]) -> None:
    model, arguments = tiny(architecture)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=random))
    settings = StructuredSettings.model_validate({**widths, "importance": "magnitude"})
    made = cut_model(model, plan_cut(model, arguments, settings), settings, []).eval()
    with torch.no_grad():
        for name, module in made.named_modules():
            if isinstance(module, nn.Linear) and "head" not in name:
                module.weight.mul_(torch.rand(module.weight.shape, generator=random) < 0.2)
        expected = made(images(3)).numpy()
    result = SparseModel(*packed(made))(images(3).numpy())
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
