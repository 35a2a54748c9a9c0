"""The use from a notebook: five lines with a timm model, and no cluster in sight."""

from __future__ import annotations

import json
import subprocess
import sys

FIVE_LINES = """
import timm, pruners
model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=2)
report = pruners.prune(model, "dimap", sparsity=0.5)
zeros = sum(int((model.get_parameter(name) == 0).sum()) for name in report.masks)
numel = report.masks.numel
"""

WITH_GRADIENTS = """
import torch
small = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, embed_dim=48, num_heads=3)
batches = [(torch.randn(2, 3, 32, 32), torch.tensor([1, 2])) for _ in range(3)]
ovit = pruners.create_pruner("ovit", block_size=16, damp=1e-4)
assert pruners.prune(small, ovit, sparsity=0.5, batches=batches).sparsity == 0.5
"""

REPORT = """
import json, sys
sys.stdout.write(json.dumps([zeros, numel, sorted({name.split(".")[0] for name in sys.modules})]))
"""


def run(code: str) -> tuple[int, int, set[str]]:
    """In a process of its own: zeros, prunable weights, and the packages that were imported."""
    done = subprocess.run(
        [sys.executable, "-c", code + REPORT], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    zeros, numel, loaded = json.loads(done.stdout)
    return zeros, numel, set(loaded)


def test_python_api__five_lines_prune_a_timm_model_without_a_cluster() -> None:
    zeros, numel, loaded = run(FIVE_LINES + WITH_GRADIENTS)
    assert numel == 2 * 12 * 192**2
    assert zeros == numel // 2
    assert {"timm", "torch", "pruners"} <= loaded
    assert not loaded & {"ray", "mlflow", "optuna", "pydantic", "trainers", "orchestration"}


def test_python_api__an_input_error_does_not_wait_for_torch() -> None:
    _, _, loaded = run("from pruners import InputError; zeros, numel = 0, 0")
    assert "pruners" in loaded
    assert "torch" not in loaded


PUBLIC = """
import pruners
assert all(getattr(pruners, name) is not None for name in pruners.__all__)
assert set(pruners.__all__) == set(pruners._MODULE_OF)
assert not hasattr(pruners, "nope")
zeros, numel = 0, 0
"""


def test_python_api__every_public_name_is_there_and_no_other() -> None:
    _, _, loaded = run(PUBLIC)
    assert not loaded & {"ray", "mlflow", "optuna", "pydantic", "timm"}
