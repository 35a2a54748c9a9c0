"""Every means of recovery: zeros hold exactly, and a run that was broken off ends bit for bit the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import timm
import torch
from image_tables import IMAGES, VIT_ARGS, table, write
from training_runs import CPU, Log, make_files, make_job, same_files

from pruners.errors import InputError
from pruners.model.masks import MaskSet
from trainers.checkpoint.folder import save_checkpoint
from trainers.loop import gradual
from trainers.loop.gradual import run
from trainers.loop.session import Session

MEANS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sgd with momentum": {
        "optimizer": "sgd",
        "optimizer_args": {"momentum": 0.9, "nesterov": True},
        "lr": {"peak": 0.05},
    },
    "lamb": {"optimizer": "lamb"},
    "weight decay, no clipping": {"weight_decay": 0.3, "clip_grad": None},
    "layer decay": {"layer_decay": 0.7},
    "accumulation": {"accumulate": 3},
    "average": {"ema": 0.9},
    "bfloat16": {"precision": "bfloat16"},
    "float16": {"precision": "float16"},
    "average, float16, accumulation": {"ema": 0.8, "precision": "float16", "accumulate": 2},
    "channels last": {"channels_last": True},
    "soft distillation": {"distill": {"kind": "soft", "temperature": 2.0}},
    "hard distillation": {"distill": {"kind": "hard", "weight": 0.3}},
    "moments forgotten": {"moments": "reset"},
    "frozen": {"freeze": ["patch_embed", "^pos_embed$"]},
    "drop path": {"drop_path": 0.3},
    "deit": {"preset": "deit", "label_smoothing": 0.1},
    "light2": {"preset": "light2"},
    "processes": {"data_workers": 1, "augment": {"shift": 1, "flip": 0.5}},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """After every optimizer step pruned weights are looked at, in the model and in its average."""
    seen: list[int] = []
    original = gradual.train_step

    def step(session: Session, batch: Any) -> None:
        original(session, batch)
        assert session.masks is not None
        for model in (session.model, session.shown):
            weights = dict(model.named_parameters())
            for name, mask in session.masks.items():
                assert not weights[name][~mask].any(), f"{name} came back in step {session.step}"
        seen.append(session.step)

    monkeypatch.setattr(gradual, "train_step", step)
    return seen


@pytest.mark.parametrize("means", MEANS)
def test_recovery__zeros_hold_and_a_resumed_run_is_the_undisturbed_one(
    means: str, files: dict[str, str], tmp_path: Path, watched: list[int]
) -> None:
    """Steps 0 … 27, 7 an epoch; checkpoints after 5, 10, …; broken off in the second and the last epoch."""
    job = make_job(files, {"checkpoint_steps": 5, **MEANS[means]}, {}, keep_folder=str(tmp_path / "kept"))
    whole = Log(tmp_path / "whole")
    run(job, whole, CPU)
    assert watched == list(range(28))
    assert sorted(whole.saved) == [5, 10, 15, 20, 25, 28]
    model = timm.create_model(f"local-dir:{whole.last}", pretrained=True)
    weights = dict(model.named_parameters())
    masks = MaskSet.load(whole.last / "masks.safetensors")
    assert abs(masks.sparsity - 0.7) < 1e-3
    assert all(not weights[name][~mask].any() for name, mask in masks.items())
    for at in (10, 25):
        rest = Log(tmp_path / f"rest-{at}")
        run(job, rest, CPU, resume=whole.saved[at])
        assert same_files(rest.last, whole.last) == []
        assert rest.metrics == whole.metrics[at // 7 :]


def test_recovery__the_average_is_what_is_shown(files: dict[str, str], tmp_path: Path) -> None:
    """Evaluated and saved; it begins anew at a pruning step, so that no weight of before is in it."""
    logs = {}
    for decay in (None, 1e-6, 0.99):
        logs[decay] = Log(tmp_path / str(decay))
        run(make_job(files, {"ema": decay}, {}), logs[decay], CPU)
    losses = {decay: [row["val_loss"] for row in log.metrics] for decay, log in logs.items()}
    assert losses[1e-6] == pytest.approx(losses[None], rel=1e-3)  # an average of the last step alone
    assert losses[0.99] != pytest.approx(losses[None], rel=1e-3)


def test_recovery__frozen_parameters_stay(files: dict[str, str], tmp_path: Path) -> None:
    log = Log(tmp_path)
    run(make_job(files, {"freeze": ["patch_embed"]}, {}), log, CPU)
    first, second = (
        timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict()
        for folder in (files["dense"], log.last)
    )
    same = {name for name in first if torch.equal(first[name], second[name])}
    assert same == {"patch_embed.proj.weight", "patch_embed.proj.bias"}


@pytest.mark.parametrize(
    ("training", "says"),
    [
        ({"freeze": ["nothing"]}, r"training\.freeze = 'nothing'.*matches no parameter"),
        ({"freeze": ["blocks.0"]}, r"training\.freeze = 'blocks\.0'.*is pruned and must be free"),
        ({"optimizer_args": {"bets": 1}}, r"training\.optimizer_args"),
        (
            {"distill": {"teacher": "vit_tiny_patch16_2"}},
            r"training\.distill\.teacher = 'vit_tiny_patch16_2'",
        ),
    ],
)
def test_recovery__what_cannot_be_used_is_named(
    training: dict[str, Any], says: str, files: dict[str, str]
) -> None:
    with pytest.raises(InputError, match=says):
        run(make_job(files, training, {}), lambda progress: None, CPU)


def test_recovery__a_teacher_with_other_classes(files: dict[str, str], tmp_path: Path) -> None:
    second = timm.create_model("vit_tiny_patch16_224", num_classes=5, **VIT_ARGS)
    save_checkpoint(tmp_path / "five", second, model_args=VIT_ARGS, masks=None, record={})
    with pytest.raises(InputError, match="has 5 classes, and the model 3"):
        run(make_job(files, {"distill": {"teacher": str(tmp_path / "five")}}, {}), lambda progress: None, CPU)


def test_recovery__dense_training_has_no_dense_teacher(files: dict[str, str]) -> None:
    with pytest.raises(InputError, match="name a teacher"):
        run(make_job(files, {"distill": {}}), lambda progress: None, CPU)


def test_recovery__distillation_teaches(files: dict[str, str], tmp_path: Path) -> None:
    """By hard lessons alone, the student ends with the teacher's answers, whatever the labels say."""
    teacher = Log(tmp_path / "teacher")
    run(make_job(files, {"epochs": 12, "lr": {"peak": 1e-2}}), teacher, CPU)
    assert teacher.metrics[-1]["val_top1"] > 0.6
    lesson = {"distill": {"teacher": str(teacher.last), "kind": "hard", "weight": 1.0}}
    taught = Log(tmp_path / "taught")
    run(make_job(files, {"epochs": 8, "lr": {"peak": 1e-2}, **lesson}, {}), taught, CPU)
    assert taught.metrics[-1]["val_top1"] > 0.6


