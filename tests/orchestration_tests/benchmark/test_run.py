"""``espalier benchmark`` as a command, on tiny models."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import matplotlib.image
import onnx
import pytest
from commands import Run, good
from image_tables import VIT, dense_folder, edit_json, table, tiny, write
from onnx import numpy_helper

from pruners import prune
from trainers.checkpoint.folder import save_checkpoint
from trainers.engines.registry import ENGINES


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    dense_folder(folder / "dense")
    dense_folder(folder / "ten", classes=10)
    model, arguments = tiny(VIT)
    report = prune(model, "magnitude", 0.9)
    record = {"method": "magnitude", "sparsity": report.sparsity, "allocation": report.allocation}
    save_checkpoint(folder / "pruned", model, model_args=arguments, masks=report.masks, record=record)
    write(folder / "test.parquet", table([0, 1, 2] * 30))
    return folder


def tamper(folder: Path) -> None:
    """One weight of an exported model is another, and its checksum is the new file's."""
    path = folder / "model.onnx"
    model = onnx.load(path)
    weight = next(
        tensor for tensor in model.graph.initializer if "head" in tensor.name and len(tensor.dims) == 2
    )
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.5, weight.name))
    onnx.save(model, path)
    edit_json(folder / "export.json", files={"model.onnx": hashlib.sha256(path.read_bytes()).hexdigest()})


def test_run__models_on_engines(run: Run, files: Path) -> None:
    good(run, "export @/dense exported --format onnx")
    good(run, "export @/dense changed --format onnx")
    tamper(Path("changed"))
    status, out, error = run(
        "benchmark @/dense @/pruned exported changed --engines torch,csr,onnxruntime --batch 1,3 --threads 1 "
        "--repetitions 3 --data @/test.parquet --json found.json --plot found.png"
    )
    assert status == 1, error  # of the one that was changed
    assert "changed on onnxruntime:float32: wrong answers" in out
    assert "dense on csr:float32: no linear layer has 50 % zeros" in out
    assert "batch 1: " in out
    assert "1 thread on 1 processor" in out
    content = json.loads(Path("found.json").read_text())
    assert str(files) not in Path("found.json").read_text()
    rows = {(entry["model"], entry["engine"], entry["batch"]): entry for entry in content["rows"]}
    timed = {key for key, entry in rows.items() if entry["seconds"] is not None}
    engines = {"dense": ("torch", "onnxruntime"), "pruned": ("torch", "csr", "onnxruntime")}
    assert timed == {
        (model, engine, batch)
        for model, names in {**engines, "exported": ("onnxruntime",)}.items()
        for engine in names
        for batch in (1, 3)
    }
    for key in timed:
        entry = rows[key]
        assert len(entry["rounds"]) == 3
        assert entry["difference"]["relative"] < 1e-3
        assert entry["memory"] > 2e7
        assert entry["images_per_second"] == pytest.approx(key[2] / entry["seconds"])
        # what an engine computes alike, it gets right alike
        assert entry["top1"] == rows[key[0], "onnxruntime", 1]["top1"]
    assert rows["dense", "onnxruntime", 1]["memory"] < 0.5 * rows["dense", "torch", 1]["memory"]
    assert rows["exported", "onnxruntime", 1]["disk"] == Path("exported/model.onnx").stat().st_size
    assert content["recommended"]["1"]["model"] in ("dense", "exported", "pruned")
    assert content["threads"] == 1
    assert matplotlib.image.imread("found.png").shape[1] > 1000  # two panels
    assert {path.name for path in Path().iterdir()} == {"exported", "changed", "found.json", "found.png"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("benchmark @/dense @/ten", ("model", "/ten", "10 classes", "3 classes", "like with like")),
        ("benchmark @/none", ("model", "/none", "no such folder")),
        ("benchmark @/dense --data @/none.parquet", ("--data", "no such file")),
        ("benchmark @/dense --engines onyx", ("--engines", "must be one of torch, compile, csr")),
        ("benchmark @/dense --batch 0", ("--batch", "from 1 on")),
        ("benchmark @/dense --json @/test.parquet", ("--json", "is there already")),
        ("benchmark @/dense @/dense", ("model", "same model twice")),
        ("benchmark @/dense --mlflow --tracking-uri http://127.0.0.1:9", ("no MLflow server answers",)),
        ("benchmark", ("MODEL",)),
    ],
)  # fmt: skip
def test_run__bad_input_is_one_line(text: str, says: tuple[str, ...], run: Run, files: Path) -> None:
    status, out, error = run(text)
    assert (status, out, len(error.splitlines())) == (2, "", 1), error
    assert not [part for part in says if part not in error], error
    assert list(Path().iterdir()) == []


def test_run__an_export_for_another_engine(run: Run) -> None:
    good(run, "export @/dense out --format torch-export")
    status, _, error = run("benchmark out --engines onnxruntime")
    assert (status, len(error.splitlines())) == (2, 1)
    assert "none runs out, which is a file for torch:float32" in error


@pytest.mark.long
def test_run__torch_compile_and_openvino(run: Run) -> None:
    wanted = ["compile:float32", "openvino:float32", "openvino:int8", "onnxruntime:int8", "torch:bfloat16"]
    if ENGINES["openvino"].lacking("int8-bfloat16", "cpu") is None:
        wanted.append("openvino:int8-bfloat16")
    out = good(
        run,
        f"benchmark @/dense @/pruned --engines {','.join(wanted)} "
        "--batch 2 --threads 1 --repetitions 3 --calibration @/test.parquet --json found.json",
    )
    assert "wrong" not in out
    rows = json.loads(Path("found.json").read_text())["rows"]
    assert all(entry["seconds"] is not None for entry in rows)
    assert {entry["engine"] + ":" + entry["type"] for entry in rows} == set(wanted)


@pytest.mark.cluster
def test_run__a_benchmark_is_logged(run: Run) -> None:
    from mlflow import MlflowClient

    from orchestration.tracking.server import start_server

    good(
        run,
        "benchmark @/dense --engines onnxruntime --batch 1,2 --threads 1 --repetitions 3 "
        "--data @/test.parquet --mlflow --storage runs",
    )
    server = start_server(Path("runs/mlflow").absolute())
    try:
        server.wait_ready()
        client = MlflowClient(server.uri)
        experiment = client.get_experiment_by_name("espalier-benchmarks")
        assert experiment is not None
        (logged,) = client.search_runs([experiment.experiment_id])
        assert logged.info.status == "FINISHED"
        steps = client.get_metric_history(logged.info.run_id, "dense/onnxruntime-float32/milliseconds")
        assert [point.step for point in steps] == [1, 2]
        artifacts = {artifact.path for artifact in client.list_artifacts(logged.info.run_id)}
        assert artifacts == {"benchmark.json", "figures"}
    finally:
        server.stop()
