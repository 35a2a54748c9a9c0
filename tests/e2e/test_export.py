"""Files for engines from a recipe: written at the end of a sweep, measured by their engines, known again."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from commands import run
from image_tables import VIT

from trainers.deploy.checked import read_record
from trainers.sparse import load
from trainers.storage import read_json

pytestmark = [pytest.mark.long, pytest.mark.cluster, pytest.mark.timeout(1200)]

RECIPE = {
    "name": "files",
    "model": {
        "architecture": VIT,
        "args": {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3},
        "classes": 10,
    },
    "data": {"source": "digits"},
    "dense": {"epochs": 2, "batch_size": 128, "lr": {"peak": 1e-3}},
    "pruning": {"methods": ["magnitude"], "sparsity": 0.9, "schedule": {"kind": "one_shot"}},
    "recovery": {"epochs": 1, "batch_size": 128, "lr": {"kind": "linear", "peak": 1e-4, "floor": 1e-6}},
    "allocation": {"trials": 0},
    "schedule": {"trials": 1},
    "export": ["sparse"],
    "resources": {"workers": 1},
}


def test_export__a_sweep_ends_with_files_for_engines(tmp_path: Path) -> None:
    (tmp_path / "files.yaml").write_text(yaml.safe_dump(RECIPE))
    storage = tmp_path / "storage"
    done = run("sweep", "files.yaml", f"storage={storage}", cwd=tmp_path)
    (row,) = read_json(f"{storage}/sweeps/files/results.json")
    exported = row["exported"]["sparse"]
    assert exported["top1"] == row["recovered"]
    folder = storage / exported["folder"]
    assert f"sparse: {folder}" in done.out
    record = read_record(folder, str(folder))
    assert record["source"]["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert set(load(folder).kinds.values()) == {"sparse", "dense"}
    # asked for one more format, it knows the first
    again = run("sweep", "files.yaml", f"storage={storage}", "export=[sparse, onnx]", cwd=tmp_path)
    (row,) = read_json(f"{storage}/sweeps/files/results.json")
    assert set(row["exported"]) == {"sparse", "onnx"}
    assert row["exported"]["sparse"] == exported
    assert row["exported"]["onnx"]["top1"] == row["recovered"]
    assert "trained in" not in again.err