def test_recovery__a_distilled_head(files: dict[str, str], tmp_path: Path) -> None:
    """DeiT's: trained with two outputs, evaluated with one."""
    arguments = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224",
        num_classes=3,
        pretrained_cfg_overlay={"input_size": (3, 16, 16), "crop_pct": 1.0},
        **arguments,
    )
    save_checkpoint(tmp_path / "deit", model, model_args=arguments, masks=None, record={})
    start = {"checkpoint": str(tmp_path / "deit"), "classes": 3}
    log = Log(tmp_path)
    run(make_job(files, {"distill": {"teacher": files["dense"]}}, {}, model=start), log, CPU)
    before, after = (
        model.state_dict(),
        timm.create_model(f"local-dir:{log.last}", pretrained=True).state_dict(),
    )
    assert not torch.equal(before["head_dist.weight"], after["head_dist.weight"])
    assert len(log.metrics) == 4


def test_recovery__accumulation_is_the_same_step(files: dict[str, str], tmp_path: Path) -> None:
    logs = [Log(tmp_path / str(parts)) for parts in (1, 4)]
    for log, parts in zip(logs, (1, 4), strict=True):
        run(make_job(files, {"accumulate": parts}), log, CPU)
    first, second = (torch.tensor([loss for row in log.metrics for loss in row["step_loss"]]) for log in logs)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_recovery__constant_holds_the_zeros_of_a_checkpoint(files: dict[str, str], tmp_path: Path) -> None:
    pruned = Log(tmp_path / "pruned")
    run(make_job(files, {}, {}), pruned, CPU)
    start = {"checkpoint": str(pruned.last), "classes": 3}
    held = Log(tmp_path / "held")
    constant = {"schedule": {"kind": "constant"}}
    run(make_job(files, {}, constant, model=start), held, CPU)
    first, second = (MaskSet.load(folder / "masks.safetensors") for folder in (pruned.last, held.last))
    assert first.fingerprint() == second.fingerprint()
    assert [row["score"] > 0 for row in held.metrics] == [True] * 4
    with pytest.raises(InputError, match=r"which is 0\.7"):
        run(make_job(files, {}, {**constant, "sparsity": 0.6}, model=start), held, CPU)


