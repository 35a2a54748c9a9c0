"""``espalier export`` for engines, by the real command line: files that their engine runs, or nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sysconfig
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from commands import Run, good
from image_tables import SWIN, VIT, dense_folder, edit_json, table, tiny, write
from onnx import numpy_helper
from PIL import Image
from torch import nn

from orchestration.export import engine
from orchestration.export.sample_images import photographs
from pruners import find_layers, prune
from pruners.errors import InputError
from trainers import optional_imports
from trainers.checkpoint.folder import load_checkpoint, save_checkpoint
from trainers.data.preprocessing import pattern_images, preprocessing_of
from trainers.deploy import checked, formats
from trainers.deploy.checked import read_record, torch_answers
from trainers.deploy.formats import FORMATS, Source
from trainers.engines import registry
from trainers.engines.agreement import Agreement
from trainers.engines.registry import ANY_BATCH, ENGINES, Engine, Placement
from trainers.export import onnx as onnx_export
from trainers.export import openvino, torch_export
from trainers.optional_imports import openvino_core
from trainers.sparse import load
from trainers.sparse.kernels import host

GUIDE = Path(__file__).parents[3] / "docs/guides/export.md"
PLACES = re.compile(rb"/(?:work|tmp|root|home|usr|opt|var|build)/[ -~]{0,60}|site-packages")


def pruned(folder: Path, architecture: str = VIT, pattern: str = "unstructured") -> Path:
    model, arguments = tiny(architecture)
    report = prune(model, "magnitude", 0.75, pattern=pattern)
    record = {"method": "magnitude", "sparsity": report.sparsity, "allocation": report.allocation}
    save_checkpoint(folder, model, model_args=arguments, masks=report.masks, record=record)
    (folder / "classes.json").write_text(json.dumps({"ash": 1, "birch": 0, "cedar": 2}))
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    pruned(folder / "vit")
    pruned(folder / "blocks", pattern="1x4")
    pruned(folder / "swin", SWIN)
    write(folder / "images.parquet", table([0, 1, 2] * 30))
    write(folder / "ten.parquet", table(list(range(10))))
    (folder / "full").mkdir()
    (folder / "full/thing.txt").write_text("mine")
    return folder


def metadata(folder: Path) -> dict[str, str]:
    """Of the file itself, by whatever reads it."""
    if (folder / "program.json").is_file():
        return {"preprocessing": json.dumps(dict(load(folder).preprocessing))}
    path = next(folder.glob("model.*[!n]"))
    if path.suffix == ".onnx":
        return onnx_export.read_metadata(path)
    reader = torch_export.read_metadata if path.suffix == ".pt2" else openvino.read_metadata
    return reader(path, "preprocessing")


def matmuls(path: Path) -> list[np.ndarray[Any, Any]]:
    """The INT8 weights of an ONNX file."""
    model = onnx.load(path)
    arrays = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    return [array for array in arrays if array.dtype == np.int8 and array.ndim == 2]


NEEDS_VNNI = pytest.mark.skipif(not host.has_vnni(), reason="needs AVX-512 VNNI")
IN_BLOCKS = "sparse-int8"  # zeros of the others may stand anywhere
EVERY = [("vit", name) for name in FORMATS if name != IN_BLOCKS] + [
    pytest.param("blocks", IN_BLOCKS, marks=NEEDS_VNNI),
    *(
        pytest.param("swin", name, marks=[] if name == "onnx" else [pytest.mark.long])
        for name in FORMATS
        if not name.startswith("sparse")
    ),
]


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_engine__a_file_answers_what_the_model_answers(name: str, kind: str, run: Run, files: Path) -> None:
    form = FORMATS[kind]
    images = "--calibration @/images.parquet" if form.calibration == "needed" else ""
    output = good(run, f"export @/{name} out --format {kind} --data @/images.parquet {images}")
    assert [line[:12].strip() for line in output.splitlines()] == [
        "compared",
        *("batch 1", "batch 2", "batch 7", "batch 64"),
        *(("int8",) if form.kind.startswith("int8") else ()),
        *(("layers",) if form.engine == "sparse" else ()),
        *("written to", "run it by"),
    ]
    assert "on 64 images (the first of images.parquet)" in output
    out = Path("out")
    record = read_record(out, "out")
    assert set(record["files"]) == {path.name for path in out.iterdir()} - {"export.json"}
    assert (record["kind"], record["file"]) == (kind, form.file)
    assert record["source"]["sparsity"] == pytest.approx(0.75)
    # a file of any batch size, by its engine
    model = load_checkpoint(str(files / name)).model.eval()
    pictures = engine._real_images(model, str(files / "images.parquet"))[0][:5]
    for known in (ANY_BATCH, ENGINES):
        answer = known[form.engine].load(out / form.file, form.kind, Placement(1))
        for size in (1, 3, 5, 1):
            apart = Agreement.of(answer(pictures[:size]), torch_answers(model, pictures[:size]))
            assert apart.holds(form.kind, form.engine), apart
    probe = np.array(record["probe"]["logits"], np.float32)
    assert np.allclose(probe, answer(pattern_images(record["preprocessing"], 4)), atol=1e-6)
    # what the file says of itself
    about = json.loads(metadata(out)["preprocessing"])
    config = timm.data.resolve_model_data_config(model)
    for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"):
        expected = config[key]
        assert about[key] == (list(expected) if isinstance(expected, tuple) else expected), key
    assert (about["classes"], about["labels"]) == (3, ["birch", "ash", "cedar"])
    # and what it does not
    for path in out.iterdir():
        assert PLACES.findall(path.read_bytes()) == [], path.name
        assert str(files).encode() not in path.read_bytes()
        if path.suffix == ".pt2":
            with zipfile.ZipFile(path) as archive:
                contents = {entry: archive.read(entry) for entry in archive.namelist()}
            assert not [entry for entry, bits in contents.items() if PLACES.search(bits)]
            assert not [
                entry for entry, bits in contents.items() if bits[:1] == b"\x80" or b"data.pkl" in bits
            ]


@pytest.mark.parametrize(
    ("known", "shapes"), [(ENGINES, ["[2,3,16,16]", "[1,3,16,16]"]), (ANY_BATCH, ["[?,3,16,16]"])]
)
def test_engine__openvino_compiles_for_each_batch_size_but_not_to_check_a_file(
    known: Mapping[str, Engine], shapes: list[str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    good(run, "export @/vit out --format openvino")
    compiled = []

    class Core:
        read_model = staticmethod(openvino_core().read_model)

        @staticmethod
        def compile_model(model: Any, *how: Any) -> Any:
            compiled.append(str(model.input().get_partial_shape()))
            return openvino_core().compile_model(model, *how)

    monkeypatch.setattr(registry, "openvino_core", Core)
    answer = known["openvino"].load(Path("out/model.xml"), "float32", Placement(1))
    for size in (2, 1, 2):
        assert answer(np.zeros((size, 3, 16, 16), np.float32)).shape == (size, 3)
    assert compiled == shapes


@pytest.mark.parametrize("calibrated", [False, True])
def test_engine__zeros_stay_zeros_in_int8(calibrated: bool, run: Run, files: Path) -> None:
    images = "--calibration @/images.parquet" if calibrated else ""
    good(run, f"export @/vit out --format onnx-int8 --data @/images.parquet {images}")
    assert read_record(Path("out"), "out")["calibration"] == (90 if calibrated else None)
    assert "preprocessing" in metadata(Path("out"))
    model = load_checkpoint(str(files / "vit")).model
    weights = dict(model.named_parameters())
    layers = [weights[layer.name].detach().numpy() for layer in find_layers(model)]
    quantized = matmuls(Path("out/model.onnx"))
    for layer in layers:
        same = [
            array for array in quantized if array.shape == layer.T.shape and not array[layer.T == 0].any()
        ]
        assert same, "no INT8 weight has this layer's zeros"
    points = [
        numpy_helper.to_array(tensor)
        for tensor in onnx.load("out/model.onnx").graph.initializer
        if tensor.name.endswith("zero_point") and tensor.data_type == onnx.TensorProto.INT8
    ]
    assert points
    assert not any(point.any() for point in points)


def test_engine__an_engine_that_answers_something_else_leaves_nothing(
    run: Run, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(source: formats.Source, folder: Path) -> None:
        """A writer that changes a weight."""
        with torch.no_grad():
            source.model.get_parameter("head.weight").mul_(1.01)
        torch_export.export_torch(source.model, folder / "model.pt2", source.input_size, source.metadata)

    wrong = formats.Format("", "model.pt2", "torch", "float32", (), "none", other)
    # the model that answers are compared with is another object
    monkeypatch.setattr(
        checked, "torch_answers", lambda model, images: torch_answers(tiny_again(files), images)
    )
    monkeypatch.setattr(checked, "FORMATS", {**FORMATS, "torch-export": wrong})
    (Path("mine")).mkdir()
    status, out, error = run("export @/vit out --format torch-export")
    assert status == 1
    assert "batch 64" in out
    assert "same class" in out
    assert len(error.splitlines()) == 1
    assert "does not answer what the model answers" in error
    assert [path.name for path in Path().iterdir()] == ["mine"]


def tiny_again(files: Path) -> nn.Module:
    return load_checkpoint(str(files / "vit")).model.eval()


def test_engine__an_engine_that_cannot_run_the_file_leaves_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(source: formats.Source, folder: Path) -> None:
        (folder / "model.onnx").write_bytes(b"no model")

    wrong = formats.Format("", "model.onnx", "onnxruntime", "float32", (), "none", broken)
    monkeypatch.setattr(checked, "FORMATS", {**FORMATS, "onnx": wrong})
    status, _, error = run("export @/vit out --format onnx")
    assert (status, len(error.splitlines())) == (1, 1)
    assert "onnxruntime cannot load the file" in error
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("export @/vit out --format onyx", ("--format", "'onyx'", "did you mean 'onnx'?")),
        ("export @/vit @/full --format onnx", ("OUT", "/full", "not empty")),
        ("export @/none out --format onnx", ("model", "/none", "no such folder")),
        ("export @/vit out --format openvino-int8", ("--calibration", "give training images")),
        ("export @/vit out --format onnx --calibration @/images.parquet", ("--calibration", "not quantised")),
        ("export @/vit out --format compressed --data @/images.parquet", ("--data", "drop it")),
        ("export @/vit out --format onnx --data @/ten.parquet", ("--data", "the model's classes 0…2")),
        ("export @/vit out --format onnx --data @/none.parquet", ("--data", "no such file")),
        ("export @/vit out --format onnx-int8 --calibration @/ten.parquet", ("--calibration", "classes 0…2")),
    ],
)  # fmt: skip
def test_engine__bad_input_is_one_line_and_leaves_nothing(
    text: str, says: tuple[str, ...], run: Run, files: Path
) -> None:
    entries = set(files.rglob("*"))
    status, out, error = run(text)
    assert (status, out, len(error.splitlines())) == (2, "", 1), error
    assert not [part for part in says if part not in error], error
    assert list(Path().iterdir()) == []
    assert set(files.rglob("*")) == entries


@pytest.mark.parametrize(
    ("kind", "package"),
    [
        ("onnx", "onnxscript"),
        ("onnx-int8", "onnxruntime"),
        ("openvino", "openvino"),
        ("openvino-int8", "nncf"),
    ],
)
def test_engine__a_library_that_is_missing_is_named(
    kind: str, package: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = optional_imports.find_spec
    monkeypatch.setattr(
        optional_imports, "find_spec", lambda name: None if name == package else find_spec(name)
    )
    status, _, error = run(f"export @/none out --format {kind}")
    assert (status, len(error.splitlines())) == (2, 1)
    assert f"needs {package}, which is not installed: pip install 'espalier[deploy]'" in error


class Odd(nn.Module):
    """With an operation that ONNX has not."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(images[:, 0]).real


