"""A sweep that cuts a model in width before it prunes weights: broken off, resumed, and looked at."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import mlflow
import pytest
import timm
from commands import SMALL, espalier, run

from orchestration.state.trial_log import TrialLog

pytestmark = [pytest.mark.long, pytest.mark.cluster, pytest.mark.timeout(1800)]

SWEEP = (
    "sweep",
    str(SMALL),
    "name=narrow",
    "dense.epochs=1",
    "structured={mlp: 0.75, heads: [1, 1, 2], images: 32, recovery: {epochs: 3, batch_size: 16, "
    "checkpoint_every: 1, distill: {teacher: dense}}}",
    "pruning.methods=[magnitude]",
    "allocation.trials=2",
    "recovery.epochs=2",
    "schedule.trials=1",
    "resources.workers=1",
)


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def test_structured__structured_then_unstructured(tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    with espalier(*SWEEP, cwd=tmp_path) as command:
        saved = "structured/*/train/*/checkpoint_*/trainer.json"
        command.until(lambda: any(storage.glob(saved)), 900, "a checkpoint of the recovery")
        status, _ = command.interrupt(signal.SIGINT)
        assert status == 130, command.err
    (cut,) = storage.glob("structured/*/cut")
    chosen = (cut / "model.safetensors").stat().st_mtime_ns
    (checkpoint,) = list(storage.glob(saved))[:1]
    assert read(checkpoint)["state"]["step"] > 0

    whole = run(*SWEEP, cwd=tmp_path, seconds=1200)
    assert (cut / "model.safetensors").stat().st_mtime_ns == chosen
    (trial,) = TrialLog(str(cut.parent / "trials.json")).trials
    assert (trial.state, trial.metrics["epoch"]) == ("finished", 3)
    header = next(line for line in whole.out.splitlines() if "method" in line)
    assert "structured" in header

    # both steps, in the files
    dense, small = (
        read(next(storage.glob("dense/*/model/pruning.json"))),
        read(cut.parent / "model/pruning.json"),
    )
    (recovered,) = storage.glob("sweeps/narrow/schedule-magnitude-*/recovered")
    pruned = read(recovered / "pruning.json")
    step = pruned["structured"]
    assert step["cut"] == {"heads": [[1, 2, 4], [1, 1, 2]], "mlp": [[64, 128, 256], [48, 96, 192]]}
    assert step == small["structured"]
    assert step["dense_parameters"] == dense["costs"]["parameters"]
    assert dense["costs"]["parameters"] > small["costs"]["parameters"] == pruned["costs"]["parameters"]
    assert pruned["sparsity"] == pytest.approx(0.75, abs=0.005)
    (row,) = json.loads((storage / "sweeps/narrow/results.json").read_text())
    assert row["parameters"] == step["dense_parameters"]
    assert row["parameters_sparse"] == pruned["costs"]["parameters_sparse"]
    assert row["structured_macs"] == small["costs"]["macs"]
    model = timm.create_model(f"local-dir:{recovered}", pretrained=True)
    assert [stage.blocks[0].mlp.fc1.out_features for stage in model.layers] == [48, 96, 192]

    # and in the registry: the version that was pruned descends from the one that was cut
    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow/mlflow.db")
    versions = {str(one.version): one for one in client.search_model_versions("name='espalier-narrow'")}
    versions = {number: dict(one.tags) for number, one in versions.items()}
    assert {number: tags["method"] for number, tags in versions.items()} == {
        "1": "structured",
        "2": "magnitude",
    }
    assert versions["2"]["parent"] == "models:/espalier-narrow/1"
    words = "heads 1/2/4 → 1/1/2, mlp 64/128/256 → 48/96/192"
    assert versions["1"]["structured"] == versions["2"]["structured"] == words
    assert str(client.get_model_version_by_alias("espalier-narrow", "champion").version) == "2"
    chain = run("lineage", "models:/espalier-narrow@champion", cwd=tmp_path).out
    assert chain.index("models:/espalier-narrow/2") < chain.index("models:/espalier-narrow/1\n")
    assert chain.count(words) == 2
    phases = client.search_runs(["1"], "tags.`espalier.phase` = 'structured'")
    assert {one.data.tags["espalier.level"] for one in phases} == {"phase", "trial"}

    again = run(*SWEEP, "--from", "allocation", cwd=tmp_path)
    assert again.err.count("known, ") == 3  # the cut, its pruning's search, and gradual pruning
    inspected = run("inspect", str(recovered), cwd=tmp_path).out
    assert words in inspected
