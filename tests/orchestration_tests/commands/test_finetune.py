"""``espalier finetune`` on tiny models: zeros, classifier, interruptions, mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import timm
import torch
from commands import Run, espalier, good
from filelock import FileLock
from image_tables import SWIN, VIT, dense_folder, table, tiny, write
from safetensors.torch import load_file
from torch import nn
from training_runs import same_files

from orchestration.commands import finetune, model_source
from orchestration.commands import progress as progress_module
from pruners import prune
from trainers.checkpoint.folder import (
    load_checkpoint,
    open_verified,
    pack_folder,
    save_checkpoint,
    weights_hash,
)
from trainers.loop import gradual
from trainers.loop.session import Session

FIVE = [i % 5 for i in range(40)]
FAST = "epochs=3 batch_size=8 lr.peak=5e-3"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sparse models of three classes and images of five."""
    folder = tmp_path_factory.mktemp("files")
    sparse(folder / "vit", VIT)
    sparse(folder / "swin", SWIN, "2:4")
    dense_folder(folder / "dense")
    (folder / "small").mkdir()
    with open_verified(str(folder / "vit")) as (source_folder, record):
        pack_folder(source_folder, folder / "small", record)
    write(folder / "train.parquet", table(FIVE))
    write(folder / "validation.parquet", table(FIVE[:15], first=100))
    write(folder / "three.parquet", table([label % 3 for label in FIVE]))
    write(folder / "imageless.parquet", table(FIVE).drop_columns("image"))
    (folder / "full").mkdir()
    (folder / "full/thing.txt").write_text("mine")
    return folder


def sparse(folder: Path, architecture: str, pattern: str = "unstructured", seed: int = 0) -> None:
    model, arguments = tiny(architecture, seed=seed)
    report = prune(model, "dimap", 0.75 if pattern == "unstructured" else None, pattern=pattern)
    record = {"method": "dimap", "sparsity": report.sparsity, "allocation": report.allocation}
    save_checkpoint(folder, model, model_args=arguments, masks=report.masks, record=record)


def plain(folder: str | Path) -> nn.Module:
    model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return model


