"""Training for INT8: the very parameters of the model, zeros that hold, workers that agree, exact resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from image_tables import SWIN, VIT, images, tiny
from pydantic import ValidationError
from quantized import SIZE, pruned
from safetensors.torch import load_file
from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase
from training_runs import CPU, Log, make_files, make_job, same_files, train_as_worker
from workers import start_workers

from pruners.errors import InputError
from trainers.checkpoint.folder import RANGES, load_checkpoint, save_checkpoint
from trainers.config.jobs import TrainJob
from trainers.loop import gradual
from trainers.loop.gradual import run
from trainers.loop.session import Session
from trainers.quantization.fake_quant import Prepared

WAYS = ("calibrated", "aware")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Images, and a pruned model of each family in place of the dense one."""
    folder = tmp_path_factory.mktemp("files")
    result = make_files(folder)
    for name in (VIT, SWIN):
        model, arguments, masks = pruned(name)
        record = {"method": "dimap", "sparsity": masks.sparsity, "allocation": masks.pruned()}
        save_checkpoint(folder / name, model, model_args=arguments, masks=masks, record=record)
        result[name] = str(folder / name)
    return result


def aware_job(files: dict[str, str], training: dict[str, Any], architecture: str = VIT) -> TrainJob:
    """Four epochs of seven steps from a pruned model."""
    start = {"checkpoint": files[architecture], "classes": 3}
    return make_job(files, training, model=start, method="dimap", quantize={"images": 20})


@pytest.mark.parametrize("architecture", [VIT, SWIN])
@pytest.mark.parametrize("aware", [False, True], ids=WAYS)
def test_fake_quant__what_is_prepared_has_the_models_own_parameters(architecture: str, aware: bool) -> None:
    model, _, _ = pruned(architecture)
    model.train()
    prepared = Prepared(model, SIZE, aware=aware)
    ours = dict(prepared.traced.named_parameters())
    assert all(ours[name] is parameter for name, parameter in model.named_parameters())
    assert model.training


@pytest.mark.parametrize("architecture", [VIT, SWIN])
@pytest.mark.parametrize("aware", [False, True], ids=WAYS)
def test_fake_quant__int8_answers_are_close_at_every_batch_size(architecture: str, aware: bool) -> None:
    model, _, masks = pruned(architecture)
    batch = images(9)
    with torch.no_grad():
        expected = model(batch)
    prepared = Prepared(model, SIZE, aware=aware)
    prepared.calibrate(batch.split(4))
    converted = prepared.convert()
    assert set(masks) <= set(converted.weights.values())
    for count in (1, 2, 7, 9):
        with torch.no_grad():
            result = converted(batch[:count])
        assert (result - expected[:count]).abs().max() < 0.05 * expected.abs().max()


def test_fake_quant__evaluation_moves_no_range() -> None:
    model, _, _ = pruned(VIT)
    prepared = Prepared(model, SIZE, aware=True)
    prepared.calibrate([images(8)])
    before = prepared.ranges()
    prepared.eval()
    with torch.no_grad():
        prepared(100 * images(8))
    assert all(torch.equal(before[name], value) for name, value in prepared.ranges().items())
    prepared.train()
    prepared(100 * images(8))
    assert not torch.equal(before["head.input.max"], prepared.ranges()["head.input.max"])


def test_fake_quant__ranges_come_back() -> None:
    batch = images(8)
    answers, ranges = [], None
    for _ in range(2):
        model, _, _ = pruned(SWIN)
        prepared = Prepared(model, SIZE, aware=True)
        if ranges is None:
            prepared.calibrate(batch.split(3))
            ranges = prepared.ranges()
        else:
            prepared.set_ranges(ranges)
        with torch.no_grad():
            answers.append(prepared.eval()(batch))
    assert ranges is not None
    assert "layers.0.blocks.0.attn.qkv.weight.min" in ranges
    assert torch.equal(*answers)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """After every step pruned weights are zero, also as fake quantisation gives them to their layers."""
    seen: list[int] = []
    original = gradual.train_step

    def step(session: Session, batch: Any) -> None:
        assert session.masks is not None
        assert session.prepared is not None
        given: list[bool] = []
        hooks = [
            module.register_forward_hook(lambda _, taken, out: given.append(not out[taken[0] == 0].any()))
            for module in session.prepared.traced.modules()
            if isinstance(module, FakeQuantizeBase) and module.is_per_channel
        ]
        original(session, batch)
        for hook in hooks:
            hook.remove()
        assert given == [True] * len(hooks)
        assert len(hooks) >= len(session.masks)
        for name, mask in session.masks.items():
            assert not session.model.get_parameter(name)[~mask].any(), name
        seen.append(session.step)

    monkeypatch.setattr(gradual, "train_step", step)
    return seen


