"""``espalier plan``: every recipe that comes with espalier, without data or weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from orchestration.preflight.checks import prepare
from orchestration.preflight.plan import _lines, _needs, curves, terminal
from orchestration.recipe.loading import load_recipe, shipped
from trainers.loop.schedules import pruning_plan

# each is built from the real timm architecture, on no device
DENSE_MILLIONS = {
    "swin_t": 28.3,
    "swin_s": 49.6,
    "swin_b": 87.8,
    "vit_t": 5.7,
    "vit_s": 22.05,
    "vit_b": 86.57,
    "deit_t": 5.7,
    "deit_s": 22.05,
    "deit_b": 86.57,
    "xcit_s": 26.25,
    "efficientformer_l1": 12.29,
    "convnext_s": 50.22,
    "resnet50d": 25.58,
    "efficientnet_v2_t": 13.65,
    "cifar10_vit": 2.69,
    "deploy_vit_sparse": 2.69,
    "deploy_vit": 1.8065,  # cut in width
    "deploy_swin": 0.9594,
}


@pytest.mark.parametrize("name", shipped())
def test_plan__every_recipe_is_planned(name: str) -> None:
    recipe = load_recipe(name)
    prepared = prepare(recipe, dry_run=True)
    lines = dict(_lines(prepared)) | dict(_needs(prepared))
    assert prepared.costs is not None
    total = sum(layer.numel for layer in prepared.layers)
    assert abs(prepared.pruned - recipe.pruning.sparsity * total) <= 4
    if name != "demo":
        family = next(key for key in DENSE_MILLIONS if recipe.name.startswith(key))
        assert prepared.costs.parameters / 1e6 == pytest.approx(DENSE_MILLIONS[family], rel=5e-3)
        folder = name.split("/", maxsplit=1)[0]
        assert folder in {"cifar10", "deploy"} or recipe.pruning.methods == (folder,)
    if "dimap" in name:
        assert "Fisher" not in lines
    else:
        assert " GB on each worker" in lines["Fisher"]
    epochs, sparsities, rates = curves(recipe)
    assert len(epochs) == len(sparsities) == len(rates)
    assert sparsities == sorted(sparsities)
    assert sparsities[-1] == recipe.pruning.sparsity
    peaks = (recipe.recovery.lr.peak, *recipe.recovery.lr.cycle_peaks)
    assert max(rates) <= max(peaks)
    assert "sparsity (%)" in terminal(recipe, 80)


def test_plan__a_structured_step_is_planned_from_shapes() -> None:
    """Its widths and counts; the layers, budget and costs after it are those of the smaller model."""
    cut = "structured={mlp: 0.75, heads: 0.5, recovery: {epochs: 7}}"
    whole, prepared = (prepare(load_recipe("demo", overrides), dry_run=True) for overrides in ([], [cut]))
    assert whole.costs is not None
    assert prepared.costs is not None
    lines = dict(_lines(prepared))
    assert "structured" not in dict(_lines(whole))
    words = "heads 2/4/8 → 1/2/4, mlp 192/384/768 → 144/288/576"
    counts = f"{whole.costs.parameters:,} → {prepared.costs.parameters:,} parameters"
    assert lines["structured"].startswith(f"{words}; {counts}")
    assert lines["structured"].endswith("by taylor, 7 epochs")
    assert prepared.pruned == pytest.approx(0.75 * sum(layer.numel for layer in prepared.layers), abs=4)
    shapes = {layer.name: layer.shape for layer in prepared.layers}
    assert shapes["layers.0.blocks.0.mlp.fc1.weight"] == (144, 48)
    assert shapes["layers.0.blocks.0.attn.qkv.weight"] == (72, 48)


def planned(*overrides: str) -> tuple[int, str]:
    """Prunable weights of a recipe, and what its plan says of the rest."""
    prepared = prepare(load_recipe("demo", list(overrides)), dry_run=True)
    return sum(layer.numel for layer in prepared.layers), dict(_lines(prepared))["left dense"]


def test_plan__what_stays_dense_is_said_by_patterns_that_the_recipe_takes() -> None:
    """Of a family outside the known ones: the share, the largest kinds, and what naming them changes."""
    architecture = "model.architecture=maxvit_rmlp_pico_rw_256", "model.args={}"
    weights, summary = planned(*architecture)
    kind = r"stages\.\d+\.blocks\.\d+\.conv\.conv\d+_\d+x\d+"
    assert summary.startswith(rf"26.2 % of the parameters: {kind} (22 layers, 1,355,776 weights), ")
    assert summary.endswith("more kinds (pruning.layers takes others)")
    usual = r"'attn_(block|grid)\.attn\.(qkv|proj)', 'attn_(block|grid)\.mlp\.fc\d'"
    more, rest = planned(*architecture, f"pruning.layers={{ALL: ['{kind}', {usual}]}}")
    assert more == weights + 1_355_776
    assert kind not in rest


def test_plan__the_paper_s_removed_parameters() -> None:
    """DIMAP's column for Swin-T, S, B at DIMAP1, 2, 3."""
    column = {"t": (13.7, 32.0, 50.3), "s": (14.2, 33.2, 52.2), "b": (14.3, 33.4, 52.5)}
    for size, expected in column.items():
        for level, share in enumerate(expected, 1):
            costs = prepare(load_recipe(f"dimap/swin_{size}_dimap{level}"), dry_run=True).costs
            assert costs is not None
            removed = 100 * (1 - costs.parameters_sparse / costs.parameters)
            assert removed == pytest.approx(share, abs=0.3)


def test_plan__the_papers_epochs() -> None:
    """oViT: steps every 20 epochs to 90 % at 280 of 300; every 30 in the run of 120."""
    for name, epochs, steps, last in (
        ("ovit/deit_s_90", 300, 15, 280),
        ("ovit/vit_b_75", 300, 6, 100),
        ("ovit/deit_t_75_120", 120, 4, 90),
        ("ovit/deit_b_75_one_shot", 20, 1, 0),
        ("ovit/vit_s_2of4", 50, 1, 0),
        ("dimap/swin_b_dimap3", 30, 1, 0),
    ):
        recipe = load_recipe(name)
        plan = pruning_plan(recipe.pruning.schedule, recipe.pruning.sparsity, recipe.recovery.epochs)
        assert (recipe.recovery.epochs, len(plan), max(plan)) == (epochs, steps, last), name


def test_plan__the_command_and_its_picture(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "orchestration.cli", "plan", "ovit/deit_s_75"]
    done = subprocess.run(
        [*command, "--png", "plan.png"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    for text in ("learning rate over 300 epochs", "Fisher:", "checkpoints:", "75 % at epoch 100"):
        assert text in done.stdout
    assert "\x1b" not in done.stdout
    with Image.open(tmp_path / "plan.png") as image:
        assert image.width > 300
    assert [path.name for path in tmp_path.iterdir()] == ["plan.png"]
    wrong = subprocess.run(
        [*command, "--png", "nowhere/plan.png"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert wrong.returncode == 2
    assert "--png" in wrong.stderr