class Fixed(nn.Module):
    """For batches of two alone."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.reshape(2, -1)


def test_engine__operations_that_onnx_has_not_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"operations that ONNX has not: aten\.linalg_eig"):
        onnx_export.export_onnx(Odd(), tmp_path / "model.onnx", (3, 8, 8), {})
    assert list(tmp_path.iterdir()) == []


def test_engine__a_batch_size_that_is_built_in_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="free batch size"):
        torch_export.export_torch(Fixed(), tmp_path / "model.pt2", (3, 8, 8), {})
    assert list(tmp_path.iterdir()) == []


def test_engine__a_damaged_export_is_named(run: Run, files: Path) -> None:
    output = good(run, "export @/vit out --format torch-export")
    assert "on 64 images (parts of scikit-learn's two photographs)" in output
    assert read_record(Path("out"), "out")["engine"] == "torch"
    whole = bytearray(Path("out/model.pt2").read_bytes())
    whole[-9] ^= 1
    Path("out/model.pt2").write_bytes(bytes(whole))
    with pytest.raises(InputError, match=r"model\.pt2 is not the file"):
        read_record(Path("out"), "out")
    Path("out/model.pt2").unlink()
    with pytest.raises(InputError, match=r"model\.pt2 is missing"):
        read_record(Path("out"), "out")
    edit_json(Path("out/export.json"), kind="onyx")
    with pytest.raises(InputError, match="must be a record written by espalier export"):
        read_record(Path("out"), "out")


def test_engine__photographs_are_the_same_ones_every_time() -> None:
    first, again = photographs(5), photographs(5)
    assert [picture.tobytes() for picture in first] == [picture.tobytes() for picture in again]
    assert len({picture.size for picture in first}) > 1
    assert all(np.asarray(picture).std() > 1 for picture in first)


def test_engine__every_format_has_an_engine() -> None:
    for form in FORMATS.values():
        assert form.kind in registry.ENGINES[form.engine].types


# without espalier


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a virtual environment that has the engines' libraries, and not espalier.

    A path file does not read those of the folder that it names, and espalier is found by one of them.
    """
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "engines.pth").write_text(sysconfig.get_path("purelib"))
    python = folder / "bin/python"
    for name in ("espalier", "orchestration", "trainers", "pruners"):
        tried = subprocess.run(
            [python, "-I", "-c", f"import {name}"], capture_output=True, text=True, check=False, cwd=folder
        )
        assert "ModuleNotFoundError" in tried.stderr, name
    return python