def pruned_layers(folder: str | Path) -> dict[str, torch.Tensor]:
    """Which weights of the pruned layers are exactly zero in what plain timm loads."""
    weights = dict(plain(folder).named_parameters())
    masks = load_checkpoint(str(folder)).masks
    assert masks is not None
    return {name: weights[name].detach() == 0 for name in masks}


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_finetune__zeros_stay_and_the_classifier_is_new(
    name: str, run: Run, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros = pruned_layers(files / name)
    steps = []

    def observed(session: Session, batch: object) -> None:
        step(session, batch)  # type: ignore[arg-type]
        weights = dict(session.model.named_parameters())
        assert all((weights[key].detach()[zero] == 0).all() for key, zero in zeros.items())
        steps.append(session.step)

    step = gradual.train_step
    monkeypatch.setattr(gradual, "train_step", observed)
    data = "--train @/train.parquet --validation @/validation.parquet --classes 5"
    out = good(run, f"finetune @/{name} {data} --out result {FAST}")
    assert steps == list(range(15))
    layers = pruned_layers("result")
    assert layers.keys() == zeros.keys()
    assert all(torch.equal(layers[key], zero) for key, zero in zeros.items())
    model = plain("result")
    assert model.num_classes == 5
    assert model(torch.randn(1, 3, 16, 16)).shape == (1, 5)
    before, after = (load_file(folder / "model.safetensors") for folder in (files / name, Path("result")))
    changed = {key for key, tensor in after.items() if not torch.equal(tensor, before.get(key, tensor[:0]))}
    assert set(zeros) <= changed
    parent, record = (
        json.loads((folder / "pruning.json").read_text()) for folder in (files / name, Path("result"))
    )
    assert record["parent"] == {"source": name, "weights": parent["files"]["model.safetensors"]}
    assert record["method"] == "dimap"
    assert record["allocation"] == parent["allocation"]
    assert record["sparsity"] == parent["sparsity"]
    assert str(Path().absolute()) not in json.dumps(record)
    figures = record["figures"]
    assert f"{100 * figures['val_top1']:.2f} % on validation, after epoch {figures['epoch']}" in out
    assert "3 → 5 classes, with a new classifier" in out
    assert [path.name for path in Path().iterdir()] == ["result"]
    assert good(run, "evaluate result --data @/validation.parquet").splitlines()[1].split()[1] in out


def test_finetune__the_classifier_stays_where_the_classes_do(run: Run, files: Path) -> None:
    good(run, f"finetune @/vit --train @/three.parquet --out result {FAST} 'freeze=[^head]' epochs=1")
    before, after = (
        plain(files / "vit").get_parameter("head.weight"),
        plain("result").get_parameter("head.weight"),
    )
    assert torch.equal(before, after)


def test_finetune__the_classifier_alone_is_trained(run: Run, files: Path) -> None:
    frozen = "\"freeze=['^(?!head)']\""
    good(run, f"finetune @/swin --train @/train.parquet --classes 5 --out result {FAST} {frozen}")
    before, after = (load_file(folder / "model.safetensors") for folder in (files / "swin", Path("result")))
    assert {key for key in after if not torch.equal(after[key], before[key])} == {
        "head.fc.weight",
        "head.fc.bias",
    }


def test_finetune__the_form_of_the_checkpoint_changes_nothing(
    run: Run, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compressed, by a URI, or from a hub (there without a record)."""
    monkeypatch.setattr(model_source.factory, "load_hub", lambda name: tiny()[0])
    rest = f"--train @/train.parquet --classes 5 {FAST} epochs=1"
    for number, name in enumerate(("@/vit", "@/small", f"file://{files}/vit")):
        good(run, f"finetune {name} {rest} --out out-{number}")
    first, second, third = (Path(f"out-{number}/model.safetensors").read_bytes() for number in range(3))
    assert first == second == third
    parents = [json.loads(Path(f"out-{n}/pruning.json").read_text())["parent"]["weights"] for n in range(3)]
    assert set(parents) == {weights_hash(str(files / "vit"))}
    good(run, f"finetune hf-hub:me/tiny {rest} --out hub")
    record = json.loads(Path("hub/pruning.json").read_text())
    assert record["parent"] == {"source": "hf-hub:me/tiny"}
    assert record["sparsity"] == 0
    assert not Path("hub/masks.safetensors").exists()


def test_finetune__the_seed_draws_the_classifier(run: Run) -> None:
    rest = f"--train @/train.parquet --classes 5 {FAST} 'freeze=[^head]' epochs=1"
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        good(run, f"finetune @/vit {rest} --seed {seed} --out {name}")
    heads = [load_file(f"{name}/model.safetensors")["head.weight"] for name in "abc"]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


# interruptions


@pytest.fixture
def stops_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """After so many epochs the command is interrupted, as by Ctrl-C; ``None``: never."""
    report = finetune._Report.__call__

    def leave(status: int) -> NoReturn:
        raise SystemExit(status)

    monkeypatch.setattr(progress_module, "leave", leave)

    def install(epochs: int | None) -> None:
        def stopping(self: finetune._Report, progress: gradual.Progress) -> None:
            report(self, progress)
            if progress.metrics.get("epoch") == epochs:
                raise KeyboardInterrupt

        monkeypatch.setattr(finetune._Report, "__call__", stopping)

    return install


RESUMED = f"finetune @/vit --train @/train.parquet --classes 5 {FAST} ema=0.9"


def test_finetune__the_same_command_goes_on(run: Run, stops_after: Callable[[int | None], None]) -> None:
    good(run, f"{RESUMED} --out whole")
    stops_after(2)
    status, out, error = run(f"{RESUMED} --out result")
    assert (status, out) == (130, "")
    assert "what was trained is kept" in error
    assert {path.name for path in Path().iterdir()} == {"whole", ".result.finetune"}
    stops_after(None)
    status, _, error = run(f"{RESUMED} --out result")
    assert status == 0, error
    assert "going on where it was interrupted" in error
    assert "epoch 2 of 3" not in error
    assert same_files(Path("whole"), Path("result")) == []
    assert {path.name for path in Path().iterdir()} == {"whole", "result"}


def test_finetune__what_was_interrupted_is_of_one_command(
    run: Run, files: Path, stops_after: Callable[[int | None], None], tmp_path: Path
) -> None:
    """Another parent, other images or other settings do not go on from it."""
    sparse(tmp_path / "other", VIT, seed=3)
    stops_after(1)
    assert run(f"{RESUMED} --out result")[0] == 130
    stops_after(None)
    kept = sorted(path for path in Path(".result.finetune").rglob("*"))
    for text, says in (
        (RESUMED.replace("@/vit", "other"), "its checkpoint or its images differ"),
        (RESUMED.replace("train.parquet", "validation.parquet"), "its checkpoint or its images differ"),
        (f"{RESUMED} ema=0.8", "training.ema 0.9 there and 0.8 here"),
        (f"{RESUMED} --seed 2", "seed 0 there and 2 here"),
    ):
        status, out, error = run(f"{text} --out result")
        assert (status, out) == (2, ""), error
        last = error.splitlines()[-1]
        assert last.startswith("espalier: --out = 'result': ")
        assert says in last
        assert "delete it to start anew" in last
        assert sorted(path for path in Path(".result.finetune").rglob("*")) == kept


def test_finetune__one_at_a_time(run: Run) -> None:
    Path(".result.finetune").mkdir()
    with FileLock(".result.finetune/lock"):
        status, _, error = run(f"{RESUMED} --out result")
    assert (status, error) == (2, "espalier: --out = 'result': another finetune to it is at work\n")


def test_finetune__ctrl_c_by_hand(files: Path, tmp_path: Path) -> None:
    arguments = f"finetune {files}/vit --train {files}/three.parquet --out result epochs=100000 batch_size=8"
    with espalier(*arguments.split(), cwd=tmp_path) as command:
        command.until("epoch 2 of", 240.0)
        status, seconds = command.interrupt()
    assert (status, command.err.splitlines()[-1]) == (130, "interrupted")
    assert "the same command goes on" in command.err
    assert seconds < 10
    assert not (tmp_path / "result").exists()
    assert (tmp_path / ".result.finetune/last/trainer.json").is_file() or (
        tmp_path / ".result.finetune/next"
    ).is_dir()


# mistakes

GOOD = "finetune @/vit --train @/train.parquet --classes 5"
BAD: dict[str, tuple[str, ...]] = {
    "finetune @/none --train @/train.parquet": ("model", "/none", "no such folder"),
    "finetune @/full --train @/train.parquet": ("model", "/full", "config.json is missing"),
    "finetune vit_tinny_patch16_224 --train @/train.parquet": ("model", "mean 'vit_tiny_patch16_224'?"),
    "finetune models:/a@b --train @/train.parquet": ("--storage", "'runs'", "no sweep has been logged"),
    "finetune @/vit --train @/train.parquet": ("--train", "train.parquet", "label 4", "0…2"),
    "finetune @/vit --train @/train.parquet --classes 4": ("--train", "label 4", "0…3"),
    "finetune @/vit --train @/train.parquet --classes 0": ("--classes", "0"),
    "finetune @/vit --train @/imageless.parquet --classes 5": ("--train", "imageless.parquet", "'image'"),
    "finetune @/vit --train @/none.parquet --classes 5": ("--train", "none.parquet", "no such file"),
    f"{GOOD} --validation @/imageless.parquet": ("--validation", "imageless.parquet", "'image'"),
    "finetune @/vit --train @/three.parquet --validation @/train.parquet": ("--validation", "label 4", "0…2"),
    f"{GOOD} --device tpu": ("--device", "'tpu'", "cpu, cuda"),
    f"{GOOD} --layers QKV": ("--layers", "'QKV'", "MODULE=REGEX"),
    f"{GOOD} epochs": ("override", "'epochs'", "key.sub=value"),
    f"{GOOD} epochs=many": ("epochs", "'many'", "valid integer"),
    f"{GOOD} epoch=1": ("epoch", "1", "unknown key", "did you mean 'epochs'?"),
    f"{GOOD} lr.peek=1": ("lr.peek", "did you mean 'peak'?"),
    f"{GOOD} lr.floor=1": ("lr.floor", "1", "must not lie above peak"),
    f"{GOOD} optimizer=adamv": ("optimizer", "'adamv'", "did you mean 'adam"),
    f"{GOOD} augment.rand_augment=rond": ("augment.rand_augment", "'rond'", "rand-m9-mstd0.5-inc1"),
    f"{GOOD} distill={{}}": ("distill.teacher", "'dense'", "other classes"),
    # found when the training is opened: the line stands alone all the same
    f"{GOOD} freeze=[nothing]": ("freeze", "'nothing'", "matches no parameter"),
    f"{GOOD} --out @/full": ("--out", "/full", "not empty"),
    f"{GOOD} --out s3://a/b": ("--out", "folder of this machine"),
}  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_finetune__bad_input_is_one_line_and_leaves_nothing(text: str, run: Run, files: Path) -> None:
    entries = set(files.rglob("*"))
    status, out, error = run(text if "--out" in text else f"{text} --out a/b")
    assert (status, out, len(error.splitlines())) == (2, "", 1), error
    missing = [part for part in BAD[text] if part not in error]
    assert not missing, f"{missing} not in: {error}"
    assert list(Path().iterdir()) == []
    assert set(files.rglob("*")) == entries


def test_finetune__a_loss_that_is_not_finite(run: Run) -> None:
    status, _, error = run(f"{GOOD} {FAST} lr.peak=1000 clip_grad=null --out a/b")
    assert status == 2
    last = error.splitlines()[-1]
    assert last.startswith("espalier: training: the loss is ")
    assert "of epoch 0" in last
    assert list(Path().iterdir()) == []