def test_recovery__steps_within_epochs(files: dict[str, str], tmp_path: Path) -> None:
    """Sparsity rises in the middle of epochs, and the rate jumps there."""
    points = {"kind": "points", "points": {3: 0.5, 10: 0.7}, "unit": "steps"}
    log = Log(tmp_path)
    run(make_job(files, {"lr": {"kind": "cyclic", "peak": 1e-3}}, {"schedule": points}), log, CPU)
    assert [round(row["sparsity"], 3) for row in log.metrics] == [0.5, 0.7, 0.7, 0.7]
    rates = [rate for row in log.metrics for rate in row["step_lr"]]
    peaks = [step for step in range(28) if rates[step] == pytest.approx(1e-3)]
    assert peaks == [0, 3, 10]


def test_recovery__every_sparsity_that_is_kept(files: dict[str, str], tmp_path: Path) -> None:
    schedule = {"kind": "points", "points": {0: 0.3, 1: 0.5, 2: 0.6, 3: 0.7}}
    pruning = {"schedule": schedule, "keep": [0.5, 0.6]}
    log = Log(tmp_path / "run")
    run(make_job(files, {"epochs": 6}, pruning, keep_folder=str(tmp_path / "kept")), log, CPU)
    kept = {path.name: path for path in (tmp_path / "kept").iterdir()}
    assert set(kept) == {"0.5", "0.6", "0.7"} == set(log.metrics[-1]["kept"])
    for name, folder in kept.items():
        figures = log.metrics[-1]["kept"][name]
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        masks = MaskSet.load(folder / "masks.safetensors")
        assert masks.sparsity == pytest.approx(float(name), abs=1e-3) == figures["sparsity"]
        assert all(not model.get_parameter(layer)[~mask].any() for layer, mask in masks.items())
        assert not (folder / "trainer.json").exists()
    best = max(log.metrics[3:], key=lambda row: row["score"])
    assert log.metrics[-1]["kept"]["0.7"]["epoch"] == best["epoch"]
    row = log.metrics[-1]["kept"]["0.7"]
    assert {key: row[key] for key in ("val_top1", "val_loss")} == {
        key: best[key] for key in ("val_top1", "val_loss")
    }


def faulty(files: dict[str, str], folder: Path) -> dict[str, str]:
    """Training images of which two cannot be decoded."""
    content = table([i % 3 for i in range(50)]).to_pydict()
    for row in (7, 20):
        content["image"][row] = {"bytes": b"no image", "path": "x"}
    broken = pa.table({"image": pa.array(content["image"], IMAGES), "label": content["label"]})
    return {"train": write(folder / "faulty.parquet", broken), "validation": files["validation"]}


def test_recovery__images_that_cannot_be_read_end_the_run(files: dict[str, str], tmp_path: Path) -> None:
    job = make_job(files, {}, data=faulty(files, tmp_path))
    with pytest.raises(InputError, match=r"faulty\.parquet, row (7|20) cannot be decoded"):
        run(job, lambda progress: None, CPU)


def test_recovery__or_are_skipped_and_counted(files: dict[str, str], tmp_path: Path) -> None:
    data = {**faulty(files, tmp_path), "bad_images": "skip"}
    log = Log(tmp_path)
    run(make_job(files, {}, data=data), log, CPU)
    assert [row["skipped_images"] for row in log.metrics] == [2, 4, 6, 8]  # two in each epoch
    with pytest.raises(InputError, match=r"data\.bad_limit = 5.*6 images of training"):
        run(make_job(files, {}, data={**data, "bad_limit": 5}), lambda progress: None, CPU)
