"""A whole sweep by the real command line, and what it leaves: output, table, folders."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import timm
import torch
from commands import SMALL, espalier, run
from safetensors import safe_open
from sweep_output import METHODS, MODEL, RECIPE, all_runs, rows
from swept import Swept

from orchestration.cli import app as cli
from orchestration.search.space import summarise
from pruners.allocation.projection import budget
from pruners.allocation.sharing import allocate
from pruners.elimination.order import UPDATES
from pruners.methods.registry import create_pruner
from pruners.model.layers import PrunableLayer, find_layers
from pruners.model.masks import MaskSet

if TYPE_CHECKING:
    from mlflow import MlflowClient

pytestmark = pytest.mark.cluster

BEGINS = {".parquet": b"PAR1", ".png": b"\x89PNG\r\n\x1a\n", ".db": b"SQLite format 3\0"}


def table(out: str) -> list[str]:
    return [line for line in out.splitlines() if "│" in line or "┃" in line]


def percent(text: str) -> float:
    return float(text.removesuffix("%"))


# the command's own words


def test_sweep__every_phase_is_a_plain_line(swept: Swept) -> None:
    lines = swept.command.err.splitlines()
    phases = [line for line in lines if re.match(r"\[\d/5\] ", line)]
    assert phases == [
        "[1/5] dense model",
        "[2/5] dimap: allocation search",
        "[3/5] ovit: allocation search",
        "[4/5] dimap: gradual pruning",
        "[5/5] ovit: gradual pruning",
    ]
    assert "\x1b" not in swept.command.err + swept.command.out
    assert re.search(r"4 trials, own \d+\.\d % → best \d+\.\d % one-shot on validation", swept.command.err)
    assert (
        len(
            re.findall(
                rf"{RECIPE.schedule.trials} runs \(\d stopped early\), best .* at 75\.0 %", swept.command.err
            )
        )
        == 2
    )
    assert "Traceback" not in swept.command.err


def test_sweep__progress_says_trials_best_and_time_left(swept: Swept) -> None:
    assert re.search(r"\d/[12] done, 1 running, best \d+\.\d %, \d+:\d\d left", swept.command.err)


def test_sweep__the_end_is_a_table_and_what_to_do_next(swept: Swept) -> None:
    out = swept.command.out
    by_method = rows(out)
    assert set(by_method) == set(METHODS)
    for cells in by_method.values():
        assert cells[1] in {"own", "searched"}
        assert cells[5] == "75.00 %"
        assert "→" in cells[6]
        assert "→" in cells[7]
        assert cells[9] in {"1", "2"}
    assert len({cells[2] for cells in by_method.values()}) == 1, "both began with the same dense model"
    links = re.findall(r"^(\w+): http://127\.0\.0\.1:\d+/#/experiments/\d+/runs/[0-9a-f]{32}$", out, re.M)
    assert links == list(METHODS)
    assert re.search(r"^open the UI: +espalier ui --storage runs$", out, re.M)
    assert re.search(
        r"^load the champion: timm\.create_model\('local-dir:/.+', pretrained=True\)$", out, re.M
    )
    assert re.search(rf"^run on a cluster: .*espalier sweep {SMALL} --address auto$", out, re.M)


# the searches


@pytest.mark.parametrize("method", METHODS)
def test_sweep__allocation_trials_keep_the_budget_and_begin_with_the_methods_own(
    swept: Swept, method: str
) -> None:
    # by their proposal: two at a time may end in any order
    trials = sorted(swept.logs()[f"allocation-{method}"]["trials"], key=lambda trial: int(trial["number"]))
    assert [trial["number"] for trial in trials] == list(range(RECIPE.allocation.trials))
    assert {trial["state"] for trial in trials} == {"finished"}
    (dense,) = swept.storage.glob("dense/*/model")
    model = timm.create_model(f"local-dir:{dense}", pretrained=True)
    layers = find_layers(model)
    total = budget(layers, RECIPE.pruning.sparsity)
    for trial in trials:
        allocation = trial["metrics"]["allocation"]
        assert sum(allocation.values()) == total
        assert all(0 <= allocation[layer.name] <= 0.98 * layer.numel for layer in layers)
    own = trials[0]["metrics"]["allocation"]
    assert trials[0]["values"] == summarise(own, layers), "the first proposal is not the method's own"
    summary = f"own {100 * trials[0]['metrics']['val_top1']:.1f} % → best"
    assert f"{method}: allocation search" in swept.command.err
    assert summary in swept.command.err.partition(f"{method}: allocation search")[2].partition("[")[0]
    if method == "dimap":  # oViT's own needs the very gradients
        assert own == own_allocation(model, layers, total)
    assert max(trial["score"] for trial in trials) >= trials[0]["score"]
    assert len({json.dumps(trial["metrics"]["allocation"]) for trial in trials}) > 1


def own_allocation(model: torch.nn.Module, layers: list[PrunableLayer], total: int) -> dict[str, int]:
    """What DIMAP does alone: computed here from the dense weights."""
    pruner = create_pruner("dimap")
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    order = pruner.order(weights, layers, MaskSet.dense(model, layers), None)
    return dict(allocate(order.losses, layers, total, pruner.scope, floor=0.0, ceiling=0.98))


def test_sweep__a_trial_stopped_early_is_followed_by_others(swept: Swept) -> None:
    """The hang of Ray Train V2 in Tune: a stopped trial that keeps its resources lets no other begin."""
    everything: list[dict[str, Any]] = []
    for method in METHODS:
        trials = swept.logs()[f"schedule-{method}"]["trials"]
        assert [trial["number"] for trial in trials] == list(range(RECIPE.schedule.trials))
        own = trials[0]["values"]
        assert own == {"recovery.lr.peak": RECIPE.recovery.lr.peak, "pruning.schedule.steps": 2}
        everything += trials
    assert {trial["state"] for trial in everything} <= {"finished", "stopped"}
    followed = [trial for trial in everything[:-1] if trial["state"] == "stopped"]
    assert followed, "no trial but the last one was stopped early"
    assert all(trial["metrics"]["epoch"] < RECIPE.recovery.epochs for trial in followed)


# the models


def champion(out: str) -> tuple[str, Path]:
    """Method and folder, as the last lines say them."""
    method = re.search(r"^champion: (\w+) ", out, re.M)
    folder = re.search(r"'local-dir:(.+?)'", out)
    assert method is not None
    assert folder is not None
    return method[1], Path(folder[1])


def test_sweep__the_champion_loads_with_plain_timm(swept: Swept) -> None:
    method, folder = champion(swept.command.out)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    cells = rows(swept.command.out)[method]
    assert f"{100 * timm_accuracy(model, swept):.2f} %" == cells[4]
    weights = dict(model.named_parameters())
    masks = MaskSet.load(folder / "masks.safetensors")
    for name, mask in masks.items():
        assert torch.equal(weights[name] != 0, mask), name
    layers = find_layers(model)
    assert set(masks) == {layer.name for layer in layers}
    assert sum(masks.pruned().values()) == budget(layers, RECIPE.pruning.sparsity)
    size = sum(
        (folder / name).stat().st_size for name in ("model.safetensors", "masks.safetensors", "config.json")
    )
    assert cells[8] == f"{size / 1e6:.2f} MB"


def timm_accuracy(model: torch.nn.Module, swept: Swept) -> float:
    """Top-1 on the test images with timm's own transform: none of ours."""
    import io

    import pyarrow.parquet as pq
    from PIL import Image

    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    images = pq.read_table(swept.storage / "data/digits/test.parquet").to_pylist()
    pictures = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in images]
    with torch.no_grad():
        predicted = model(torch.stack([transform(picture) for picture in pictures])).argmax(1)
    return float((predicted == torch.tensor([row["label"] for row in images])).double().mean())


