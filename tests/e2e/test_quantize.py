"""INT8 from a recipe: trained on the cluster, killed and resumed, registered beside its float parent."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import pytest
from commands import SMALL, Command, espalier, run
from driven import Run, driver, ended, same
from image_tables import VIT
from quantized import pruned
from training_runs import make_files, make_job

from pruners.model.masks import MaskSet
from trainers.checkpoint.folder import save_checkpoint
from trainers.export.onnx import ONNX_FILE
from trainers.quantization.int8_folder import read_record
from trainers.quantization.int8_onnx import check_zeros, read_weights

pytestmark = [pytest.mark.long, pytest.mark.cluster, pytest.mark.timeout(1200)]

SWEEP = (
    "sweep",
    str(SMALL),
    "name=int8",
    "pruning.methods=[lamp]",
    "allocation.trials=0",
    "schedule={trials: 1}",
    "resources.workers=2",
    "recovery.epochs=2",
)
AWARE = "quantize={mode: qat, images: 64, recovery: {epochs: 2, distill: {}, lr: {peak: 1e-4}}}"


class AwareRun(Run):
    """One without a sparsity to reach: its best model is kept at none."""

    def files(self) -> dict[str, bytes]:
        folders = {"last": self.checkpoints[-1], "kept": self.storage / "run" / "kept" / "0"}
        return {
            f"{name}/{path.name}": path.read_bytes()
            for name, folder in folders.items()
            for path in sorted(folder.iterdir())
            if not path.name.startswith(".")
        }


def test_quantize__a_worker_killed_in_training_for_int8(tmp_path: Path) -> None:
    """One of two workers dies in the middle of an epoch; the end is the undisturbed one, bit for bit."""
    files = make_files(tmp_path / "files")
    model, arguments, masks = pruned(VIT)
    start = tmp_path / "start"
    save_checkpoint(start, model, model_args=arguments, masks=masks, record={"method": "lamp"})
    training = {"epochs": 3, "checkpoint_steps": 3, "checkpoint_every": 1}
    content = make_job(
        files,
        training,
        model={"checkpoint": str(start), "classes": 3},
        method="lamp",
        quantize={"images": 20},
    )
    job = tmp_path / "job.json"
    job.write_text(content.model_dump_json())
    runs = []
    for name, fault in (("undisturbed", ""), ("killed", "mid-epoch")):
        with driver(tmp_path / name, job, fault=fault, rank=1) as process:
            ended(process)
        runs.append(AwareRun(tmp_path / name))
    assert (tmp_path / "killed" / "struck").is_dir(), "the fault did not happen"
    same(*runs)
    assert "last/ranges.safetensors" in runs[0].files()


def int8_folders(folder: Path) -> list[Path]:
    return sorted((folder / "runs" / "sweeps" / "int8").glob("quantize-lamp-*/int8"))


def known(command: Command) -> int:
    """Phases that had nothing to do."""
    return command.err.count("known, ") + command.err.count("      reused, ")


def test_quantize__from_recipe_to_registry(tmp_path: Path) -> None:
    with espalier(*SWEEP, AWARE, "--from", "quantize", cwd=tmp_path) as command:
        assert command.wait() == 2, command.err
        assert "run that first, by --until dense" in command.err

    first = run(*SWEEP, AWARE, cwd=tmp_path)
    assert "lamp: INT8, qat" in first.err
    (folder,) = int8_folders(tmp_path)
    record = read_record(folder, str(folder), key="model")
    masks = MaskSet.load(folder / "masks.safetensors")
    assert check_zeros(folder / ONNX_FILE, masks) == sum(masks.pruned().values()) == record["zeros"] > 0
    assert set(masks) <= set(read_weights(folder / ONNX_FILE))
    assert abs(record["sparsity"] - 0.75) < 1e-3

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow/mlflow.db")
    versions = {str(one.version): one for one in client.search_model_versions("name='espalier-int8'")}
    assert len(versions) == 2
    plain, int8 = (versions[number] for number in sorted(versions))
    assert "espalier.precision" not in plain.tags
    assert int8.tags["espalier.precision"] == "int8"
    assert int8.tags["espalier.quantize"] == "qat"
    assert int8.tags["espalier.engine"].startswith("onnxruntime ")
    assert int8.tags["parent"] == f"models:/espalier-int8/{plain.version}"
    assert int8.tags["sparsity"] == plain.tags["sparsity"]
    assert int8.tags["validation_top1"] == f"{record['figures']['val_top1']:.6f}"
    made = client.get_run(str(int8.run_id))
    assert made.data.metrics["int8.val_top1"] == pytest.approx(record["figures"]["val_top1"])
    logged = (tmp_path / "runs" / "mlflow" / "artifacts").glob(f"*/{int8.run_id}/artifacts/int8/*")
    names = {f"int8/{one.name}" for one in logged}
    served = {"MLmodel", "served_model.py", "requirements.txt"}
    assert names >= {f"int8/{name}" for name in served | {path.name for path in folder.iterdir()}}
    children = client.search_runs([made.info.experiment_id], f"tags.`mlflow.parentRunId` = '{int8.run_id}'")
    assert [child.data.tags["espalier.state"] for child in children] == ["finished"]
    aliases = dict(client.get_registered_model("espalier-int8").aliases)
    assert set(map(str, aliases.values())) == {str(plain.version)}

    (row,) = json.loads((tmp_path / "runs/sweeps/int8/results.json").read_text())
    assert row["int8_version"] == str(int8.version)
    assert row["int8_bytes"] == (folder / ONNX_FILE).stat().st_size
    assert f"{plain.version}, {int8.version}" in first.out
    evaluation = run(
        "evaluate", f"models:/espalier-int8/{int8.version}", "--data", _test_images(tmp_path), cwd=tmp_path
    )
    assert f"top-1     {100 * row['int8']:.2f} %, INT8 by onnxruntime" in evaluation.out
    lineage = run("lineage", f"models:/espalier-int8/{int8.version}", cwd=tmp_path)
    assert "precision   int8, qat" in lineage.out
    assert f"models:/espalier-int8/{plain.version}" in lineage.out

    again = run(*SWEEP, AWARE, cwd=tmp_path)
    assert known(again) == 3
    assert len(client.search_model_versions("name='espalier-int8'")) == 2

    # another way to quantise leaves all that comes before as it is
    other = run(*SWEEP, "quantize={mode: static, images: 64}", cwd=tmp_path)
    assert known(other) == 2
    assert len(int8_folders(tmp_path)) == 2
    assert len(client.search_model_versions("name='espalier-int8'")) == 3


def _test_images(folder: Path) -> str:
    return str(next((folder / "runs").rglob("test.parquet")))
