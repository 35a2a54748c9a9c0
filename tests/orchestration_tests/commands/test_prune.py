"""``espalier prune`` and ``espalier inspect`` by the real command line, on tiny models."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import timm
import torch
from commands import Run, espalier, good
from image_tables import SWIN, VIT, dense_folder, table, tiny, write
from rich.console import Console
from safetensors.torch import load_file, save_file
from timm.models import _hub
from torch import nn

from orchestration.commands import model_source, prune
from orchestration.commands.output import whole_folder
from orchestration.commands.progress import Bars
from orchestration.commands.prune_options import PruneOptions
from pruners.methods.registry import METHODS
from pruners.model.layers import find_layers

WEIGHTS = 6144  # prunable ones of the tiny ViT


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and images, good and bad."""
    folder = tmp_path_factory.mktemp("files")
    dense_folder(folder / "vit")
    dense_folder(folder / "swin", SWIN)
    for name in ("train", "test"):
        write(folder / f"{name}.parquet", table([0, 1, 2, 0, 1, 2, 0, 1], first=len(name)))
    _bad_images(folder)
    _bad_models(folder)
    (folder / "full").mkdir()
    (folder / "full/thing.txt").write_text("mine")
    (folder / "empty").mkdir()
    return folder


def _bad_images(folder: Path) -> None:
    write(folder / "ten.parquet", table(list(range(10))))
    good = table([0, 1, 2])
    cells = good["image"].to_pylist()
    cells[1:] = [{"bytes": b"no image", "path": None}] * 2
    broken = pa.array(cells, good["image"].type)
    write(folder / "broken.parquet", good.set_column(0, "image", broken))
    (folder / "words.parquet").write_text("no Parquet")


