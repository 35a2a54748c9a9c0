"""``espalier benchmark``: who is timed and who is not, what is said of it, and the command on tiny models."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import onnx
import pytest
from commands import Run, good
from helpers import quick
from hypothesis import given
from hypothesis import strategies as st
from image_tables import VIT, dense_folder, edit_json, table, tiny, write
from onnx import numpy_helper
from rich.console import Console

from orchestration import benchmark_options, variants
from orchestration.benchmark import Row
from orchestration.benchmark_options import BenchmarkOptions
from orchestration.benchmark_plot import accuracy_over_latency
from orchestration.benchmark_report import Report, gain, milliseconds
from orchestration.machine import describe_machine
from pruners import prune
from pruners.errors import InputError
from trainers import optional
from trainers.agreement import TOLERANCE, Agreement
from trainers.checkpoint import save_checkpoint
from trainers.engine_process import EngineError
from trainers.engines import ENGINES, Choice, Place
from trainers.turns import in_turns

GOOD = Agreement(1e-6, 1e-7, 1.0)
TORCH, ORT, INT8 = Choice("torch", "float32"), Choice("onnxruntime", "float32"), Choice("onnxruntime", "int8")


def row(model: str, choice: Choice, milliseconds: float, batch: int = 1, **more: Any) -> Row:
    """Three rounds about a time."""
    seconds = tuple(1e-3 * milliseconds * share for share in (0.99, 1.0, 1.01))
    return Row(model, choice, batch, **{"sparsity": 0.0, "seconds": seconds, "agreement": GOOD, **more})


def report(
    *rows: Row, loss: float = 0.01, same_size: frozenset[str] = frozenset({"dense", "pruned"})
) -> Report:
    machine = {"processor": "a processor", "load": 0.1, "cores": 2}
    return Report(rows, Place(1), 3, loss, None, same_size, machine, 0.1)


def said(found: Report) -> str:
    console = Console(width=150, record=True, file=Path(os.devnull).open("w"))  # noqa: SIM115
    console.print(found.table())
    return console.export_text() + "\n".join([*found.words(), *found.recommendations()])


# taking turns


class Timed:
    """A worker that notes who was asked, and takes the seconds that it is told."""

    def __init__(self, name: str, takes: float, log: list[tuple[str, int, int]], last: int = 10**9) -> None:
        self._name, self._takes, self._log, self._last = name, takes, log, last

    def seconds(self, batch: int, calls: int) -> float:
        self._log.append((self._name, batch, calls))
        if len([one for one in self._log if one[0] == self._name]) > self._last:
            raise EngineError("out of memory\nat some place")
        return self._takes * batch


def test_all_take_turns_in_every_round() -> None:
    log: list[tuple[str, int, int]] = []
    workers = {name: Timed(name, takes, log) for name, takes in (("a", 0.001), ("b", 0.1))}
    times, failed = in_turns(workers, (1, 4), 5)
    assert failed == {}
    assert times == {
        "a": {1: (0.001,) * 5, 4: (0.004,) * 5},
        "b": {1: (0.1,) * 5, 4: (0.4,) * 5},
    }
    rounds = [log[i : i + 4] for i in range(0, len(log), 4)]
    assert len(rounds) == 6
    for one in rounds:
        assert {(name, batch) for name, batch, _ in one} == {("a", 1), ("a", 4), ("b", 1), ("b", 4)}
    assert len({tuple(one) for one in rounds[1:]}) > 1, "always the same order: one always follows the same"
    assert {(name, batch): calls for name, batch, calls in log[4:]} == {
        ("a", 1): 50,
        ("a", 4): 12,
        ("b", 1): 1,
        ("b", 4): 1,
    }


def test_who_breaks_off_is_left_out() -> None:
    log: list[tuple[str, int, int]] = []
    workers = {"a": Timed("a", 0.1, log), "b": Timed("b", 0.1, log, last=3)}
    times, failed = in_turns(workers, (1,), 4)
    assert times == {"a": {1: (0.1,) * 4}}
    assert failed == {"b": "out of memory"}


# answers


def test_what_is_no_answer_agrees_nowhere() -> None:
    expected = np.array([[1.0, 2.0], [3.0, -1.0]], np.float32)
    assert Agreement.of(expected, expected) == Agreement(0.0, 0.0, 1.0)
    for found in (expected[:1], expected * np.nan, expected * np.inf, np.zeros((2, 3), np.float32)):
        assert not any(Agreement.of(found, expected).holds(kind) for kind in TOLERANCE)
    half = Agreement.of(expected[::-1].copy(), expected)
    assert (half.top1, half.largest) == (0.0, 3.0)


@quick(40)
@given(st.floats(-3, 3), st.sampled_from(sorted(TOLERANCE)))
def test_the_difference_is_relative(exponent: float, kind: str) -> None:
    expected = np.random.default_rng(0).normal(0, 10**exponent, (20, 5))
    for share, holds in ((0.9, True), (1.1, False)):
        found = expected * (1 + share * TOLERANCE[kind])
        assert Agreement.of(found, expected.astype(np.float64)).holds(kind) is holds  # type: ignore[arg-type]


# what is said


def test_a_wrong_answer_is_never_called_fast() -> None:
    wrong = replace(
        row("pruned", INT8, 0.1, sparsity=0.5, top1=0.9), seconds=(), agreement=Agreement(9.0, 0.5, 0.1)
    )
    noted = replace(wrong, note=f"wrong answers: {wrong.agreement}")
    found = report(row("dense", TORCH, 5, top1=0.9), row("dense", ORT, 3, top1=0.9), noted)
    assert wrong.wrong
    assert not found.right
    best = found.recommended(1)
    assert best is not None
    assert (best.model, best.choice) == ("dense", ORT)
    text = said(found)
    assert "pruned on onnxruntime:int8: wrong answers" in text
    assert "wrong" in text.partition("50 % zeros")[2].splitlines()[0]
    assert json.loads(json.dumps(found.as_json()))["rows"][2]["seconds"] is None


def test_the_recommendation_keeps_the_accuracy() -> None:
    rows = [
        row("dense", TORCH, 5.0, top1=0.800),
        row("dense", ORT, 4.0, top1=0.800),
        row("pruned", ORT, 2.0, top1=0.793),
        row("pruned", INT8, 1.0, top1=0.780),
    ]
    best = report(*rows).recommended(1)
    assert best is rows[2]
    assert list(report(*rows).recommendations()) == [
        "batch 1: pruned on onnxruntime:float32, 2 ms, 2.00× as fast as dense on onnxruntime:float32; "
        "top-1 79.30 %, dense 80.00 %"
    ]
    assert report(*rows, loss=0.03).recommended(1) is rows[3]
    assert report(*rows, loss=0.0).recommended(1) is rows[1]
    unknown = [replace(one, top1=None) for one in rows]
    assert "without --data" in next(report(*unknown).recommendations())


def test_zeros_that_give_nothing_are_told() -> None:
    slow, fast = (
        row("pruned", choice, time, batch, sparsity=0.9)
        for choice, time, batch in ((ORT, 3.9, 1), (Choice("csr", "float32"), 2.0, 1))
    )
    rows = [row("dense", TORCH, 5), row("dense", ORT, 4), row("pruned", TORCH, 5, sparsity=0.9), slow, fast]
    words = "\n".join(report(*rows).words())
    assert (
        "zeros of pruned give nothing on onnxruntime:float32: 1.03× at batch 1 as fast as dense there"
        in words
    )
    assert "zeros of pruned give nothing on torch:float32: 1.00×" in words
    assert "zeros of pruned on csr:float32: 2.50× at batch 1 as fast as it on torch:float32" in words
    # a model with fewer channels is not only sparse
    words = "\n".join(report(*rows, same_size=frozenset({"dense"})).words())
    assert "on onnxruntime:float32: " not in words.partition("zeros of")[2]
    more = [*rows, row("pruned", Choice("csr", "float32"), 9, 64, sparsity=0.9), row("pruned", TORCH, 8, 64)]
    assert "nothing at batch 64" in "\n".join(report(*more).words())


def test_a_gain_is_larger_than_the_noise() -> None:
    quiet, noisy = row("a", ORT, 2.0), replace(row("a", ORT, 2.0), seconds=(0.001, 0.002, 0.006))
    assert gain(quiet, row("b", ORT, 2.2))
    assert not gain(quiet, row("b", ORT, 2.05))
    assert not gain(noisy, row("b", ORT, 2.2))


def test_times_are_readable() -> None:
    assert [milliseconds(one) for one in (0.00012345, 0.0123456, 0.1234, 12.345)] == [
        "0.123",
        "12.3",
        "123",
        "12,345",
    ]


def test_a_busy_machine_is_told() -> None:
    found = report(row("dense", TORCH, 5))
    assert "busy" not in said(found)
    assert "busy" in said(replace(found, machine={**found.machine, "load": 3.0}))


def test_the_picture_shows_the_front() -> None:
    rows = [
        row("dense", TORCH, 5.0, top1=0.8),
        row("pruned", ORT, 2.0, top1=0.79),
        row("pruned", TORCH, 6.0, top1=0.79),
        row("dense", TORCH, 50.0, 64, top1=0.8),
    ]
    image = accuracy_over_latency(report(*rows))
    assert image[:4] == b"\x89PNG"


def test_the_machine_has_no_name() -> None:
    found = describe_machine()
    assert found["cores"] == os.cpu_count()
    assert found["memory"] > 2**28
    assert found["processor"]
    assert os.uname().nodename not in json.dumps(found)


# options


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"engines": "onxruntime"}, ("--engines", "'onxruntime'", "did you mean 'onnxruntime'?")),
        ({"engines": "onnxruntime:bfloat16"}, ("--engines", "onnxruntime computes in float32, int8")),
        ({"engines": "torch:int8"}, ("--engines", "torch computes in float32, bfloat16")),
        ({"engines": "2:4"}, ("--engines", "runs on cuda only", "on cpu: torch, compile, csr")),
        ({"engines": "2:4:int8"}, ("--engines", "2:4 computes in bfloat16, float16")),
        ({"engines": ""}, ("--engines", "must be one of")),
        ({"engines": "openvino:int8"}, ("--calibration", "give training images")),
        ({"batch": "0"}, ("--batch", "'0'", "from 1 on")),
        ({"batch": "1,many"}, ("--batch", "numbers of images")),
        ({"threads": 10_000}, ("--threads", "10000", "processors")),
        ({"loss": "a lot"}, ("--loss", "'a lot'", "as 1% or 0.01")),
        ({"loss": "150%"}, ("--loss", "as 1% or 0.01")),
        ({"device": "tpu"}, ("--device", "'tpu'", "cpu or cuda")),
        ({"plot": "a.png"}, ("--plot", "'a.png'", "give test images by --data")),
        ({"json": "none/a.json"}, ("--json", "'none/a.json'", "a folder that exists")),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], says: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as error:
        BenchmarkOptions(("model",), **options).check()
    assert not [part for part in says if part not in str(error.value)], str(error.value)


def test_what_is_asked_for_is_understood() -> None:
    found = BenchmarkOptions(
        ("a",), "torch:bfloat16, onnxruntime:int8,torch:bfloat16", batch="64,1,1", loss="2.5%", threads=1
    )
    assert found.choices == (Choice("torch", "bfloat16"), Choice("onnxruntime", "int8"))
    assert (found.batches, found.tolerated, found.place) == ((1, 64), 0.025, Place(1))
    assert replace(found, loss="0.01").tolerated == 0.01
    usual = BenchmarkOptions(("a",)).choices
    assert [choice.engine for choice in usual] == [name for name in ENGINES if name != "2:4"]
    assert {choice.kind for choice in usual} == {"float32"}


def test_an_engine_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    there = optional.find_spec
    monkeypatch.setattr(optional, "find_spec", lambda name: None if name == "onnxruntime" else there(name))
    assert "onnxruntime" not in {choice.engine for choice in BenchmarkOptions(("a",)).choices}
    with pytest.raises(InputError, match=r"needs onnxruntime.*pip install 'espalier\[deploy\]'"):
        BenchmarkOptions(("a",), "onnxruntime").check()


def test_a_type_that_the_processor_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino

    class Core:
        def get_property(self, *_: str) -> list[str]:
            return ["FP32"]

    monkeypatch.setattr(openvino, "Core", Core)
    with pytest.raises(InputError, match="this processor has no bfloat16"):
        BenchmarkOptions(("a",), "openvino:bfloat16").check()


def test_names_tell_models_apart() -> None:
    assert variants.labels(["/a/b/dense", "pruned"]) == ["dense", "pruned"]
    assert variants.labels(["/a/x/model", "s3://bucket/y/model"]) == ["x/model", "y/model"]
    assert variants.labels(["models:/espalier-a@champion"]) == ["espalier-a@champion"]
    with pytest.raises(InputError, match="same model twice"):
        variants.labels(["/a/b", "/a/b"])


# the command


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
    weight = next(one for one in model.graph.initializer if "head" in one.name and len(one.dims) == 2)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.5, weight.name))
    onnx.save(model, path)
    edit_json(folder / "export.json", files={"model.onnx": hashlib.sha256(path.read_bytes()).hexdigest()})


def test_models_on_engines(run: Run, files: Path) -> None:
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
    found = json.loads(Path("found.json").read_text())
    assert str(files) not in Path("found.json").read_text()
    rows = {(one["model"], one["engine"], one["batch"]): one for one in found["rows"]}
    timed = {key for key, one in rows.items() if one["seconds"] is not None}
    engines = {"dense": ("torch", "onnxruntime"), "pruned": ("torch", "csr", "onnxruntime")}
    assert timed == {
        (model, engine, batch)
        for model, names in {**engines, "exported": ("onnxruntime",)}.items()
        for engine in names
        for batch in (1, 3)
    }
    for key in timed:
        one = rows[key]
        assert len(one["rounds"]) == 3
        assert one["difference"]["relative"] < 1e-3
        assert one["memory"] > 2e7
        assert one["images_per_second"] == pytest.approx(key[2] / one["seconds"])
        # what an engine computes alike, it gets right alike
        assert one["top1"] == rows[key[0], "onnxruntime", 1]["top1"]
    assert rows["dense", "onnxruntime", 1]["memory"] < 0.5 * rows["dense", "torch", 1]["memory"]
    assert rows["exported", "onnxruntime", 1]["disk"] == Path("exported/model.onnx").stat().st_size
    assert found["recommended"]["1"]["model"] in ("dense", "exported", "pruned")
    assert found["threads"] == 1
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
def test_bad_input_is_one_line(text: str, says: tuple[str, ...], run: Run, files: Path) -> None:
    status, out, error = run(text)
    assert (status, out, len(error.splitlines())) == (2, "", 1), error
    assert not [part for part in says if part not in error], error
    assert list(Path().iterdir()) == []


def test_an_export_for_another_engine(run: Run) -> None:
    good(run, "export @/dense out --format torch-export")
    status, _, error = run("benchmark out --engines onnxruntime")
    assert (status, len(error.splitlines())) == (2, 1)
    assert "none runs out, which is a file for torch:float32" in error


@pytest.mark.long
def test_torch_compile_and_openvino(run: Run) -> None:
    out = good(
        run,
        "benchmark @/dense @/pruned --engines compile,openvino,openvino:int8,onnxruntime:int8,torch:bfloat16 "
        "--batch 2 --threads 1 --repetitions 3 --calibration @/test.parquet --json found.json",
    )
    assert "wrong" not in out
    rows = json.loads(Path("found.json").read_text())["rows"]
    assert all(one["seconds"] is not None for one in rows)
    assert {one["engine"] + ":" + one["type"] for one in rows} == {
        *("compile:float32", "openvino:float32", "openvino:int8", "onnxruntime:int8", "torch:bfloat16")
    }


@pytest.mark.cluster
def test_a_benchmark_is_logged(run: Run) -> None:
    from mlflow import MlflowClient

    from orchestration.mlflow_server import start_server

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
        (found,) = client.search_runs([experiment.experiment_id])
        assert found.info.status == "FINISHED"
        steps = client.get_metric_history(found.info.run_id, "dense/onnxruntime-float32/milliseconds")
        assert [point.step for point in steps] == [1, 2]
        there = {one.path for one in client.list_artifacts(found.info.run_id)}
        assert there == {"benchmark.json", "figures"}
    finally:
        server.stop()


def test_places_of_one_processor_are_pinned() -> None:
    assert benchmark_options.BenchmarkOptions(("a",), threads=1).place == Place(1, "cpu")
