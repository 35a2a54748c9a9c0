"""``espalier quantize``: each way, what it prints, leaves and refuses; killed and started again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import Run, espalier, good
from image_tables import SWIN, VIT, table, tiny, write
from quantized import pruned

from orchestration.commands import quantize
from pruners.model.masks import MaskSet
from trainers.checkpoint.folder import save_checkpoint
from trainers.export.onnx import ONNX_FILE
from trainers.quantization import int8_folder
from trainers.quantization.int8_onnx import check_zeros


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pruned models, and images that have their three classes."""
    folder = tmp_path_factory.mktemp("quantize")
    for name, architecture in (("vit", VIT), ("swin", SWIN)):
        model, arguments, masks = pruned(architecture)
        record = {"method": "lamp", "sparsity": masks.sparsity}
        save_checkpoint(folder / name, model, model_args=arguments, masks=masks, record=record)
    model, arguments = tiny()
    record = {"method": "dense", "sparsity": 0.0, "allocation": {}}
    save_checkpoint(folder / "dense", model, model_args=arguments, masks=None, record=record)
    write(folder / "train.parquet", table([i % 3 for i in range(48)]))
    write(folder / "test.parquet", table([i % 3 for i in range(15)], first=100))
    return folder


def check(folder: Path, mode: str) -> None:
    record = int8_folder.read_record(folder, str(folder), key="model")
    assert record["mode"] == mode
    masks = MaskSet.load(folder / "masks.safetensors")
    assert check_zeros(folder / ONNX_FILE, masks) == record["zeros"] > 0


@pytest.mark.parametrize(("name", "mode"), [("vit", "dynamic"), ("swin", "static")])
def test_quantize__without_training(name: str, mode: str, run: Run, files: Path, tmp_path: Path) -> None:
    train = "--train @/train.parquet --images 20" if mode == "static" else ""
    out = good(run, f"quantize @/{name} --mode {mode} {train} --test @/test.parquet --out small")
    lines = dict(line.split(None, 1) for line in out.splitlines())
    check(tmp_path / "small", mode)
    record = json.loads((tmp_path / "small" / "quantization.json").read_text())
    assert record["options"] == {"mode": mode, "images": 20 if mode == "static" else 0, "seed": 0}
    assert record["source"] == name
    figures = record["figures"]
    line = f"{100 * figures['float_test_top1']:.2f} % → {100 * figures['test_top1']:.2f} %, by onnxruntime"
    assert line in out
    assert abs(figures["float_test_top1"] - figures["test_top1"]) <= 2 / 15
    assert lines["zeros"].startswith(f"{record['zeros']:,} pruned weights")
    output = good(run, "evaluate small --data @/test.parquet")
    assert f"top-1     {100 * figures['test_top1']:.2f} %, INT8 by onnxruntime" in output


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_quantize__of_a_dense_model_nothing_is_said_of_pruned_weights(
    mode: str, run: Run, files: Path, tmp_path: Path
) -> None:
    train = "--train @/train.parquet --images 20" if mode == "static" else ""
    out = good(run, f"quantize @/dense --mode {mode} {train} --out small")
    assert "zeros" not in out
    assert "pruned" not in out
    record = json.loads((tmp_path / "small" / "quantization.json").read_text())
    assert record["zeros"] == 0
    assert record["method"] == "dense"


def test_quantize__training_for_int8(run: Run, files: Path, tmp_path: Path) -> None:
    settings = "epochs=2 batch_size=8 distill={}"
    out = good(run, f"quantize @/vit --mode qat --train @/train.parquet --out small {settings}")
    check(tmp_path / "small", "qat")
    assert "trained with fake quantisation" in out
    assert [path.name for path in tmp_path.iterdir()] == ["small"], "nothing of the training is left"


def test_quantize__a_killed_training_goes_on(files: Path, tmp_path: Path) -> None:
    command = (
        "quantize",
        str(files / "vit"),
        "--mode",
        "qat",
        "--train",
        str(files / "train.parquet"),
        "epochs=6",
        "batch_size=8",
        "--out",
    )
    with espalier(*command, "broken", cwd=tmp_path) as broken:
        broken.until("epoch 2 of 6")
        broken.process.kill()
        broken.process.wait(10)
    assert not (tmp_path / "broken").exists()
    for out in ("broken", "whole"):
        with espalier(*command, out, cwd=tmp_path) as again:
            assert again.wait() == 0, again.err
            assert ("going on where it was interrupted" in again.err) is (out == "broken")
    first, second = ((tmp_path / out / ONNX_FILE).read_bytes() for out in ("broken", "whole"))
    assert first == second


