"""``espalier export`` and ``espalier pull`` by the real command line, on tiny models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import Run, good
from image_tables import dense_folder, table, tiny, write
from safetensors.torch import load_file
from torch import nn

from orchestration.commands import model_source
from orchestration.common.hashing import content_hash
from orchestration.export import compress
from orchestration.tracking import registry
from orchestration.tracking.server import Server, start_server
from orchestration.tracking.tracker import Tracker
from pruners import find_layers, prune
from trainers.checkpoint.folder import load_checkpoint, save_checkpoint

DATA = [0, 1, 2, 0, 1, 2, 0, 1]


def sparse(folder: Path, sparsity: float = 0.5) -> Path:
    model, arguments = tiny()
    report = prune(model, "dimap", sparsity)
    record = {"method": "dimap", "sparsity": report.sparsity, "allocation": report.allocation}
    save_checkpoint(folder, model, model_args=arguments, masks=report.masks, record=record)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    sparse(folder / "half")
    dense_folder(folder / "dense")
    for name in ("train", "validation", "test"):
        write(folder / f"{name}.parquet", table(DATA))
    (folder / "full").mkdir()
    (folder / "full/thing.txt").write_text("mine")
    shutil.copytree(folder / "half", folder / "changed")
    whole = bytearray((folder / "changed/model.safetensors").read_bytes())
    whole[-5] ^= 1
    (folder / "changed/model.safetensors").write_bytes(bytes(whole))
    return folder


def zeros(model: nn.Module) -> dict[str, torch.Tensor]:
    weights = dict(model.named_parameters())
    return {layer.name: weights[layer.name].detach() == 0 for layer in find_layers(model)}


def test_compress__a_compressed_checkpoint_serves_every_command(run: Run, files: Path) -> None:
    out = good(run, "export @/half small --format compressed")
    sizes = [
        sum(path.stat().st_size for path in folder.glob("m*.safetensors*"))
        for folder in (files / "half", Path("small"))
    ]
    assert f"{sizes[0] / 1e6:.2f} MB → {sizes[1] / 1e6:.2f} MB ({100 * sizes[1] / sizes[0]:.0f} %)" in out
    assert sizes[1] < sizes[0]
    assert "8 tensors" in out
    assert f"load_packed('{Path('small').absolute()}')" in out
    assert {path.name for path in Path("small").iterdir()} == {
        "config.json",
        "model.safetensors.packed",
        "pruning.json",
    }
    assert [path.name for path in Path().iterdir()] == ["small"]
    expected = load_checkpoint(str(files / "half")).model.state_dict()
    here = load_checkpoint("small").model.state_dict()
    assert all(torch.equal(tensor, here[name]) for name, tensor in expected.items())
    assert good(run, "evaluate small --data @/test.parquet") == good(
        run, "evaluate @/half --data @/test.parquet"
    )
    inspected = [json.loads(good(run, f"inspect {name} --json")) for name in ("small", "@/half")]
    assert {**inspected[0], "model": ""} == {**inspected[1], "model": ""}
    assert content_hash("small") == content_hash(str(files / "half"))
    data = " ".join(f"data.{part}=@/{part}.parquet" for part in ("train", "validation", "test"))
    plan = good(
        run,
        "sweep demo --dry-run data.source=null model.architecture=null model.args={} dense=null "
        f"model.checkpoint=small model.classes=3 {data.replace('@', str(files))}",
    )
    assert "6,144 weights in 8 layers" in plan


def test_compress__a_compressed_checkpoint_is_pruned_further(run: Run, files: Path) -> None:
    """By a method that moves the weights that are left, too: what was zero stays zero."""
    good(run, f"export file://{files}/half small --format compressed")
    good(
        run,
        "prune small --method ovit --sparsity 0.8 --gradients 4 --batch-size 4 "
        "--data @/train.parquet --out more",
    )
    old, new = (zeros(load_checkpoint(str(folder)).model) for folder in (files / "half", "more"))
    assert sum(int(mask.sum()) for mask in new.values()) == round(0.8 * 6144)
    assert all((new[name] | ~mask).all() for name, mask in old.items())


def test_compress__a_model_of_a_hub_and_one_without_zeros(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_source.factory, "load_hub", lambda name: tiny()[0])
    for name, out in (("hf-hub:me/tiny", "hub"), ("@/dense", "dense")):
        output = good(run, f"export {name} {out} --format compressed")
        assert "nothing was gained" in output
        loaded = load_checkpoint(out)
        assert loaded.masks is None
        state = loaded.model.state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in tiny()[0].state_dict().items())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("export @/half out --format compresed", ("--format", "'compresed'", "did you mean 'compressed'?")),
        ("export @/half out", ("--format",)),
        ("export @/none out --format compressed", ("model", "/none", "no such folder")),
        ("export @/full out --format compressed", ("model", "/full", "config.json is missing")),
        ("export @/changed out --format compressed", ("model.safetensors is not the file", "checksum")),
        ("export nowhere://x out --format compressed", ("model", "nowhere://x", "pyarrow URI")),
        ("export @/half @/full --format compressed", ("OUT", "/full", "not empty")),
        ("export @/half @/dense --format compressed", ("OUT", "/dense", "not empty")),
        ("export @/half @/train.parquet --format compressed", ("OUT", "no folder")),
        ("export @/half s3://a/b --format compressed", ("OUT", "folder of this machine")),
        ("export models:/a@b out --format compressed", ("--storage", "'runs'", "no sweep has been logged")),
        ("pull models:/a@b out", ("--storage", "'runs'", "no sweep has been logged")),
        ("pull models:/a@b out --tracking http://127.0.0.1:9", ("127.0.0.1:9", "no MLflow server answers")),
        ("pull a out", ("model", "'a'", "models:/NAME@alias")),
        ("pull models:/a@b @/full", ("DEST", "/full", "not empty")),
    ],
)  # fmt: skip
def test_compress__bad_input_is_one_line_and_leaves_nothing(
    text: str, says: tuple[str, ...], run: Run, files: Path
) -> None:
    entries = set(files.rglob("*"))
    status, out, error = run(text)
    assert (status, out, len(error.splitlines())) == (2, "", 1), error
    missing = [part for part in says if part not in error]
    assert not missing, f"{missing} not in: {error}"
    assert list(Path().iterdir()) == []
    assert set(files.rglob("*")) == entries


def test_compress__a_disk_that_is_full(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_half(source: Path, target: Path, record: object) -> list[str]:
        (target / "half").write_text("")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compress, "pack_folder", write_half)
    status, _, error = run("export @/half a/b --format compressed")
    assert (status, error) == (2, "espalier: OUT = 'a/b': cannot be written (No space left on device)\n")
    assert list(Path().iterdir()) == []


# the registry


@pytest.fixture(scope="module")
def server(files: Path) -> Iterator[Server]:
    """What a sweep leaves beside its results: a registry with two versions, one damaged."""
    made = start_server(files / "runs/mlflow")
    try:
        made.wait_ready()
        tracker = Tracker(made.uri, "tests")
        for name in ("half", "changed"):
            run = tracker.start(name, None, {}, {})
            tracker.folder(run, files / name, registry.ARTIFACT)
            version = registry.register(tracker, "espalier-test", run, {})
            if name == "half":
                tracker.client.set_registered_model_alias("espalier-test", "champion", version)
        tracker.close("FINISHED")
        yield made
    finally:
        made.stop()


@pytest.mark.cluster
def test_compress__pull(run: Run, files: Path, server: Server) -> None:
    out = good(run, f"pull models:/espalier-test@champion a --tracking-uri {server.uri}")
    assert "3 files as recorded" in out
    assert f"timm.create_model('local-dir:{Path('a').absolute()}', pretrained=True)" in out
    good(run, "pull models:/espalier-test/1 b --storage @/runs")
    for name in ("a", "b"):
        assert {path.name for path in Path(name).iterdir()} == {
            path.name for path in (files / "half").iterdir()
        }
        assert (
            load_file(f"{name}/model.safetensors").keys()
            == load_file(files / "half/model.safetensors").keys()
        )
        assert Path(name, "model.safetensors").read_bytes() == (files / "half/model.safetensors").read_bytes()
    good(run, f"export models:/espalier-test@champion c --format compressed --tracking-uri {server.uri}")
    loaded = load_checkpoint("c")
    assert loaded.masks is not None
    assert loaded.masks.sparsity == 0.5
    for text, says in (
        ("models:/espalier-test@none d", "none"),
        ("models:/espalier-test/7 d", "7"),
        ("models:/espalier-text@champion d", "espalier-text"),
        ("models:/espalier-test/2 d", "model.safetensors is not the file that pruning.json describes"),
        ("models:/espalier-test/1 a", "DEST = 'a': the folder is there and not empty"),
    ):
        status, out, error = run(f"pull {text} --tracking-uri {server.uri}")
        assert (status, out, len(error.splitlines())) == (2, "", 1), error
        assert says in error
        assert not Path("d").exists()