def _bad_models(folder: Path) -> None:
    for name, parameter in (("nan", "blocks.0.mlp.fc1.weight"), ("nan_bias", "blocks.0.mlp.fc1.bias")):
        _edited(folder, name, lambda weights, key=parameter: weights[key].view(-1)[:1].fill_(torch.nan))
    _edited(folder, "sparse", lambda weights: [w.zero_() for n, w in weights.items() if "mlp.fc1.w" in n])
    _edited(folder, "truncated", lambda weights: None)
    whole = (folder / "truncated/model.safetensors").read_bytes()
    (folder / "truncated/model.safetensors").write_bytes(whole[: len(whole) // 2])
    _edited(folder, "weightless", lambda weights: None)
    (folder / "weightless/model.safetensors").unlink()


def _edited(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    shutil.copytree(folder / "vit", folder / name)
    (folder / name / "pruning.json").unlink()
    file = folder / name / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def pruned(folder: str) -> tuple[nn.Module, dict[str, torch.Tensor], dict[str, Any]]:
    """What plain timm loads, the zeros of its prunable layers, and the record."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    weights = dict(model.named_parameters())
    zeros = {layer.name: weights[layer.name].detach() == 0 for layer in find_layers(model)}
    return model, zeros, json.loads((Path(folder) / "pruning.json").read_text())


def count(zeros: dict[str, torch.Tensor]) -> int:
    return sum(int(mask.sum()) for mask in zeros.values())


def test_prune__dimap_needs_no_data(run: Run, files: Path) -> None:
    out = good(run, "prune @/vit --method dimap --sparsity 0.5 --out pruned")
    model, zeros, record = pruned("pruned")
    assert count(zeros) == WEIGHTS // 2
    assert torch.isfinite(model(torch.randn(1, 3, 16, 16))).all()
    assert record["method"] == "dimap"
    assert record["sparsity"] == 0.5
    assert record["allocation"] == {name: int(mask.sum()) for name, mask in zeros.items()}
    assert record["source"] == "vit"
    assert record["options"]["sparsity"] == 0.5
    parameters = sum(weight.numel() for weight in model.parameters())
    assert record["costs"]["parameters_sparse"] == parameters - WEIGHTS // 2
    for text in (
        "3,072 of 6,144 weights",
        "50.00 % (QKV 50.00 %, PRJ 50.00 %, MLP 50.00 %)",
        f"{parameters:,} → {parameters - 3072:,} non-zero",
        "8 (2 QKV, 2 PRJ, 4 MLP)",
        f"timm.create_model('local-dir:{Path('pruned').absolute()}', pretrained=True)",
    ):
        assert text in out
    assert [path.name for path in Path().iterdir()] == ["pruned"]
    assert good(run, "evaluate pruned --data @/test.parquet").startswith("images    8")


def test_prune__what_stays_dense_is_said(run: Run) -> None:
    """Which share, and by patterns that --layers takes: once they are given, they are no longer dense."""
    parameters = sum(weight.numel() for weight in tiny()[0].parameters())
    command = "prune @/vit --method magnitude --sparsity 0.5"
    lines = good(run, f"{command} --out usual").splitlines()
    share = f"{100 * (parameters - WEIGHTS) / parameters:.1f} % of the parameters"
    kinds = r"patch_embed\.proj (1 layer, 3,072 weights), head (1 layer, 48 weights)"
    assert f"left dense  {share}: {kinds} (--layers MODULE=REGEX takes others)" in lines
    patterns = r"--layers 'ALL=patch_embed\.proj' --layers 'ALL=head' --layers 'ALL=blocks.*'"
    out = good(run, f"{command} {patterns} --out all")
    rest = 100 * (parameters - WEIGHTS - 3072 - 48) / parameters
    assert f"left dense  {rest:.1f} % of the parameters: biases, norms, tables (" in out
    assert "4,632 of 9,264 weights" in out


def test_prune__long_work_begins_with_what_stays_dense(files: Path, tmp_path: Path) -> None:
    options = PruneOptions(str(files / "vit"), str(tmp_path / "out"), method="magnitude", sparsity=0.5)
    assert prune.PruneJob.of(options)._plan().startswith("left dense: 37.5 % of the parameters: patch_embed")


OVIT = "prune @/vit --gradients 4 --batch-size 4 --data @/train.parquet --sparsity 0.75"


def test_prune__ovit_is_exact_and_repeats_itself(run: Run) -> None:
    out = good(run, f"{OVIT} --test @/test.parquet --out first")
    _, zeros, record = pruned("first")
    assert count(zeros) == 3 * WEIGHTS // 4
    assert (record["options"]["gradients"], record["options"]["damp"], record["seed"]) == (4, 1e-8, 0)
    assert "ovit, 4 gradients of 4 images each" in out
    assert "on 8 images of" in out
    assert f"→ {100 * record['figures']['test_top1']:.2f} %" in out
    good(run, f"{OVIT} --out again")
    good(run, f"{OVIT} --seed 1 --out other")
    weights = [Path(name, "model.safetensors").read_bytes() for name in ("first", "again", "other")]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize("method", ["ovit --gradients 4", "lamp"])
def test_prune__rounds_and_reconstruction_are_remembered(method: str, run: Run) -> None:
    typed = f"prune @/vit --method {method} --batch-size 4 --data @/train.parquet --sparsity 0.75"
    out = good(run, f"{typed} --rounds 0.5,0.75 --reconstruct 6 --out both")
    _, zeros, record = pruned("both")
    assert count(zeros) == 3 * WEIGHTS // 4
    assert record["rounds"] == [0.5, 0.75]
    assert record["reconstruction"]["images"] == 6
    errors = record["reconstruction"]["errors"]
    assert set(errors) == set(zeros)
    assert all(error["after"] <= error["before"] for error in errors.values())
    assert "rounds      50 %, 75 %" in out
    assert "reconstruct 8 layers on 6 images, mean squared error" in out
    good(run, f"{typed} --out neither")
    weights = [Path(name, "model.safetensors").read_bytes() for name in ("both", "neither")]
    assert weights[0] != weights[1]


def test_prune__less_memory_changes_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part of the Fisher takes the gradients anew, from the same images."""
    taken = []
    again = prune._Again.__iter__
    monkeypatch.setattr(prune._Again, "__iter__", lambda self: taken.append(1) or again(self))
    good(run, f"{OVIT} --per-sample --out whole")
    assert len(taken) == 1
    good(run, f"{OVIT} --per-sample --memory 1400KB --out parts")
    assert len(taken) > 2
    whole, parts = (load_file(f"{name}/model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(weight, parts[name]) for name, weight in whole.items())


def test_prune__two_of_four_brings_its_own_sparsity(run: Run) -> None:
    good(run, "prune @/swin --method magnitude --pattern 2:4 --out pruned")
    _, zeros, _ = pruned("pruned")
    for mask in zeros.values():
        assert (mask.reshape(-1, 4).sum(1) == 2).all()
    out = good(run, "inspect pruned")
    assert "50.00 %" in out
    assert "2:4 and 4:8 in all layers" in out


def test_prune__what_the_pattern_does_not_fit_is_left_dense(run: Run) -> None:
    good(run, "prune @/vit --method dimap --pattern 1x32 --unfit dense --sparsity 0.5 --out pruned")
    _, zeros, _ = pruned("pruned")
    assert {name for name, mask in zeros.items() if mask.any()} == {
        f"blocks.{i}.mlp.fc2.weight" for i in (0, 1)
    }
    inspected = json.loads(good(run, "inspect pruned --json"))
    assert inspected["layers_left_dense"] == 6
    assert inspected["prunable"] == {"weights": 2048, "zeros": 1024, "sparsity": 0.5}


def test_prune__auto_says_which_damp_and_why(run: Run) -> None:
    out = good(run, f"{OVIT} --damp auto --out pruned")
    damp = pruned("pruned")[2]["damp"]
    losses = damp["held_out_losses"]
    assert len(losses) == 6
    assert losses[f"{damp['chosen']:g}"] == min(loss for loss in losses.values() if loss is not None)
    assert f"{damp['chosen']:g}, by the lowest held-out loss after one shot (0.0001: " in out


def test_prune__layers_by_patterns_are_remembered(run: Run) -> None:
    good(
        run, r"prune @/vit --method dimap --sparsity 0.5 --layers 'F=mlp\.fc1' --layers 'F=qkv' --out pruned"
    )
    _, zeros, _ = pruned("pruned")
    assert {name.split(".", 2)[2] for name, mask in zeros.items() if mask.any()} <= {
        "mlp.fc1.weight",
        "attn.qkv.weight",
    }
    assert count(zeros) == 2 * (1024 + 768) // 2
    assert set(json.loads(good(run, "inspect pruned --json"))["modules"]) == {"F"}
    assert set(json.loads(good(run, r"inspect pruned --layers 'G=mlp\.fc1' --json"))["modules"]) == {"G"}


def test_prune__floor_and_ceiling_hold(run: Run) -> None:
    good(run, "prune @/vit --method magnitude_global --sparsity 0.5 --floor 0.45 --ceiling 0.55 --out pruned")
    inspected = json.loads(good(run, "inspect pruned --json"))
    assert all(0.45 <= layer["sparsity"] <= 0.55 for layer in inspected["layers"])
    assert inspected["prunable"]["sparsity"] == 0.5


def test_prune__a_pruned_model_is_pruned_further(run: Run) -> None:
    good(run, "prune @/vit --method dimap --sparsity 0.5 --out half")
    good(run, "prune half --method magnitude --sparsity 0.75 --out empty/more")
    _, old, _ = pruned("half")
    _, new, _ = pruned("empty/more")
    assert count(new) == 3 * WEIGHTS // 4
    assert all((new[name] | ~mask).all() for name, mask in old.items())


def test_prune__models_of_elsewhere(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A timm folder that espalier did not write, and one of a hub: timm knows how it was built."""
    model, arguments = tiny()
    _hub.save_for_hf(model, "foreign", model_args=arguments, safe_serialization=True)
    monkeypatch.setattr(model_source.factory, "load_hub", lambda name: tiny()[0])
    for name in ("foreign", "hf-hub:me/tiny", VIT):
        good(run, f"prune {name} --method lamp --sparsity 0.5 --out out-{len(name)}")
        _, zeros, record = pruned(f"out-{len(name)}")
        assert count(zeros) == WEIGHTS // 2
        assert record["source"] == name
    assert "none of 2:4, 4:8, 1x4" in good(run, "inspect hf-hub:me/tiny")


def test_prune__an_empty_folder_may_be_there(run: Run) -> None:
    Path("there").mkdir()
    Path("link").symlink_to("there")
    good(run, "prune @/vit --method dimap --sparsity 0.5 --out link")
    assert count(pruned("there")[1]) == WEIGHTS // 2
    assert sorted(path.name for path in Path().iterdir()) == ["link", "there"]


def test_prune__inspect_as_text_and_as_json(run: Run) -> None:
    good(run, "prune @/vit --method dimap --sparsity 0.5 --pattern 1x4 --out pruned")
    _, zeros, record = pruned("pruned")
    inspected = json.loads(good(run, "inspect pruned --json"))
    assert [layer["name"] for layer in inspected["layers"]] == list(zeros)
    assert [layer["zeros"] for layer in inspected["layers"]] == [int(mask.sum()) for mask in zeros.values()]
    assert inspected["layers"][0] == {
        "name": "blocks.0.attn.qkv.weight",
        "module": "QKV",
        "stage": 0,
        "shape": [48, 16],
        "weights": 768,
        "zeros": record["allocation"]["blocks.0.attn.qkv.weight"],
        "sparsity": record["allocation"]["blocks.0.attn.qkv.weight"] / 768,
    }
    costs = record["costs"]
    assert inspected["parameters"] == {"dense": costs["parameters"], "non_zero": costs["parameters_sparse"]}
    assert inspected["macs"] == {"dense": costs["macs"], "sparse": costs["macs_sparse"]}
    assert inspected["whole_model_sparsity"] == count(zeros) / costs["parameters"]
    assert inspected["modules"]["MLP"]["zeros"] == sum(int(z.sum()) for n, z in zeros.items() if "mlp" in n)
    assert inspected["stages"]["1"]["zeros"] == sum(int(z.sum()) for n, z in zeros.items() if "blocks.1" in n)
    assert inspected["patterns"] == {"2:4": False, "4:8": False, "1x4": True}
    dense = inspected["left_dense"]
    assert dense["parameters"] == costs["parameters"] - count({n: ~z for n, z in zeros.items()}) - count(
        zeros
    )
    assert dense["kinds"][0] == {"pattern": r"patch_embed\.proj", "layers": 1, "weights": 3 * 8 * 8 * 16}
    text = good(run, "inspect pruned")
    for part in (
        "blocks.0.attn.qkv.weight  │ QKV    │     0 │ 48×16 │     768 │",
        "6,144 weights in 8 layers",
        r"patch_embed\.proj (1 layer, 3,072 weights)",
        "50.00 % (3,072 zeros)",
        "1x4 in all layers",
        f"{costs['macs']:,} → {costs['macs_sparse']:,}",
        "QKV: 50.00 %, PRJ: 50.00 %, MLP: 50.00 %",
    ):
        assert part in text


def test_prune__inspect_of_an_architecture_has_shapes_and_no_zeros(run: Run) -> None:
    inspected = json.loads(good(run, "inspect deit_small_patch16_224 --json"))
    assert inspected["prunable"] == {"weights": 12 * 1769472, "zeros": None, "sparsity": None}
    assert inspected["parameters"] == {"dense": 22050664, "non_zero": None}
    assert inspected["macs"]["dense"] == 4_598_882_304
    text = good(run, "inspect deit_small_patch16_224")
    assert "22,050,664" in text
    assert "21,233,664 weights in 48 layers" in text


def test_prune__ctrl_c_leaves_nothing(files: Path, tmp_path: Path) -> None:
    arguments = (
        f"prune {files}/vit --data {files}/train.parquet --sparsity 0.5 --gradients 1000000 --out pruned"
    )
    with espalier(*arguments.split(), cwd=tmp_path) as command:
        command.until("1,000,000 gradients", 120.0)
        status, seconds = command.interrupt()
    assert (status, command.err.splitlines()[-1]) == (130, "interrupted")
    assert seconds < 10
    assert {path.suffix for path in tmp_path.iterdir()} == {".out", ".err"}  # its own output


def test_prune__a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    target = tmp_path / "new/deeper/folder"

    def write_and_stop() -> None:
        with whole_folder(target, "new", "--out") as partial:
            (partial / "half").write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_stop()
    assert list(tmp_path.iterdir()) == []


def test_prune__a_disk_that_is_full(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(folder: Path, *rest: object, **more: object) -> None:
        (folder / "half").write_text("")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prune, "save_checkpoint", save)
    status, _, error = run("prune @/vit --method dimap --sparsity 0.5 --out a/b")
    assert status == 2
    assert error == "espalier: --out = 'a/b': cannot be written (No space left on device)\n"
    assert list(Path().iterdir()) == []


def test_prune__plain_lines_of_long_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr("orchestration.commands.progress.time.monotonic", lambda: next(clock))
    with (tmp_path / "lines").open("w") as file, Bars(Console(file=file), "ovit: 4 layers") as bars:
        for _ in range(2):
            for done in range(1, 5):
                bars("layers", done, 4)
    assert (tmp_path / "lines").read_text().splitlines() == [
        "ovit: 4 layers",
        "layers      2 of 4, 0:00:12 left",
        "layers      4 of 4, in 0:00:24",
        "layers      2 of 4, 0:00:12 left (round 2)",
        "layers      4 of 4, in 0:00:24 (round 2)",
    ]


def test_prune__help_is_light_and_names_every_method() -> None:
    code = (
        "import sys; from orchestration.cli import app\n"
        "try: app.cli(['prune', '--help'])\n"
        "finally: assert not {'torch', 'ray', 'timm', 'rich'} & set(sys.modules)"
    )
    environment = {**os.environ, "COLUMNS": "300"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, env=environment
    )
    words = done.stdout.replace(",", " ").replace(";", " ").split()
    assert set(METHODS) <= set(words)


# What is typed after `prune`, with `--out out` unless it names another; what the line must say.
DIMAP = "@/vit --method dimap"
SECOND = "@/vit --sparsity 0.5 --gradients 2 --batch-size 2"
BAD: dict[str, tuple[str, ...]] = {
    f"{DIMAP} --sparsity 1.5": ("--sparsity", "1.5", "between 0 and 1"),
    f"{DIMAP} --sparsity nan": ("--sparsity", "nan", "between 0 and 1"),
    f"{DIMAP} --sparsity half": ("--sparsity", "half"),
    DIMAP: ("--sparsity", "must be given"),
    "@/vit --method ovitt --sparsity 0.5": ("--method", "'ovitt'", "did you mean 'ovit'?"),
    f"{DIMAP} --sparsity 0.5 --scope modul": ("--scope", "'modul'", "did you mean 'module'?"),
    f"{DIMAP} --sparsity 0.5 --unfit dens": ("--unfit", "'dens'", "did you mean 'dense'?"),
    f"{DIMAP} --sparsity 0.5 --device tpu": ("--device", "'tpu'", "cpu, cuda"),
    f"{DIMAP} --sparsity 0.5 --pattern 4:2": ("--pattern", "'4:2'", "2:4"),
    f"{DIMAP} --sparsity 0.75 --pattern 2:4": ("--sparsity", "0.75", "2:4 leads to 0.5"),
    f"{DIMAP} --sparsity 0.5 --pattern 1x32": ("--pattern", "'1x32'", "blocks.0.attn.qkv", "--unfit dense"),
    f"{DIMAP} --sparsity 0.5 --floor 0.7 --ceiling 0.6": ("--floor", "0.7", "--ceiling 0.6"),
    f"{DIMAP} --sparsity 0.5 --floor 0.6": ("--sparsity", "0.5", "--floor 0.6", "nearest feasible: 0.6"),
    f"{DIMAP} --sparsity 0.5 --ceiling 1.6": ("--ceiling", "1.6", "between 0 and 1"),
    f"{DIMAP} --sparsity 0.5 --layers qkv": ("--layers", "'qkv'", "MODULE=REGEX"),
    f"{DIMAP} --sparsity 0.5 --layers 'A=attn.(q'": ("--layers A", "'attn.(q'", "regular expression"),
    f"{DIMAP} --sparsity 0.5 --layers A=attn.qkvs": ("--layers A", "'attn.qkvs'", "did you mean 'attn.qkv'?"),
    f"{DIMAP} --sparsity 0.5 --damp auto": ("--damp", "'auto'", "dimap takes no gradients"),
    f"{DIMAP} --sparsity 0.5 --gradients 3": ("--gradients", "3", "dimap takes no gradients"),
    f"{DIMAP} --sparsity 0.5 --sparsty 0.5": ("--sparsty", "--sparsity"),
    f"{DIMAP} --sparsity 0.5 --reconstruct 8": ("--reconstruct", "8", "--data"),
    f"{DIMAP} --sparsity 0.5 --reconstruct 0 --data @/train.parquet": ("--reconstruct", "0"),
    f"{DIMAP} --sparsity 0.5 --reconstruct 8 --data @/none.parquet": ("--data", "no such file"),
    f"{DIMAP} --sparsity 0.5 --rounds 2": ("--rounds", "'2'", "--reconstruct"),
    f"{SECOND} --rounds 0 --data @/train.parquet": ("--rounds", "'0'", "at least 1"),
    f"{SECOND} --rounds many --data @/train.parquet": ("--rounds", "'many'", "the last is 0.5"),
    f"{SECOND} --rounds 0.4,0.3 --data @/train.parquet": ("--rounds", "'0.4,0.3'", "ascending"),
    # data
    "@/vit --sparsity 0.5": ("--data", "ovit follows gradients"),
    f"{SECOND} --data @/none.parquet": ("--data", "none.parquet", "no such file"),
    f"{SECOND} --data @/words.parquet": ("--data", "words.parquet", "Parquet"),
    f"{SECOND} --data @/ten.parquet": ("--data", "ten.parquet", "label 9", "0…2"),
    f"{SECOND} --batch-size 3 --data @/broken.parquet": ("--data", "broken.parquet", "cannot be decoded"),
    f"{DIMAP} --sparsity 0.5 --test @/ten.parquet": ("--test", "ten.parquet", "label 9"),
    f"{DIMAP} --sparsity 0.5 --test @/broken.parquet": ("--test", "broken.parquet", "cannot be decoded"),
    # the Fisher
    f"{SECOND} --data @/train.parquet --damp lots": ("--damp", "'lots'", "positive number, or auto"),
    f"{SECOND} --data @/train.parquet --damp 0": ("--damp", "'0'", "positive number, or auto"),
    f"{SECOND} --data @/train.parquet --relative": ("--relative", "--damp"),
    f"{SECOND} --data @/train.parquet --memory big": ("--memory", "'big'", "8GiB"),
    f"{SECOND} --data @/train.parquet --memory 1KB": ("--memory", "'1KB'", "blocks.0.attn.qkv.weight"),
    f"{SECOND} --data @/train.parquet --gradients 0": ("--gradients", "0"),
    f"{SECOND.replace('vit', 'nan_bias')} --data @/train.parquet": (
        *("model", "nan_bias", "blocks.0.mlp.fc1.bias", "not finite"),
    ),
    # the model
    "@/none --method dimap --sparsity 0.5": ("model", "/none", "no such folder"),
    "@/truncated --method dimap --sparsity 0.5": ("model", "/truncated", "model.safetensors is truncated"),
    "@/weightless --method dimap --sparsity 0.5": ("model", "/weightless", "model.safetensors is missing"),
    "@/nan --method dimap --sparsity 0.5": ("model", "blocks.0.mlp.fc1.weight", "not finite"),
    "@/sparse --method dimap --sparsity 0.1": ("--sparsity", "0.1", "0.3333"),
    "@/sparse --method dimap --sparsity 0.4 --floor 0.3": ("--sparsity", "0.4", "nearest feasible"),
    "vit_tinny_patch16_224 --method dimap --sparsity 0.5": ("model", "did you mean 'vit_tiny_patch16_224'?"),
    # where it goes
    f"{DIMAP} --sparsity 0.5 --out @/full": ("--out", "/full", "not empty"),
    f"{DIMAP} --sparsity 0.5 --out @/train.parquet": ("--out", "train.parquet", "no folder"),
    f"{DIMAP} --sparsity 0.5 --out @/train.parquet/a/b": ("--out", "train.parquet/a/b", "cannot be written"),
    f"{DIMAP} --sparsity 0.5 --out /proc/a": ("--out", "/proc/a", "cannot be written"),
    f"{DIMAP} --sparsity 0.5 --out s3://a/b": ("--out", "s3://a/b", "folder of this machine"),
    f"{DIMAP} --sparsity 0.5 --out": ("--out",),
}  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_prune__bad_input_is_one_line_and_leaves_no_folder(text: str, run: Run, files: Path) -> None:
    entries = set(files.rglob("*"))
    status, out, error = run(f"prune {text}" if "--out" in text else f"prune {text} --out out")
    assert status == 2, error
    assert out == ""
    assert len(error.splitlines()) == 1, error
    assert error.startswith("espalier: ")
    missing = [part for part in BAD[text] if part not in error]
    assert not missing, f"{missing} not in: {error}"
    assert list(Path().iterdir()) == []
    assert set(files.rglob("*")) == entries


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_prune__no_gpu_here(run: Run) -> None:
    status, _, error = run(f"prune {DIMAP} --sparsity 0.5 --device cuda --out out")
    assert (status, error) == (2, "espalier: --device = 'cuda': no CUDA device is here; take cpu\n")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("vit_tinny_patch16_224", "did you mean 'vit_tiny_patch16_224'?"),
        ("@/none", "no such folder"),
        ("@/truncated", "is truncated"),
        ("vgg11", "give --layers MODULE=REGEX"),
    ],
)
def test_prune__inspect_of_what_cannot_be(path: str, says: str, run: Run) -> None:
    status, out, error = run(f"inspect {path}")
    assert (status, out, len(error.splitlines())) == (2, "", 1)
    assert says in error