def test_quantize__what_a_killed_training_left_goes_with_another_way_s_success(
    files: Path, tmp_path: Path
) -> None:
    """Who trains no more, and calibrates instead, is left no folder of the training."""
    images = ("--train", str(files / "train.parquet"), "--out", "small")
    typed = ("quantize", str(files / "vit"), "--mode")
    with espalier(*typed, "qat", *images, "epochs=50", "batch_size=8", cwd=tmp_path) as broken:
        broken.until("epoch 2 of 50")
        broken.process.kill()
        broken.process.wait(10)
    assert any("small" in path.name for path in tmp_path.iterdir())
    with espalier(*typed, "static", *images, "--images", "20", cwd=tmp_path) as again:
        assert again.wait() == 0, again.err
    check(tmp_path / "small", "static")
    assert [path.name for path in tmp_path.iterdir() if path.suffix not in {".out", ".err"}] == ["small"]


def test_quantize__a_trained_model_of_another_command_is_not_taken(
    run: Run, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill left between training and writing is used by the same command, and by no other one."""

    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("stopped")

    typed = "quantize @/vit --mode qat --train @/train.parquet --out small batch_size=8"
    with monkeypatch.context() as patched:
        patched.setattr(int8_folder, "quantize_folder", broken)
        assert run(f"{typed} epochs=1")[0] == 1
    trained = tmp_path / ".small.float"
    before = (trained / "model.safetensors").read_bytes()
    for other, says in (
        (f"{typed} epochs=2", "training.epochs 1 there and 2 here"),
        (f"{typed} epochs=1 --seed 1", "seed 0 there and 1 here"),
        (f"{typed} epochs=1 --images 20", "quantize.images None there and 20 here"),
        (f"{typed} epochs=1".replace("@/vit", "@/swin"), "its checkpoint or its images differ"),
        (f"{typed} epochs=1".replace("@/train", "@/test"), "its checkpoint or its images differ"),
    ):
        status, _, error = run(other)
        assert (status, len(error.splitlines())) == (2, 1), error
        assert "--out" in error
        assert says in error
        assert (trained / "model.safetensors").read_bytes() == before
        assert not (tmp_path / "small").exists()
    monkeypatch.setattr(quantize.Training, "run", broken)  # it is not trained again
    good(run, f"{typed} epochs=1")
    check(tmp_path / "small", "qat")
    assert not trained.exists()


def test_quantize__a_weight_that_is_not_zero_leaves_nothing(
    run: Run, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> int:
        raise RuntimeError("blocks.0.mlp.fc1.weight has pruned weights that are not 0 in model.onnx")

    monkeypatch.setattr(int8_folder, "check_zeros", refuse)
    status, _, error = run("quantize @/vit --mode dynamic --out small")
    assert status == 1
    assert len(error.splitlines()) == 1
    assert "blocks.0.mlp.fc1.weight has pruned weights" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (
            "@/vit --mode static --train @/train.parquet --images 49",
            ["--images", "49", "there are 48 images"],
        ),
        ("@/vit --mode static --train @/none.parquet", ["--train", "none.parquet", "no such file"]),
        ("@/none --mode dynamic", ["model", "/none", "no such folder"]),
        ("@/vit --mode dynamic --out @/vit", ["--out", "not empty"]),
        ("@/small --mode dynamic", ["model", "/small", "is quantised already"]),
    ],
)
def test_quantize__what_cannot_be(typed: str, says: list[str], run: Run, files: Path, tmp_path: Path) -> None:
    small = files / "small"
    shutil.rmtree(small, ignore_errors=True)
    shutil.copytree(files / "vit", small)
    (small / "quantization.json").write_text("{}")
    out = "" if "--out" in typed else " --out small"
    status, _, error = run(f"quantize {typed}{out}")
    assert status == 2
    assert len(error.splitlines()) == 1
    assert all(text in error for text in says), error
    assert not list(tmp_path.iterdir())


def test_quantize__without_the_libraries(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.optional_imports.find_spec", lambda name: None)
    status, _, error = run("quantize @/vit --mode dynamic --out small")
    assert status == 2
    assert "pip install 'espalier[deploy]'" in error
    assert quantize.int8_folder.NEEDS[0] in error