def test_sweep__the_record_of_a_recovered_model_fits_its_trial(swept: Swept) -> None:
    for method in METHODS:
        trials = swept.logs()[f"schedule-{method}"]["trials"]
        best = max((trial for trial in trials if trial["state"] == "finished"), key=lambda t: t["score"])
        (folder,) = swept.storage.glob(f"sweeps/small/schedule-{method}-*/recovered")
        record = json.loads((folder / "pruning.json").read_text())
        assert record["method"] == method
        assert record["figures"]["score"] == best["score"]
        assert record["figures"]["val_top1"] == best["metrics"]["val_top1"]
        assert not list(folder.glob("trainer.*"))


def test_sweep__no_pickle_is_left_anywhere(swept: Swept) -> None:
    """Every file is what its name says; none can be a pickle."""
    files = [path for path in swept.storage.rglob("*") if path.is_file()]
    assert len(files) > 50
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="np") as content:
                assert content.keys() or path.name == UPDATES  # of a method that updates nothing
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.name == ".validate_storage_marker" or path.suffix == ".lock":  # Ray Train's; a sweep's name
            assert not path.read_bytes()
        elif path.suffix in {".py", ".yaml", ".txt"} or path.name == "MLmodel":
            path.read_text(encoding="utf-8")  # a pickle begins with no letter
        elif path.suffix == ".log":
            assert path.read_text(encoding="utf-8").isprintable() or "\n" in path.read_text(encoding="utf-8")
        else:
            assert path.read_bytes().startswith(BEGINS[path.suffix]), path


