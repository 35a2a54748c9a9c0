"""Folders that an earlier version wrote are read, found again by the same names, and gone on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import CPU, Log

from orchestration.recipe.loading import load_recipe
from orchestration.state.order_store import StoredOrder
from orchestration.state.trial_log import TrialLog
from trainers.checkpoint.folder import load_checkpoint, verify
from trainers.checkpoint.trainer_state import damage
from trainers.config.jobs import TrainJob
from trainers.config.pruning import PruningSettings
from trainers.loop.gradual import run

STORED = Path(__file__).parents[1] / "stored"


@pytest.fixture(params=["before_packages"])
def stored(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, in which the test works: paths in the files are relative."""
    folder = tmp_path / "stored"
    shutil.copytree(STORED / request.param, folder)
    monkeypatch.chdir(folder)
    return folder


def test_checkpoint__of_an_earlier_version_is_read(stored: Path) -> None:
    for name in ("dense", "checkpoint", "last"):
        verify(stored / name, name)
    last = load_checkpoint("last")
    assert last.masks is not None
    allocation = json.loads(Path("last/pruning.json").read_text())["allocation"]
    assert last.masks.pruned() == allocation
    for name, mask in last.masks.items():
        assert torch.count_nonzero(last.model.get_parameter(name)[~mask]) == 0


def test_gradual__goes_on_from_a_checkpoint_of_an_earlier_version(stored: Path, tmp_path: Path) -> None:
    job = TrainJob.model_validate_json(Path("job.json").read_text())
    assert damage(stored / "checkpoint") is None
    log = Log(tmp_path / "log")
    log.folder.mkdir()
    run(job, log, CPU, resume=stored / "checkpoint")
    assert [metrics["epoch"] for metrics in log.metrics] == [2, 3, 4]
    allocations = [
        json.loads((folder / "pruning.json").read_text())["allocation"] for folder in (log.last, Path("last"))
    ]
    assert allocations[0] == allocations[1]
    # another processor rounds otherwise, and no more than that
    model, before = load_file(log.last / "model.safetensors"), load_file("last/model.safetensors")
    assert all(torch.allclose(model[name], before[name], atol=1e-3) for name in before)


def test_order__of_an_earlier_version_is_found_by_its_fingerprint(stored: Path) -> None:
    pruning = PruningSettings.model_validate_json(Path("pruning.json").read_text())
    order = StoredOrder.of(str(stored), "ovit", pruning, weights="w", data="d", seed=0)
    assert order.known
    model = load_checkpoint("dense").model
    dense = {name: model.get_parameter(name).detach() for name in order.open()}
    assert set(dense) == {"blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight"}
    half = {name: weight.numel() // 2 for name, weight in dense.items()}
    weights, masks = order.open().weights_at(dense, half)
    assert masks.pruned() == half
    for name, weight in weights.items():
        assert torch.count_nonzero(weight[~masks[name]]) == 0
        assert not torch.equal(weight[masks[name]], dense[name][masks[name]])  # updated, as oViT does


def test_trial_log__of_an_earlier_version_is_read(stored: Path) -> None:
    training = TrialLog("trials-training.json")
    assert [record.state for record in training.ended] == ["finished", "stopped"]
    best = training.best()
    assert best.checkpoint is not None
    assert best.checkpoint.startswith("/storage/sweeps/small/schedule-dimap-")
    one_shot = TrialLog("trials-one-shot.json")
    assert len(one_shot.ended) == 4
    assert one_shot.ordered


def test_recipe__that_an_earlier_version_stored_is_read(stored: Path) -> None:
    recipe = load_recipe("recipe.json")
    assert recipe.name == "small"
    assert recipe.pruning.methods == ("dimap", "ovit")
