"""Files for the sparse engine, by the real command line: written, refused, benchmarked, evaluated."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from commands import Run, good
from image_tables import VIT, dense_folder, edit_json, normed_folder, table, tiny, write

from pruners import prune
from trainers.checkpoint.checksums import sha256
from trainers.checkpoint.folder import save_checkpoint
from trainers.deploy import formats
from trainers.sparse import load
from trainers.sparse.kernels import host

NEEDS_VNNI = pytest.mark.skipif(not host.has_vnni(), reason="needs AVX-512 VNNI")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    dense_folder(folder / "dense")
    normed_folder(folder / "resnet")
    for name, pattern in (("pruned", "unstructured"), ("blocks", "1x4")):
        model, arguments = tiny(VIT)
        report = prune(model, "magnitude", 0.8, pattern=pattern)
        record = {"method": "magnitude", "sparsity": report.sparsity, "allocation": report.allocation}
        save_checkpoint(folder / name, model, model_args=arguments, masks=report.masks, record=record)
    write(folder / "test.parquet", table([0, 1, 2] * 30))
    return folder


def test_sparse__a_folder_is_safetensors_and_json(run: Run) -> None:
    output = good(run, "export @/pruned out --format sparse --data @/test.parquet")
    assert "layers      8 without their zeros, 1 dense: patch_embed.proj" in output
    assert "gain" not in output
    assert {path.name for path in Path("out").iterdir()} == {
        *("program.json", "tensors.safetensors", "checksums.json", "export.json")
    }
    model = load("out")
    assert model.preprocessing["classes"] == 3
    assert set(model.kinds.values()) == {"sparse", "dense"}


def test_sparse__a_model_without_zeros_is_told_that_it_gains_nothing(run: Run) -> None:
    lines = good(run, "export @/dense out --format sparse").splitlines()
    (line,) = [line for line in lines if line.startswith("gain ")]
    assert "none to expect: 0 % of the weights are zeros that it leaves out" in line


def test_sparse__layers_that_run_dense_are_counted_where_they_are_many(run: Run) -> None:
    output = good(run, "export @/dense out --format sparse")
    assert "layers      0 without their zeros, 9 dense\n" in output


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "export @/resnet out --format sparse",
            (
                "--format = 'sparse'",
                "ResNet cannot be packed",
                "only timm's VisionTransformer and SwinTransformer",
            ),
        ),
        (
            "export @/pruned out --format sparse --calibration @/test.parquet",
            ("--calibration", "not quantised; drop it"),
        ),
        pytest.param(
            "export @/pruned out --format sparse-int8",
            ("% of its zeros stand in blocks of 1 × 4", "prune with the pattern 1x4"),
            marks=NEEDS_VNNI,
        ),
        pytest.param(
            "export @/blocks out --format sparse-int8 --calibration @/test.parquet",
            ("--calibration", "drop it"),
            marks=NEEDS_VNNI,
        ),
    ],
)
def test_sparse__bad_input_is_one_line_and_leaves_nothing(text: str, says: tuple[str, ...], run: Run) -> None:
    status, out, error = run(text)
    assert (status, out, len(error.splitlines())) == (2, "", 1), error
    assert not [part for part in says if part not in error], error
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    "text",
    ["export @/blocks out --format sparse-int8", "benchmark @/blocks --engines sparse:int8"],
)
def test_sparse__instructions_that_the_processor_lacks_are_named(
    text: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "has_vnni", lambda: False)
    status, _, error = run(text)
    assert (status, len(error.splitlines())) == (2, 1)
    assert "this processor has no AVX-512 VNNI" in error


@pytest.mark.parametrize("lanes", [4, 8])
def test_sparse__a_processor_with_narrower_registers_gets_narrower_code(
    lanes: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lanes > host.lanes():
        pytest.skip("this processor has no such registers")
    monkeypatch.setattr(host, "lanes", lambda: lanes)
    assert "batch 64" in good(run, "export @/pruned out --format sparse --data @/test.parquet")


def test_sparse__another_version_of_the_format_is_one_line(run: Run) -> None:
    good(run, "export @/pruned out --format sparse")
    program = Path("out/program.json")
    edit_json(program, version=99)
    status, _, error = run("evaluate out --data @/test.parquet")
    assert (status, len(error.splitlines())) == (2, 1)
    assert "program.json is not the file" in error
    record = json.loads(Path("out/export.json").read_text())
    sums = json.loads(Path("out/checksums.json").read_text()) | {"program.json": sha256(program)}
    Path("out/checksums.json").write_text(json.dumps(sums))
    changed = {name: sha256(Path("out") / name) for name in ("program.json", "checksums.json")}
    edit_json(Path("out/export.json"), files=record["files"] | changed)
    status, _, error = run("evaluate out --data @/test.parquet")
    assert (status, len(error.splitlines())) == (2, 1)
    assert "sparse cannot load it" in error
    assert "out: version 99 of the format, this reads version 1)" in error


def test_sparse__evaluate_runs_the_folder_by_its_engine(run: Run) -> None:
    good(run, "export @/pruned out --format sparse --data @/test.parquet")
    by_torch = good(run, "evaluate @/pruned --data @/test.parquet").splitlines()
    by_engine = good(run, "evaluate out --data @/test.parquet").splitlines()
    assert by_engine[1] == f"{by_torch[1]}, float32 by sparse"
    assert [line.split()[0] for line in by_engine] == ["images", "top-1", "loss", "sparsity"]
    assert by_engine[3] == by_torch[3]
    losses = [float(lines[2].split()[1]) for lines in (by_torch, by_engine)]
    assert math.isclose(*losses, abs_tol=2e-4)


def test_sparse__benchmark_times_models_and_folders_and_says_what_zeros_gave(run: Run) -> None:
    good(run, "export @/pruned out --format sparse")
    text = "--engines torch,sparse --batch 1,3 --threads 1 --repetitions 3 --data @/test.parquet"
    out = good(run, f"benchmark @/dense @/pruned out {text} --json s.json")
    assert re.search(r"dense on sparse:float32: no linear layer has \d+ % zeros", out)
    content = json.loads(Path("s.json").read_text())
    timed = {(row["model"], row["engine"]) for row in content["rows"] if row["seconds"]}
    assert timed == {("dense", "torch"), ("pruned", "torch"), ("pruned", "sparse"), ("out", "sparse")}
    assert len({row["top1"] for row in content["rows"] if row["model"] != "dense"}) == 1
    assert any("as fast as it on torch:float32" in line for line in content["words"])


@NEEDS_VNNI
def test_sparse__int8_in_blocks_is_benchmarked_from_the_checkpoint(run: Run) -> None:
    text = "--engines torch,sparse:int8 --batch 1 --threads 1 --repetitions 3 --json s.json"
    good(run, f"benchmark @/blocks @/pruned {text}")
    rows = {(row["model"], row["engine"]): row for row in json.loads(Path("s.json").read_text())["rows"]}
    assert rows["blocks", "sparse"]["seconds"] > 0
    assert 0 < rows["blocks", "sparse"]["difference"]["relative"] < 0.1
    assert "prune with the pattern 1x4" in rows["pruned", "sparse"]["note"]


def test_sparse__zeros_in_blocks_are_counted_in_linear_layers() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 2, bias=False), torch.nn.Conv2d(1, 1, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1, 2, 3, 4, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1.0]]))
        formats._check_blocks(model)
        model[0].weight[0, 1] = 0
        formats._check_blocks(model)  # 8 of 9
        model[0].weight[0, 2] = 0
        with pytest.raises(ValueError, match="80 % of its zeros stand in blocks"):
            formats._check_blocks(model)