def test_sweep__scratch_is_cleared(swept: Swept) -> None:
    assert not list(swept.storage.glob("sweeps/*/scratch/*"))
    assert not list(swept.storage.rglob("*.partial"))


# the other commands


def say(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What the command line says, run in this process, which has imported torch already."""
    monkeypatch.setattr(sys, "argv", ["espalier", *arguments])
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(kind) for kind in kinds]
    try:
        with pytest.raises(SystemExit) as end:
            cli.main()
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)
    captured = capsys.readouterr()
    assert end.value.code == 0, captured.err
    return captured.out


@pytest.mark.parametrize("by", ["registry", "folder"])
def test_sweep__evaluate_agrees_with_the_table(
    swept: Swept, by: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(swept.folder)
    method, folder = champion(swept.command.out)
    model = f"models:/{MODEL}@champion" if by == "registry" else str(folder)
    out = say(capsys, monkeypatch, "evaluate", model, "--data", "runs/data/digits/test.parquet")
    assert re.search(r"^images +350$", out, re.M)
    assert f"top-1     {rows(swept.command.out)[method][4]}\n" in out
    assert "sparsity  75.00 %" in out


def test_sweep__models_lists_what_is_registered(
    swept: Swept, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(swept.folder)
    lines = [line for line in say(capsys, monkeypatch, "models").splitlines() if f"/{MODEL}/" in line]
    assert len(lines) == len(METHODS)
    method, _ = champion(swept.command.out)
    for line in lines:
        assert line.startswith(f"models:/{MODEL}/")
        assert "sparsity 0.7500" in line
        assert ("@champion" in line) == (method in line)


def everything(swept: Swept, client: MlflowClient) -> Mapping[str, Any]:
    """Trial logs, runs with their metrics, versions: what a second sweep must leave as it is."""
    runs = [entry for found in all_runs(client).values() for entry in found]
    return {
        "logs": swept.logs(),
        "runs": {entry.info.run_id: (entry.info.status, entry.data.params) for entry in runs},
        "metrics": {entry.info.run_id: sorted(entry.data.metrics) for entry in runs},
        "versions": {
            (version.version, version.run_id) for version in client.search_model_versions(f"name='{MODEL}'")
        },
    }


def test_sweep__a_second_sweep_repeats_nothing(swept: Swept, client: MlflowClient) -> None:
    before = everything(swept, client)
    again = run("sweep", str(SMALL), cwd=swept.folder)
    assert everything(swept, client) == before
    assert table(again.out) == table(swept.command.out)
    assert champion(again.out) == champion(swept.command.out)
    assert "reused" in again.err
    assert again.err.count("trials known") == 2 * len(METHODS)
    assert again.seconds < swept.command.seconds / 2


def test_sweep__a_run_outlives_a_killed_worker(swept: Swept) -> None:
    """``espalier run``: one method, no search, the dense model of the sweep; its group is restarted once."""
    with espalier("run", str(SMALL), "--method", "ovit", "name=alone", cwd=swept.folder) as command:
        command.until(lambda: bool(list(swept.storage.glob("sweeps/alone/*/train/*/checkpoint_*"))))
        victims = command.workers()
        assert len(victims) == RECIPE.resources.workers
        os.kill(victims[-1], signal.SIGKILL)
        assert command.wait() == 0, command.err
        assert command.left() == {}
    assert "reused" in command.err
    (log,) = swept.storage.glob("sweeps/alone/schedule-ovit-*/trials.json")
    (trial,) = json.loads(log.read_text(encoding="utf-8"))["trials"]
    assert trial["state"] == "finished"
    assert trial["metrics"]["epoch"] == RECIPE.recovery.epochs
    cells = rows(command.out)["ovit"]
    assert (cells[1], cells[3], cells[5]) == ("own", "–", "75.00 %")
    assert percent(cells[4]) > 50