def example(kind: str) -> str:
    """The lines of the guide that run a format, after those that prepare an image."""
    section = GUIDE.read_text(encoding="utf-8").partition("## For engines")[2].partition("\n## ")[0]
    prepare, *blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    matching = [
        block for block in blocks if kind in re.split(r", ", block.splitlines()[0].removeprefix("# "))
    ]
    assert len(matching) == 1, kind
    statements = [line for line in matching[0].splitlines()[1:] if line and not line.startswith("import")]
    assert len(statements) <= 5
    return f"{prepare}\n{matching[0]}"


@pytest.mark.long
@pytest.mark.parametrize("kind", [kind for kind in FORMATS if not kind.startswith("sparse")])
def test_engine__the_examples_of_the_guide_run_where_espalier_is_not(
    kind: str, run: Run, files: Path, elsewhere: Path
) -> None:
    form = FORMATS[kind]
    images = "--calibration @/images.parquet" if form.calibration == "needed" else ""
    good(run, f"export @/vit out --format {kind} {images}")
    picture = photographs(2)[1].resize((64, 48))
    picture.save("cat.jpg", "PNG")
    script = Path("example.py")
    script.write_text(f"{example(kind)}\nprint(json.dumps(np.asarray(logits).tolist()))\n")
    done = subprocess.run([elsewhere, "-I", script], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    model = load_checkpoint(str(files / "vit")).model.eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        expected = model(transform(Image.open("cat.jpg").convert("RGB"))[None]).numpy()
    logits = np.array(json.loads(done.stdout), np.float32)
    apart = Agreement.of(logits, expected)
    # Pillow's and torchvision's sizes after scaling may differ by a pixel before the cut
    assert apart.relative < (0.1 if form.kind == "int8" else 0.05), apart


def test_engine__checkpoint_of_before_is_still_dense(tmp_path: Path) -> None:
    """A dense folder without classes has no labels in its metadata."""
    dense_folder(tmp_path / "dense")
    source = engine.source_of(tiny()[0], tmp_path / "dense", None)
    assert "labels" not in source.preprocessing


def test_engine__calibration_images_do_not_quantize_a_format_in_float(files: Path, tmp_path: Path) -> None:
    """As a benchmark has them, for those of its engines that want them."""
    model = load_checkpoint(str(files / "vit")).model.eval()
    about = preprocessing_of(model)
    source = Source(model, about, pattern_images(about, 8))
    kinds = {}
    for name in ("openvino", "openvino-int8"):
        (tmp_path / name).mkdir()
        FORMATS[name].write(source, tmp_path / name)
        graph = openvino_core().read_model(tmp_path / name / FORMATS[name].file)
        kinds[name] = {node.get_element_type().get_type_name() for node in graph.get_ops()}
    assert "i8" not in kinds["openvino"]
    assert "i8" in kinds["openvino-int8"]