@pytest.mark.parametrize("architecture", [VIT, SWIN])
def test_fake_quant__zeros_hold_and_a_resumed_run_is_the_undisturbed_one(
    architecture: str, files: dict[str, str], tmp_path: Path, watched: list[int]
) -> None:
    job = aware_job(files, {"checkpoint_steps": 5, "distill": {"kind": "soft"}}, architecture)
    whole = Log(tmp_path / "whole")
    run(job, whole, CPU)
    assert watched == list(range(28))
    first, last = (load_file(whole.saved[step] / RANGES) for step in (5, 28))
    assert any(not torch.equal(first[name], last[name]) for name in first if ".input." in name)
    for at in (10, 25):
        rest = Log(tmp_path / f"rest-{at}")
        run(job, rest, CPU, resume=whole.saved[at])
        assert same_files(rest.last, whole.last) == []
        assert rest.metrics == whole.metrics[at // 7 :]


def test_fake_quant__what_is_saved_is_a_checkpoint_of_its_own(files: dict[str, str], tmp_path: Path) -> None:
    """Float weights with the parent's zeros, that timm loads, and ranges that its record knows."""
    log = Log(tmp_path)
    run(aware_job(files, {"epochs": 1}), log, CPU)
    loaded = load_checkpoint(str(log.last))
    parent = load_checkpoint(files[VIT])
    assert loaded.masks is not None
    assert parent.masks is not None
    assert loaded.masks.fingerprint() == parent.masks.fingerprint()
    assert loaded.record["method"] == "dimap"
    assert loaded.record["recipe"]["quantize"] == {"images": 20}
    assert RANGES in loaded.record["files"]
    (log.last / RANGES).write_bytes(b"")
    with pytest.raises(InputError, match=RANGES):
        load_checkpoint(str(log.last))


def test_fake_quant__training_for_int8_learns(files: dict[str, str], tmp_path: Path) -> None:
    log = Log(tmp_path)
    run(aware_job(files, {"epochs": 12, "lr": {"peak": 1e-2}}), log, CPU)
    assert log.metrics[-1]["val_top1"] > 0.6 > log.metrics[0]["val_top1"]


def test_fake_quant__workers_agree_and_resume_exactly(files: dict[str, str], tmp_path: Path) -> None:
    """Two workers see other images, and end with the same ranges; broken off, they end with the same bits."""
    job = aware_job(files, {"epochs": 2, "checkpoint_steps": 5}).model_dump(mode="json")
    start_workers(train_as_worker, (2, str(tmp_path), job), 2)
    logs = [json.loads((tmp_path / f"metrics-2-{rank}.json").read_text()) for rank in range(2)]
    assert logs[0] == logs[1]
    saved = [tmp_path / f"workers-2-{rank}" / "step-14" for rank in range(2)]
    assert same_files(*saved) == []
    (tmp_path / "meet-2").unlink(missing_ok=True)
    resume = str(tmp_path / "workers-2-0" / "step-10")
    start_workers(train_as_worker, (2, str(tmp_path / "again"), job, resume), 2)
    assert same_files(tmp_path / "again" / "workers-2-0" / "step-14", saved[0]) == []


def test_fake_quant__more_images_than_there_are(files: dict[str, str]) -> None:
    job = aware_job(files, {}).model_dump() | {"quantize": {"images": 51}}
    with pytest.raises(InputError, match=r"quantize\.images = 51.*there are 50 images"):
        run(TrainJob.model_validate(job), lambda progress: None, CPU)


@pytest.mark.parametrize(
    ("training", "says"),
    [
        ({"ema": 0.9}, r"training\.ema: an average"),
        ({"precision": "bfloat16"}, r"training\.precision: fake quantisation computes in float32"),
        ({"drop_path": 0.1}, r"training\.drop_path"),
        ({"compile": True}, r"training\.compile"),
    ],
)
def test_fake_quant__what_fake_quantization_does_not_know(
    training: dict[str, Any], says: str, files: dict[str, str]
) -> None:
    with pytest.raises(ValidationError, match=says):
        aware_job(files, training)


def test_fake_quant__it_does_not_prune(files: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="drop pruning"):
        make_job(files, {}, {}, quantize={})


def test_fake_quant__batch_norms_are_not_trained() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    with pytest.raises(InputError, match=r"has batch norms.*take static"):
        Prepared(model, SIZE, aware=True)


def test_fake_quant__without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.optional_imports.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs torchao.*pip install 'espalier\[deploy\]'"):
        Prepared(tiny()[0], SIZE, aware=True)
