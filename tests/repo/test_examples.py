"""The examples in docstrings do what they say: each is run, on a small model where it needs one."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
PACKAGES = ("pruners", "trainers", "orchestration")
MODULES = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


def given() -> dict[str, Any]:
    """What an example may take for granted: a small timm model, its layers, and images with labels."""
    import timm

    import pruners

    torch.manual_seed(0)
    arguments = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, **arguments)
    loader = [(torch.randn(8, 3, 16, 16), torch.randint(4, (8,))) for _ in range(64)]
    return {
        "arguments": arguments,
        "layers": pruners.find_layers(model),
        "loader": loader,
        "model": model,
        "pruners": pruners,
        "torch": torch,
    }


@pytest.mark.parametrize("name", MODULES)
def test_examples__of_a_module_do_what_they_say(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    output: list[str] = []
    tests = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    assert tests
    for test in tests:
        test.globs = {**given(), **test.globs}
        runner.run(test, out=output.append)
    assert runner.failures == 0, "".join(output)


def test_examples__the_functions_used_most_have_one() -> None:
    import pruners
    from trainers.checkpoint import folder
    from trainers.export import onnx

    for thing in (
        pruners.prune,
        pruners.find_layers,
        pruners.allocate,
        pruners.count_costs,
        pruners.create_pruner,
        pruners.MaskSet,
        pruners.EliminationOrder,
        pruners.Sharing,
        pruners.Pattern,
        folder.save_checkpoint,
        folder.load_checkpoint,
        onnx.export_onnx,
    ):
        assert ">>> " in (thing.__doc__ or ""), thing
