"""``espalier benchmark``: what it is asked for, checked before a model is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestration.benchmark.models import short_names
from orchestration.benchmark.options import BenchmarkOptions
from pruners.errors import InputError
from trainers import optional_imports
from trainers.config.engines import Choice
from trainers.engines import registry
from trainers.engines.registry import ENGINES, Placement


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
        ({"engines": "openvino:int8-float16"}, ("--engines", "bfloat16, int8, int8-bfloat16")),
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
def test_options__options_that_cannot_work(options: dict[str, Any], says: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as error:
        BenchmarkOptions(("model",), **options).check()
    assert not [part for part in says if part not in str(error.value)], str(error.value)


def test_options__what_is_asked_for_is_understood() -> None:
    options = BenchmarkOptions(
        ("a",), "torch:bfloat16, onnxruntime:int8,torch:bfloat16", batch="64,1,1", loss="2.5%", threads=1
    )
    assert options.choices == (Choice("torch", "bfloat16"), Choice("onnxruntime", "int8"))
    assert (options.batches, options.tolerated, options.hardware) == ((1, 64), 0.025, Placement(1))
    assert replace(options, loss="0.01").tolerated == 0.01
    usual = BenchmarkOptions(("a",)).choices
    assert [choice.engine for choice in usual] == [name for name in ENGINES if name != "2:4"]
    assert {choice.kind for choice in usual} == {"float32"}


def test_options__an_engine_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = optional_imports.find_spec
    monkeypatch.setattr(
        optional_imports, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name)
    )
    assert "onnxruntime" not in {choice.engine for choice in BenchmarkOptions(("a",)).choices}
    with pytest.raises(InputError, match=r"needs onnxruntime.*pip install 'espalier\[deploy\]'"):
        BenchmarkOptions(("a",), "onnxruntime").check()


def test_options__a_type_that_the_processor_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    class Core:
        def get_property(self, *_: str) -> list[str]:
            return ["FP32"]

    monkeypatch.setattr(registry, "openvino_core", Core)
    for kind in ("bfloat16", "int8-bfloat16"):
        with pytest.raises(InputError, match="this processor has no bfloat16"):
            BenchmarkOptions(("a",), f"openvino:{kind}", calibration="train.parquet").check()


def test_options__names_tell_models_apart() -> None:
    assert short_names(["/a/b/dense", "pruned"]) == ["dense", "pruned"]
    assert short_names(["/a/x/model", "s3://bucket/y/model"]) == ["x/model", "y/model"]
    assert short_names(["models:/espalier-a@champion"]) == ["espalier-a@champion"]
    with pytest.raises(InputError, match="same model twice"):
        short_names(["/a/b", "/a/b"])


def test_options__places_of_one_processor_are_pinned() -> None:
    assert BenchmarkOptions(("a",), threads=1).hardware == Placement(1, "cpu")
