"""The code of the documentation that runs by itself does what its pages say."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from commands import run
from pages import Page, check_shown, run_page

from orchestration.cli.app import cli
from pruners.model.masks import MaskSet
from trainers.checkpoint.folder import load_checkpoint

RunPage = Callable[[str], Page]


@pytest.fixture
def run_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[RunPage]:
    """Runs a page in an empty folder; commands run in this process, but for those that start others."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "ESPALIER_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    kept: list[str] = []

    def command(words: list[str]) -> None:
        if words[0] in {"data", "sweep"} and "--dry-run" not in words:
            ended = run(*words, cwd=tmp_path)
            kept.append(ended.err + ended.out)
        else:
            cli(words, standalone_mode=False)

    def read() -> str:
        text = "".join(kept) + capsys.readouterr().out
        kept.clear()
        return text

    threads = torch.get_num_threads()
    yield lambda name: run_page(name, command, read)
    torch.set_num_threads(threads)


def test_docs_run__the_first_pruned_model(run_here: RunPage) -> None:
    """Both methods keep what they say, oViT more of it, and the folders are there."""
    page = run_here("tutorials/first_prune.md")
    printed, names = "".join(page.printed), page.names
    assert "sparsity 0.75, 0.75" in printed
    assert "\n0.50\n" in printed
    assert names["dense"] > 0.8
    assert names["dense"] - names["accuracy"](names["by_ovit"]) < 0.05
    assert names["accuracy"](names["by_ovit"]) > names["accuracy"](names["by_dimap"])
    pruned = MaskSet.from_zeros(names["again"], names["layers"])
    assert pruned.sparsity == pytest.approx(0.75, abs=1e-4)
    assert Path("small/model.safetensors.packed").is_file()


def test_docs_run__python_api(run_here: RunPage) -> None:
    page = run_here("guides/python_api.md")
    assert page.names["report"].sparsity == 0.5
    assert "Costs(" in "".join(page.printed)


def test_docs_run__from_dense_to_int8(run_here: RunPage) -> None:
    """Zeros stay through recovery, INT8 answers as well as float, and each step makes the folder smaller."""
    run_here("tutorials/deploy.md")
    pruned, recovered = (load_checkpoint(folder).masks for folder in ("pruned", "recovered"))
    assert pruned is not None
    assert recovered is not None
    assert recovered.sparsity == pytest.approx(0.75, abs=1e-4)
    assert recovered.fingerprint() == pruned.fingerprint()
    files = ("recovered/model.safetensors", "small/model.onnx", "packed/model.onnx.zst")
    sizes = [Path(file).stat().st_size for file in files]
    assert sizes == sorted(sizes, reverse=True)
    rows = json.loads(Path("speed.json").read_text(encoding="utf-8"))["rows"]
    top1 = {row["model"]: row["top1"] for row in rows}
    assert top1["dense_onnx"] > 0.75
    assert top1["small"] > top1["dense_onnx"] - 0.05


@pytest.mark.cluster
def test_docs_run__the_first_sweep(run_here: RunPage) -> None:
    """The champion is pulled with its zeros, and the second sweep did not train the dense model again."""
    page = run_here("tutorials/first_sweep.md")
    assert page.names["zeros"] >= 41_472
    assert len(list(Path("runs/dense").iterdir())) == 1
    assert sum("reused" in text for text in page.printed) == 1


def test_docs_run__what_is_shown_must_have_been_printed() -> None:
    printed = "epoch 1 of 3: loss 0.31\nepoch 2 of 3: loss 0.25\nwritten to small (0.05 MB)\n"
    check_shown("epoch 1 of 3: loss 0.44\n…\nwritten to small (1.20 MB)\n", printed)
    for shown in ("written to large (0.05 MB)\n", "written to small (0.05 MB)\nepoch 1 of 3: loss 0.31\n"):
        with pytest.raises(AssertionError, match="is not"):
            check_shown(shown, printed)
